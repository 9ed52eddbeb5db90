"""A second opinion can only take weight away, and what it cannot read counts nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from fedloop.defense.behaviour import AGGREGATE
from fedloop.errors import EvidenceError
from loraprobe.adapters.adapter import Adapter
from tests.fedloop.defense.test_defense import defense
from tests.helpers import probes
from tests.helpers.federated import CLIENTS, LEVELS, updates

_LIKE = probes.labelled_adapter(0)
START = Adapter(dict(_LIKE), base_model=_LIKE.base_model)


@dataclass
class Said:
    """Says what it is told to; 0 of everybody else."""

    scores: Mapping[str, float]
    cut: float = 1.0
    asked: list[list[str]] = field(default_factory=list)

    def read(
        self, round: int, start: Adapter, changed: Mapping[str, Adapter]
    ) -> Mapping[str, float]:
        self.asked.append(sorted(changed))
        return {name: self.scores.get(name, 0.0) for name in changed if name != "c3"}


@pytest.mark.parametrize("name", [None, *LEVELS])
def test_who_is_refused_or_unread_counts_nothing_and_nobody_gains_trust(name: str | None) -> None:
    level = LEVELS[name] if name else None
    sent = list(updates(level).values())
    plain = defense(level).assess(1, sent, start=START)
    opinion = Said({"c1": 1.0, "c2": math.nan})
    record = defense(level, behaviour=opinion, min_mean_factor=0.0).assess(1, sent, start=START)
    out = {"c1", "c2", "c3"}
    assert {c for c in CLIENTS if record.factors[c] == 0} >= out
    assert all(record.reasons[c].startswith("behaviour: ") for c in out)
    assert {c: plain.factors[c] for c in CLIENTS if c not in out} == {
        c: record.factors[c] for c in CLIENTS if c not in out
    }
    assert opinion.asked[-1] == [AGGREGATE]
    silent = defense(level, behaviour=Said({"c3": 0.0}), min_mean_factor=0.0)
    assert silent.assess(1, sent, start=START).reasons.keys() - plain.reasons.keys() == {"c3"}


def test_an_aggregate_that_is_refused_skips_the_round() -> None:
    """Parts that are harmless one by one."""
    sent = [update for client, update in updates(None).items() if client != "c3"]
    record = defense(None, behaviour=Said({AGGREGATE: 2.0})).assess(1, sent, start=START)
    assert record.skipped
    assert "the aggregate: behaviour: score 2" in record.note
    assert not record.accepted


def test_the_gate_closes_on_refusals_and_an_operators_word_is_not_asked_about() -> None:
    sent = [update for client, update in updates(None).items() if client != "c3"]
    everybody = dict.fromkeys(CLIENTS, 5.0)
    assert defense(None, behaviour=Said(everybody)).assess(1, sent, start=START).skipped
    opinion = Said(everybody)
    tested = defense(None, behaviour=opinion, min_mean_factor=0.1)
    tested.allow("c0", why="a field trial")
    record = tested.assess(1, sent, start=START)
    assert record.weights["c0"] == 1.0
    assert "c0" not in opinion.asked[0]
    with pytest.raises(EvidenceError, match="start="):
        tested.assess(2, sent)
    assert tested.round == 1
