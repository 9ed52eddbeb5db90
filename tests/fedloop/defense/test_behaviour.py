"""A second opinion can only take weight away, and what it cannot read counts nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from fedloop.defense.behaviour import AGGREGATE, weighted_mean
from fedloop.errors import ConfigError, EvidenceError
from loraprobe.adapters.adapter import Adapter
from tests.fedloop.defense.test_defense import defense
from tests.helpers import probes
from tests.helpers.federated import CLIENTS, LEVELS, mapped, updates

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


@pytest.mark.parametrize("name", ["client", "cumulative"])
def test_parts_that_pass_one_by_one_are_scored_together(name: str) -> None:
    """Malicious updates under noise that cancels: each is trusted, their mean is not."""
    level = LEVELS[name]
    bad = updates(level, 1, malicious=("c0",))["c0"]
    rng = torch.Generator().manual_seed(0)
    noise = mapped(bad.adapter, lambda t: t.std() * torch.randn(t.shape, generator=rng))
    parts = [
        replace(bad, client_id=client, adapter=plus(bad.adapter, noise, sign), steps=())
        for client, sign in (("x", 8.0), ("y", -8.0))
    ]
    if level.evidence == "last_step":
        parts = [replace(part, steps=(part.adapter,)) for part in parts]
    apart = defense(level).assess(1, parts)
    assert not apart.skipped
    assert min(apart.factors.values()) > 0.4
    whole = defense(level, score_aggregate=True).assess(1, parts)
    assert whole.skipped
    assert "the aggregate: score" in whole.note
    honest = list(updates(level, 1).values())
    kept = defense(level, score_aggregate=True).assess(1, honest)
    assert kept.weights == defense(level).assess(1, honest).weights
    with pytest.raises(ConfigError, match="score_aggregate"):
        defense(None, score_aggregate=True)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"behaviour": value} for value in ("prompts.jsonl", 3, Said({}, math.nan))),
        *({"score_aggregate": value} for value in ("yes", 1, None)),
        {"layout": "x"},
    ],
)
def test_what_is_no_part_of_a_defence_is_refused_when_it_is_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        defense(LEVELS["client"], **wrong)


def plus(one: Adapter, other: Adapter, times: float) -> Adapter:
    return weighted_mean(
        {"one": 1.0, "other": 1.0}, {"one": one, "other": mapped(other, lambda t: times * t)}
    )
