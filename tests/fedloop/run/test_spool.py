"""A round on disk gives what the same round in memory gives, and refuses what it would refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedloop.defense.defense import Defense
from fedloop.defense.levels import CumulativeLevel, StepLevel
from fedloop.defense.types import ClientUpdate
from fedloop.errors import AggregationError, EvidenceError
from fedloop.rules.rule import AGGREGATORS
from fedloop.run.spool import Spool
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, pack
from loraprobe.errors import KindMismatch, LayoutMismatch, NonFiniteError
from tests.helpers import federated, make
from tests.helpers.federated import CLIENTS, updates
from tests.helpers.probes import tiny_probe

SENT = updates(CumulativeLevel(), malicious=("c4",))
LAYOUT = Layout.of(SENT["c0"].adapter)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    """A round of `SENT`, which arrived in another order than that of the ids."""
    with Spool(tmp_path, LAYOUT, base_model=SENT["c0"].adapter.base_model) as spool:
        for client in reversed(CLIENTS):
            spool.add(client, SENT[client].adapter)
        yield spool


def test_a_defence_says_the_same_of_a_round_on_disk(spool: Spool) -> None:
    on_disk = [
        ClientUpdate(client, SENT[client].num_examples, spool.adapter(client)) for client in spool
    ]
    records = [
        federated.untimed(Defense(tiny_probe(), CumulativeLevel()).assess(1, sent))
        for sent in (on_disk, list(SENT.values()))
    ]
    assert records[0] == records[1]
    # negative control: there was something to say
    assert records[0].weights["c4"] < min(records[0].weights[client] for client in CLIENTS[:4])


@pytest.mark.parametrize("rule", ["mean", "median", "krum"])
def test_rules_give_the_same_of_rows_in_a_file(spool: Spool, rule: str) -> None:
    rows = torch.stack([pack(SENT[client].adapter)[0] for client in CLIENTS])
    weights = torch.ones(len(CLIENTS))
    assert torch.equal(
        AGGREGATORS[rule](spool.rows(CLIENTS), weights, f=1), AGGREGATORS[rule](rows, weights, f=1)
    )


def test_the_mean_leaves_clients_of_weight_zero_unread(spool: Spool) -> None:
    expected = AGGREGATORS["mean"](
        torch.stack([pack(SENT[client].adapter)[0] for client in ("c1", "c3")]),
        torch.tensor([0.25, 0.75]),
    )
    assert torch.equal(spool.mean({"c3": 0.75, "c1": 0.25, "c0": 0.0, "nobody": 0.0}), expected)
    with pytest.raises(EvidenceError, match="no update of 'nobody'"):
        spool.mean({"c1": 0.5, "nobody": 0.5})
    with pytest.raises(AggregationError, match="expected at least one"):
        spool.mean({"c1": 0.0})


def test_what_is_refused_leaves_no_trace(spool: Spool) -> None:
    with pytest.raises(EvidenceError, match="second update of 'c0'"):
        spool.add("c0", SENT["c1"].adapter)
    with pytest.raises(NonFiniteError):
        spool.add("new", federated.mapped(SENT["c0"].adapter, lambda tensor: tensor * math.nan))
    with pytest.raises(LayoutMismatch):
        spool.add("new", Adapter(dict(make.adapter(r=3)), kind="factor_delta"))
    with pytest.raises(EvidenceError, match="no update of 'new'"):
        spool.adapter("new")
    with pytest.raises(AggregationError, match="no client"):
        spool.rows([])
    spool.add("new", SENT["c0"].adapter)  # what was refused took no row
    assert torch.equal(spool.vector("new"), pack(SENT["c0"].adapter)[0])


def test_evidence_is_read_as_it_was_sent_and_only_what_the_probe_reads(tmp_path: Path) -> None:
    sent = updates(StepLevel())
    with Spool(tmp_path, LAYOUT, factors=("B",)) as spool:
        for client in CLIENTS:
            spool.add(client, sent[client].adapter, sent[client].steps)
        spool.replace("c1", sent["c2"].adapter, sent["c0"].steps)
        spool.discard("c0")
        assert list(spool) == list(CLIENTS[1:])
        assert torch.equal(spool.vector("c1"), pack(sent["c2"].adapter)[0])
        for step, kept in zip(sent["c3"].steps, spool.update("c3", 7).steps, strict=True):
            assert kept.keys() == step.keys()
            assert Layout.of(kept) == Layout.of(step)
            for module in step:
                assert np.array_equal(np.asarray(kept[module].B), np.asarray(step[module].B))
                with pytest.raises(KindMismatch):
                    kept[module].A  # noqa: B018  # it is read by being asked for
        spool.add("c0", sent["c0"].adapter)  # who was forgotten may send anew
        assert torch.equal(spool.vector("c0"), pack(sent["c0"].adapter)[0])


def test_weights_are_not_what_is_averaged(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match="deltas are averaged"):
        Spool(tmp_path, Layout.of(make.adapter()))


def test_nothing_stays_on_disk(spool: Spool, tmp_path: Path) -> None:
    spool.rows(CLIENTS)
    assert any(tmp_path.iterdir())
    spool.close()
    assert not any(tmp_path.iterdir())
