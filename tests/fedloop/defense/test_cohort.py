"""Clients that stand apart from the round's others, and what a probe says of its own use."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloop.defense.cumulative import CumulativeLevel, edge_of_cohort
from fedloop.defense.defense import Defense
from fedloop.defense.levels import ClientLevel
from fedloop.defense.parts import level_for
from fedloop.errors import ConfigError
from loraprobe import Probe
from tests.helpers import probes
from tests.helpers.federated import updates

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=12)
APART = CumulativeLevel(gap=2.0, watch=0.05)


def played(level: CumulativeLevel, scores: dict[str, float]) -> tuple[dict[str, float], Any]:
    return level.update(
        level.init(), {c: [s] for c, s in scores.items()}, dict.fromkeys(scores, 10)
    )


@pytest.mark.parametrize(
    ("scores", "edge"),
    [
        ([0.01, 0.01, 0.02, 0.4, 0.5], 0.4),  # two of five, far below the cut
        ([0.01, 0.01, 0.02, 0.4, 0.9999], 0.4),  # the widest gap is not what hides the rest
        ([0.01, 0.02, 0.4, 0.4, 0.4], None),  # the larger half: nobody can say which is honest
        ([0.01, 0.02, 0.4, 0.4], 0.4),  # half
        ([1e-5, 1e-5, 1e-5, 0.02], None),  # apart, and yet below what is watched
        ([0.01, 0.02, 0.04, 0.08], None),  # a slope
        ([0.01, 0.9], None),  # of two nobody can say who is apart
        ([], None),
        ([0.0, 0.0, 1.0], 1.0),
    ],
)
def test_who_stands_apart(scores: list[float], edge: float | None) -> None:
    shuffled = random.Random(0).sample(scores, len(scores))
    assert edge_of_cohort(shuffled, gap=2.0, watch=0.05) == edge


@given(SCORES)
def test_at_most_half_stands_apart_and_a_gap_only_ever_rejects_more(scores: list[float]) -> None:
    named = {f"c{number}": score for number, score in enumerate(scores)}
    factors, state = played(APART, named)
    alone, _ = played(CumulativeLevel(), named)
    assert all(factors[client] <= alone[client] for client in named)
    edge = state["edge"]
    if edge is not None:
        assert sum(score >= edge for score in scores) <= len(scores) / 2
        assert {c for c in named if factors[c] < alone[c]} <= {c for c in named if named[c] >= edge}


def test_nobody_is_compared_without_a_gap() -> None:
    factors, state = played(CumulativeLevel(), {"a": 0.01, "b": 0.01, "c": 0.7})
    assert set(factors.values()) == {1.0}
    assert "edge" not in state


def probe_saying(**fields: Any) -> Probe:
    return probes.tiny_probe("linear", "all_b").with_facts(cumulative=fields)


def test_a_record_says_the_cut_that_the_cohort_made() -> None:
    defense = Defense(probe_saying(gap=1e-6, watch=1e-6), "cumulative")
    record = defense.assess(1, list(updates(defense.level).values())).record()
    scores = {client: values[-1] for client, values in record.scores.items()}
    edge = edge_of_cohort(list(scores.values()), 1e-6, 1e-6)
    assert edge is not None
    out = {client for client, score in scores.items() if score >= edge}
    assert {client for client, factor in record.factors.items() if not factor} == out
    assert all(record.cuts[client] <= edge for client in scores)
    assert f"the cut is {min(record.cuts.values()):.3f}" in defense.explain(min(out)).reason
    restored = Defense(probe_saying(gap=1e-6, watch=1e-6), "cumulative")
    restored.load_state_dict(defense.state_dict())
    assert restored.state_dict() == defense.state_dict()


def test_a_level_by_name_is_as_the_probe_says_and_an_object_as_it_is() -> None:
    told = probe_saying(threshold=0.97, floor=0.8, gap=3.0, watch=0.1)
    level = Defense(told, "cumulative").level
    assert isinstance(level, CumulativeLevel)
    assert (level.threshold, level.floor, level.gap, level.watch) == (0.97, 0.8, 3.0, 0.1)
    assert Defense(told, CumulativeLevel()).level == CumulativeLevel()
    assert Defense(told, "client").level == ClientLevel()


@pytest.mark.parametrize("facts", [{"gap": -1}, {"graded": True}, {"threshold": "0.9"}])
def test_a_probe_that_says_nonsense_of_its_use_is_refused_or_overruled(
    facts: dict[str, Any],
) -> None:
    probe = probe_saying(**facts)
    with pytest.raises(ConfigError, match=r"the probe's facts.*got .*expected.*or give all of"):
        Defense(probe, "cumulative")
    given = {"threshold": 0.7, "floor": 0.6, "gap": 1.0, "watch": 0.1}
    assert level_for(probe, "cumulative", given) == CumulativeLevel(**given)
