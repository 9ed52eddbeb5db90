"""Levels trust nobody without evidence, move their cut with it, and refuse what is none."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit

from fedloop.defense.levels import (
    LEVELS,
    ClientLevel,
    CumulativeLevel,
    EvidenceLevel,
    Level,
    ShadowLevel,
    StepLevel,
    make_level,
)
from fedloop.errors import ConfigError, EvidenceError, StateError
from tests.helpers.levels_play import ALL, VARIANTS, ids, one_score, play

# --- missing evidence


@pytest.mark.parametrize("level", VARIANTS, ids=ids)
def test_a_wanted_client_without_scores_has_no_say_and_keeps_its_trust(level: Level) -> None:
    level = (
        replace(level, scored_rounds=20) if isinstance(level, StepLevel | ClientLevel) else level
    )
    good, both = [0.1] * (1 if one_score(level) else 3), {"a": 30, "b": 30}
    state = level.init()
    assert level.wanted(state, both) == {"a", "b"}
    factors, silent = level.update(state, {"a": good}, both)
    assert factors["b"] == 0.0 < factors["a"]
    assert silent["clients"].keys() == {"a"}
    for _ in range(2):
        assert level.wanted(silent, both) == {"a", "b"}
        factors, after = level.update(silent, {}, both)
        assert factors == {"a": 0.0, "b": 0.0}
        assert after["clients"] == silent["clients"]
        silent = after
    back, _ = level.update(silent, {"a": good, "b": good}, both)
    assert back["b"] == level.update(level.init(), {"b": good}, {"b": 30})[0]["b"]


@pytest.mark.parametrize(
    "level", [StepLevel(scored_rounds=2), ClientLevel(scored_rounds=2)], ids=ids
)
def test_after_the_scored_rounds_only_newcomers_are_scored_and_once(level: Level) -> None:
    state = level.init()
    for _ in range(2):
        assert level.wanted(state, "ab") == {"a", "b"}
        factors, state = level.update(state, {"a": [0.2, 0.3], "b": [0.9, 0.9]}, {"a": 10, "b": 10})
    assert level.wanted(state, "abc") == {"c"}
    late, state = level.update(state, {"a": [1.0, 1.0], "b": [0.0]}, {"a": 10, "b": 10, "c": 10})
    assert late == {**factors, "c": 0.0}  # scores of clients that were not wanted are not used
    assert level.wanted(state, "abc") == {"c"}  # still without trust
    _, state = level.update(state, {"c": [0.2, 0.3]}, {"c": 10})
    assert level.wanted(state, "abc") == set()
    final, _ = level.update(state, {}, {"a": 10, "b": 10, "c": 10})
    assert final["c"] > 0.8
    assert {client: final[client] for client in "ab"} == factors


def one(level: Level, state: dict[str, Any], score: float | None) -> tuple[float, dict[str, Any]]:
    factors, state = level.update(state, {} if score is None else {"a": [score]}, {"a": 10})
    return factors["a"], state


def test_a_missed_audit_costs_the_round_and_stays_due() -> None:
    level = EvidenceLevel(audit_interval=3)
    state, found = level.init(), []
    # three rounds to freeze, two free ones, four missed audits, and one that is passed
    for score in (0.1, 0.1, 0.1, None, None, None, None, None, None, 0.1):
        due = level.wanted(state, "a") == {"a"}
        factor, state = one(level, state, score)
        found.append((due, factor))
        if len(found) > 3:
            assert level.status(state) == {"a": "benign"}
    assert [due for due, _ in found] == [True] * 3 + [False] * 2 + [True] * 5
    assert [factor for _, factor in found[3:]] == [1.0] * 2 + [0.0] * 4 + [1.0]
    assert level.wanted(state, "a") == set()


def test_frozen_malicious_is_for_ever_unless_rehabilitation_is_on() -> None:
    rounds = [({"a": [score]}, {"a": 10}) for score in [0.9] * 3 + [0.1] * 40]
    for_ever, _, _ = play(EvidenceLevel(audit_interval=2), rounds)
    assert {factors["a"] for factors in for_ever} == {0.0}
    found, status, _ = play(EvidenceLevel(audit_interval=2, rehabilitation=3), rounds)
    # Audits at participations 2, 4, 6 after freezing; then open, with shadow factors, and benign
    # after three.
    assert [factors["a"] for factors in found[3:10]] == [0.0] * 6 + [1.0]
    expected = ["malicious"] * 6 + ["none"] * 3 + ["benign"]
    assert [verdicts["a"] for verdicts in status[2:12]] == expected


# --- the cumulative level


def test_the_cut_starts_at_the_threshold_and_goes_to_one_half() -> None:
    for threshold in (0.6, 0.8, 0.99):
        for shrink in (0.25, 0.5, 1.0):
            cuts = [CumulativeLevel(threshold, shrink).cut(rounds) for rounds in range(1, 200)]
            assert cuts[0] == threshold
            assert all(0.5 < after < before for before, after in pairwise(cuts))
            assert cuts[3] == pytest.approx(float(expit(logit(threshold) / 4**shrink)), abs=1e-15)
        fixed = CumulativeLevel(threshold, 0.0)
        assert {fixed.cut(rounds) for rounds in (1, 2, 1000)} == {threshold}
    assert CumulativeLevel(0.2).cut(4) == pytest.approx(1 - CumulativeLevel(0.8).cut(4))


def test_a_floor_is_where_the_cut_ends_and_one_half_is_none() -> None:
    level = CumulativeLevel(threshold=0.7, floor=0.1)
    cuts = [level.cut(rounds) for rounds in (1, 2, 4, 9, 10**12)]
    assert cuts[0] == 0.7
    assert cuts == sorted(cuts, reverse=True)
    halfway = expit(logit(0.1) + (logit(0.7) - logit(0.1)) / 2)
    assert cuts[2] == pytest.approx(float(halfway), abs=1e-12)
    assert cuts[-1] == pytest.approx(0.1, abs=1e-5)
    rising = CumulativeLevel(threshold=0.2, floor=0.4)
    assert rising.cut(100) > rising.cut(1)
    # Above the floor and below the threshold: rejected once enough rounds say the same.
    means = {"a": [float(expit(logit(0.1) + 1.2))]}
    factors = [played["a"] for played in play(level, [(means, {"a": 10})] * 8)[0]]
    assert factors[0] == 1.0
    assert factors[-1] == 0.0


def test_shrink_one_is_the_sequential_test() -> None:
    """Adding up log odds of independent rounds to the threshold's is cutting their mean."""
    rng = np.random.default_rng(0)
    sequential, fixed = CumulativeLevel(shrink=1.0), CumulativeLevel(shrink=0.0)
    agreed = differed = 0
    for _ in range(300):
        odds = rng.normal(0.2, 1, int(rng.integers(1, 12)))
        posterior, mean = expit(odds.sum()), float(expit(odds.mean()))
        if abs(odds.sum() - logit(0.8)) > 1e-9:
            agreed += (posterior >= 0.8) == (mean >= sequential.cut(len(odds)))
            differed += (posterior >= 0.8) != (mean >= fixed.cut(len(odds)))
    assert agreed == 300
    assert differed > 30  # negative control


def test_averaged_noise_is_flagged_equally_often_whatever_the_rounds() -> None:
    """Why shrink is one half: log odds of T rounds' mean without signal deviate by 1 / sqrt(T)."""
    rng = np.random.default_rng(1)
    noise = {t: expit(rng.normal(0, 1 / math.sqrt(t), 20_000)) for t in (1, 4, 25)}

    def flagged(shrink: float) -> dict[int, float]:
        level = CumulativeLevel(shrink=shrink)
        return {t: float(np.mean(scores >= level.cut(t))) for t, scores in noise.items()}

    assert flagged(0.5) == pytest.approx(dict.fromkeys(noise, flagged(0.5)[1]), abs=0.015)
    # Negative control: the sequential test's prior does not hold for repeated looks at noise alone.
    assert flagged(1.0)[25] > 3 * flagged(1.0)[1]


def test_graded_levels_do_not_jump_at_the_cut() -> None:
    for level in (CumulativeLevel(graded=True), ShadowLevel(graded=True), StepLevel(graded=True)):
        below, above = (one(level, level.init(), 0.8 + d)[0] for d in (-1e-6, 1e-6))
        assert abs(below - above) < 1e-4
        hard = replace(level, graded=False)
        below, above = (one(hard, hard.init(), 0.8 + d)[0] for d in (-1e-6, 1e-6))
        assert abs(below - above) > 0.5
    share, _ = ShadowLevel(graded=True).update(ShadowLevel().init(), {"a": [0.0, 0.2]}, {"a": 10})
    assert share["a"] == pytest.approx(0.9**7)


# --- errors


@pytest.mark.parametrize(
    ("scores", "examples", "message"),
    [
        ({"a": [1.0000001]}, {"a": 1}, "'a'.*to 1"),
        ({"a": [-0.1]}, {"a": 1}, "'a'.*from -0.1"),
        ({"a": [float("nan")]}, {"a": 1}, "'a'.*not finite"),
        ({"a": [float("inf")]}, {"a": 1}, "'a'.*not finite"),
        ({"a": []}, {"a": 1}, r"'a'.*\(0,\)"),
        ({"a": 0.5}, {"a": 1}, r"'a'.*shape \(\)"),
        ({"a": [[0.5]]}, {"a": 1}, r"'a'.*\(1, 1\)"),
        ({"a": ["0.5"]}, {"a": 1}, "'a'.*type"),
        ({"a": [None]}, {"a": 1}, "'a'.*object"),
        ({"a": [True]}, {"a": 1}, "'a'.*bool"),
        ({"a": [[0.1], [0.1, 0.2]]}, {"a": 1}, "'a'.*no array"),
        ({"b": [0.5]}, {"a": 1}, r"\['b'\].*num_examples"),
        ({"a": [0.5]}, {"a": 0}, "'a'.*0.*positive"),
        ({"a": [0.5]}, {"a": -3}, "'a'.*-3"),
        ({"a": [0.5]}, {"a": 1.5}, "'a'.*1.5"),
        ({"a": [0.5]}, {"a": 2**53 + 1}, "'a'.*2\\*\\*53"),
        ({"a": [0.5]}, {"a": 1, "b": None}, "'b'.*None"),
        ({3: [0.5]}, {3: 1}, "3.*string"),
    ],
)
@pytest.mark.parametrize("level", ALL, ids=ids)
def test_evidence_that_is_none_is_refused(
    level: Level, scores: Any, examples: Any, message: str
) -> None:
    state = level.init()
    with pytest.raises(EvidenceError, match=message):
        level.update(state, scores, examples)
    assert state == level.init()


@pytest.mark.parametrize("level", [level for level in VARIANTS if one_score(level)], ids=ids)
def test_several_scores_where_there_is_one_are_refused(level: Level) -> None:
    with pytest.raises(EvidenceError, match="'a': got 2 scores; expected 1"):
        level.update(level.init(), {"a": [0.5, 0.5]}, {"a": 1})


@pytest.mark.parametrize("level", ALL, ids=ids)
def test_the_state_of_another_level_is_refused(level: Level) -> None:
    for other in (*(other.init() for other in ALL if other != level), {}, None, []):
        with pytest.raises(StateError, match=level.name):
            level.update(other, {"a": [0.5]}, {"a": 1})


NOT_IN_UNIT = [0, 1, -0.1, 1.1, float("nan"), "0.8", None, True]
BAD = {
    "threshold": NOT_IN_UNIT,
    "decay": [-0.1, 1.1, float("nan"), "1", None, True],
    "sharpness": [0, -1, float("nan"), float("inf"), None],
    "exponent": [0, -1, float("nan"), float("inf"), "7", True],
    "floor": NOT_IN_UNIT,
    "watch": NOT_IN_UNIT,
    "gap": [0, -1, float("nan"), float("inf"), "1", True],
    "shrink": [-0.1, float("nan"), float("inf"), None],
    "scored_rounds": [-1, 1.0, None, True],
    "min_evidence": [0, 1.0, None, True],
    "audit_interval": [0, -1, 2.5],
    "examples_per_step": [0, -1, 1.5, True],
    "rehabilitation": [0, -1, 1.5, True],
    "sketch": [0, 1.5, True],
    "sketch_seed": [-1, 0.5, None],
    "graded": [1, None, "yes"],
    "relative": [0, None],
    "normalize": [1, None],
    "evidence": ["last_step", "", None, ["shadow_gradient"]],
}


@pytest.mark.parametrize("level", ALL, ids=ids)
def test_every_field_is_checked(level: Level) -> None:
    for field in fields(level):
        for value in BAD[field.name]:
            with pytest.raises(
                ConfigError, match=rf"{type(level).__name__}\.{field.name}: got .*; expected ."
            ):
                make_level(level.name, **{field.name: value})


def test_an_unknown_level_or_field_names_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"'steps'.*step, client, shadow, evidence, cumulative"):
        make_level("steps")
    with pytest.raises(ConfigError, match=r"'treshold'.*threshold, sharpness, scored_rounds"):
        make_level("client", treshold=0.8)
    with pytest.raises(ConfigError, match="'evidence'"):
        make_level("step", evidence="last_step")
    assert make_level("step", decay=0.5) == StepLevel(decay=0.5)
    assert {name: level.name for name, level in LEVELS.items()} == {name: name for name in LEVELS}


@pytest.mark.parametrize("rounds", [0, -1, 1.5, None, True])
def test_there_is_no_cut_before_the_first_score(rounds: Any) -> None:
    with pytest.raises(EvidenceError, match="rounds"):
        CumulativeLevel().cut(rounds)
