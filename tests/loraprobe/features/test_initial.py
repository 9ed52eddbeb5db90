"""Probes of factors know the initial adapter they belong to, and refuse another one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from loraprobe import Adapter, LoRAPair, factor_delta
from loraprobe.adapters.deltas import add_delta
from loraprobe.errors import StartMismatch
from loraprobe.features.initial import InitialAdapter
from tests.helpers import make
from tests.helpers.probes import BASE, initial, labelled_adapter, tiny_probe, training_data

START = initial({"r": 2, "base_model": BASE})
DELTA = labelled_adapter(3)
PROBE = tiny_probe("linear", "all_b")


def rotated(adapter: Adapter) -> Adapter:
    """(R A, B R^T): the same product."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    pairs = {
        module: LoRAPair(
            turn @ torch.as_tensor(np.asarray(pair.A, np.float64)),
            torch.as_tensor(np.asarray(pair.B, np.float64)) @ turn.T,
            pair.scaling,
        )
        for module, pair in adapter.items()
    }
    return make.with_pairs(adapter, pairs)


AFTER = add_delta(START, DELTA)


def test_the_initial_adapter_is_learnt_from_the_deltas() -> None:
    learnt = PROBE.featurizer.initial
    assert learnt is not None
    for module, factor in learnt.factors.items():
        assert factor == pytest.approx(np.asarray(START[module].A), rel=1e-3)


def test_adapters_that_started_there_are_scored() -> None:
    [known, fresh] = PROBE.verdicts([factor_delta(AFTER, START), factor_delta(AFTER, None)])
    assert known.label == fresh.label != "inconclusive"


@pytest.mark.parametrize("start", [START, None])
def test_rotated_factors_are_refused(start: Adapter | None) -> None:
    with pytest.raises(StartMismatch, match="points elsewhere"):
        PROBE([factor_delta(rotated(AFTER), start)])


def test_another_start_is_refused() -> None:
    other = make.adapter(seed=5, r=2, base_model=BASE)
    blank = {m: LoRAPair(8 * pair.A, 0 * pair.B, 2.0) for m, pair in other.items()}
    start = make.with_pairs(other, blank)
    with pytest.raises(StartMismatch, match="of the probe's training"):
        PROBE.verdicts([factor_delta(add_delta(start, DELTA), start)])


def test_where_the_start_cannot_be_told_nothing_is_benign() -> None:
    bare = Adapter(dict(DELTA), kind="factor_delta", base_model=BASE)
    above = replace(PROBE, threshold=1.0)
    [verdict] = above.verdicts([bare])
    assert verdict.label == "inconclusive"
    assert "initial adapter" in verdict.reason
    assert above.verdicts([bare], check_start=False)[0].label == "benign"
    unknown = replace(above, featurizer=replace(above.featurizer, initial=None))
    assert unknown.verdicts([factor_delta(AFTER, START)])[0].label == "inconclusive"


def test_a_later_round_counts_from_its_own_start() -> None:
    """B of the global adapter is no longer zero: its A has moved, and the client's little."""
    later = add_delta(START, labelled_adapter(4))
    [score] = PROBE([factor_delta(add_delta(later, DELTA), later)])
    assert 0 <= score <= 1
    with pytest.raises(StartMismatch, match="trained from"):
        PROBE([factor_delta(rotated(add_delta(later, DELTA)), later)])


def test_training_adapters_of_several_starts_or_of_none_leave_it_unknown() -> None:
    modules = list(DELTA)
    assert InitialAdapter.learn(training_data().adapters, modules) is not None
    bare = Adapter(dict(DELTA), kind="factor_delta")
    assert InitialAdapter.learn([DELTA, bare], modules) is None
    others = [DELTA, DELTA.since(make.adapter(seed=5, r=2))]
    assert InitialAdapter.learn(others, modules) is None
