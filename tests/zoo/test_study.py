"""The zoo's leave-one-source-out protocol leaves out what it says."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloop.errors import ConfigError
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import DataError
from zoo.labelled.client_design import SHARES, ZOO_DESIGN, plan, twin_of
from zoo.labelled.deltas import DeltaSet, read_deltas
from zoo.labelled.sources import BENIGN, HARD_NEGATIVE, MALICIOUS
from zoo.labelled.study import ENTRIES, Study
from zoo.labelled.unseen_sources import unseen_cells

SMALL = replace(ZOO_DESIGN, per_source=3, per_cell=1, per_hard_cell=1)


@pytest.fixture(scope="module")
def deltas() -> DeltaSet:
    """Random numbers with a common direction for malicious clients, in the shape of the real
    thing.
    """
    clients = tuple(plan(SMALL))
    pair = LoRAPair(torch.zeros(2, 6), torch.zeros(5, 2), 2.0)
    layout = Layout.of(
        Adapter({"model.layers.0.self_attn.q_proj": pair, "model.layers.1.self_attn.q_proj": pair})
    )
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((len(clients), 1, layout.size)).astype(np.float32)
    steps[:, 0] += (
        3 * np.array([client.label * client.share for client in clients], np.float32)[:, None]
    )
    return DeltaSet(
        clients, steps, Layout(layout.slots, layout.scalings, "factor_delta"), "a-base", SMALL
    )


@pytest.mark.parametrize("keep_twin", [False, True])
def test_unseen_sources_are_in_no_training_set_and_nothing_else_is_missing(keep_twin: bool) -> None:
    clients = plan(SMALL)
    cells = unseen_cells(clients, SHARES, keep_twin)
    everything = {*BENIGN, *HARD_NEGATIVE, *MALICIOUS}
    for malicious, benign in product(MALICIOUS, BENIGN):
        cell = cells[malicious, benign]
        trained = [clients[row] for row in np.flatnonzero(cell.train)]
        seen = {name for client in trained for name in (client.source, client.host)}
        twin = set() if keep_twin else {twin_of(malicious)}
        assert everything - seen == {malicious, benign} | (twin & everything)
        assert list(cell.malicious_rows) == list(SHARES)
        for share, rows in cell.malicious_rows.items():
            tested = {(clients[row].source, clients[row].host) for row in rows}
            assert tested == {(malicious, benign if share < 1 else malicious)}
        assert {clients[row].source for row in cell.benign_rows} == {benign}


def test_a_cell_has_a_row_for_every_share(deltas: DeltaSet) -> None:
    rows = Study(deltas, ENTRIES[-1]).cell(MALICIOUS[0], BENIGN[0])
    assert [row["share"] for row in rows] == list(SHARES)
    assert {row["benign"] for row in rows} == {BENIGN[0]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"malicious": ("gptfuzz",)}, "got 1 malicious and 9 benign sources"),
        ({"benign": ("gsm8k",)}, "got 4 malicious and 1 benign sources"),
        ({"benign": ("gsm8k", "gptfuzz")}, "names that differ"),
        ({"shares": (0.5, 1.0)}, "poison shares"),
        ({"shares": (1.0, 0.0)}, "poison shares"),
        ({"lr_range": (2e-3, 1e-3)}, "learning rates"),
        ({"per_cell": 0}, "clients a kind"),
    ],
)
def test_a_design_that_cannot_be_studied_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        replace(ZOO_DESIGN, **change)


def test_files_of_clients_are_read_back_in_the_order_asked_for(
    deltas: DeltaSet, tmp_path: Path
) -> None:
    factors = torch.ones(2, 6), torch.zeros(5, 2)
    start = {slot.module: LoRAPair(*factors, 8.0) for slot in deltas.layout.slots}
    torch.save(Adapter(start).state_dict(), tmp_path / "initial.pt")
    chosen = list(deltas.clients[:4])
    with pytest.raises(DataError, match="expected the deltas of 4 clients"):
        read_deltas(tmp_path, chosen, "a-base")
    for client, steps in zip(chosen, deltas.steps, strict=False):
        np.save(tmp_path / f"{client.name}.npy", steps)
    read = read_deltas(tmp_path, chosen[::-1], "a-base")
    assert np.array_equal(read.steps, deltas.steps[3::-1])
    assert read.adapters()[0].kind == "factor_delta"
