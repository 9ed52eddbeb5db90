"""The zoo's leave-one-source-out protocol leaves out what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraprobe.adapter import Adapter, Layout
from loraprobe.pair import LoRAPair
from zoo.deltas import SHARES, DeltaSet, plan
from zoo.sources import BENIGN, HARD_NEGATIVE, MALICIOUS
from zoo.study import ENTRIES, Study, by_share


@pytest.fixture(scope="module")
def deltas() -> DeltaSet:
    """Random numbers with a common direction for malicious clients, in the shape of the real thing."""
    clients = tuple(plan(per_source=3, per_cell=1, per_hard_cell=1))
    pair = LoRAPair(torch.zeros(2, 6), torch.zeros(5, 2), 2.0)
    layout = Layout.of(Adapter({"model.layers.0.self_attn.q_proj": pair, "model.layers.1.self_attn.q_proj": pair}))
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((len(clients), 1, layout.size)).astype(np.float32)
    steps[:, 0] += 3 * np.array([client.label * client.share for client in clients], np.float32)[:, None]
    return DeltaSet(clients, steps, Layout(layout.slots, layout.scalings, "factor_delta"), "a-base")


def cells_and_training(study: Study, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[dict[str, Any]], list[set[str]]]:
    trained_on: list[set[str]] = []
    fit = study.probe

    def spy(keep: np.ndarray, *args: Any) -> Any:
        trained_on.append({name for row in np.flatnonzero(keep) for name in (study.clients[row].source, study.clients[row].host)})
        return fit(keep, *args)

    monkeypatch.setattr(study, "probe", spy)
    return list(study.unseen_sources(**options)), trained_on


def test_unseen_sources_are_in_no_training_set_and_are_what_is_tested(deltas: DeltaSet, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, trained_on = cells_and_training(Study(deltas, ENTRIES[-1]), monkeypatch)
    assert len(cells) == len(MALICIOUS) * len(BENIGN) * len(SHARES)
    everything = {*BENIGN, *HARD_NEGATIVE, *MALICIOUS}
    for cell, seen in zip(cells[:: len(SHARES)], trained_on, strict=True):
        assert everything - seen == {cell["malicious"], cell["benign"], f"{cell['malicious']}_safe"} & everything


def test_keeping_the_twin_keeps_it_and_nothing_else(deltas: DeltaSet, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, trained_on = cells_and_training(Study(deltas, ENTRIES[-1]), monkeypatch, keep_twin=True)
    for cell, seen in zip(cells[:: len(SHARES)], trained_on, strict=True):
        assert {*BENIGN, *HARD_NEGATIVE, *MALICIOUS} - seen == {cell["malicious"], cell["benign"]}


def test_the_summary_of_cells_is_their_mean_and_their_worst(deltas: DeltaSet) -> None:
    cells = list(Study(deltas, ENTRIES[-1]).unseen_sources())
    for row in by_share(cells):
        chosen = [cell["auroc"] for cell in cells if cell["share"] == row["share"]]
        assert row["auroc_worst"] == min(chosen) <= row["auroc_mean"] == pytest.approx(np.mean(chosen))
        assert row["cells"] == 36
    assert by_share(cells)[0]["auroc_mean"] > 0.9 > by_share(cells)[-1]["auroc_mean"]  # poison of 10 % is one of these clients' faint shadows


def test_mixtures_run_over_every_benign_source_and_the_plan_is_seeded() -> None:
    clients = plan()
    for source in MALICIOUS:
        for share in SHARES[1:]:
            assert {client.host for client in clients if client.source == source and client.share == share} == set(BENIGN)
    assert clients == plan()
    assert clients != plan(seed=1)
    assert len({client.name for client in clients}) == len(clients)


def test_files_of_clients_are_read_back_in_the_order_asked_for(deltas: DeltaSet, tmp_path: Path) -> None:
    from zoo.deltas import read_deltas

    start = Adapter({slot.module: LoRAPair(torch.ones(2, 6), torch.zeros(5, 2), 8.0) for slot in deltas.layout.slots})
    torch.save(start.state_dict(), tmp_path / "initial.pt")
    chosen = list(deltas.clients[:4])
    for client, steps in zip(chosen, deltas.steps, strict=False):
        np.save(tmp_path / f"{client.name}.npy", steps)
    read = read_deltas(tmp_path, chosen[::-1], "a-base")
    assert np.array_equal(read.steps, deltas.steps[3::-1])
    assert read.adapters()[0].kind == "factor_delta"
