"""Levels agree with recorded official runs and with their slow definitions."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit

from fedloop.defense.levels import (
    ClientLevel,
    CumulativeLevel,
    EvidenceLevel,
    Level,
    ShadowLevel,
    StepLevel,
    make_level,
)
from fedloop.defense.weights import aggregation_weights
from tests.helpers.levels_play import VARIANTS, federation, ids, one_score, play

# --- recorded runs


def recorded(vectors: Path, number: int) -> tuple[Level, dict[str, Any]]:
    run = json.loads((vectors / "levels.json").read_text())[number]
    shadow = {"exponent": "shadow_exponent", "examples_per_step": "examples_per_step"}
    called = {
        "step": {"decay": "decay", "examples_per_step": "examples_per_step"},
        "client": {"sharpness": "sigmoid_k"},
        "shadow": shadow,
        "evidence": {**shadow, "min_evidence": "evidence_min", "audit_interval": "audit_interval"},
    }
    name = run["level"].removesuffix("-level")
    constants = {field: run[theirs] for field, theirs in called[name].items()}
    return make_level(name, threshold=run["threshold"], **constants), run


def worst(level: Level, run: dict[str, Any]) -> float:
    """Largest difference in effective examples; infinite if a skip or a status differs."""
    rounds = [(entry["step_probabilities"], entry["num_examples"]) for entry in run["rounds"]]
    found, status, _ = play(level, rounds)
    largest = 0.0
    for factors, verdicts, entry in zip(found, status, run["rounds"], strict=True):
        skipped = aggregation_weights(factors, entry["num_examples"], run["skip_below"]) is None
        if skipped != entry["skipped"] or not entry.get("status", {}).items() <= verdicts.items():
            return math.inf
        for client, effective in entry["effective_examples"].items():
            counted = 0.0 if skipped else factors[client] * entry["num_examples"][client]
            largest = max(largest, abs(counted - effective))
    return largest


@pytest.mark.parametrize("number", range(12))
def test_the_official_run_is_reproduced(vectors: Path, number: int) -> None:
    level, run = recorded(vectors, number)
    assert worst(level, run) < 1e-9
    assert worst(make_level(level.name), run) < 1e-9  # the defaults are the official constants


OTHER_CONSTANTS = {
    "step": [{"decay": 0.9}, {"threshold": 0.7}],
    "client": [{"sharpness": 9.0}, {"threshold": 0.7}],
    "shadow": [{"exponent": 6}, {"threshold": 0.7}, {"graded": True}],
    "evidence": [{"min_evidence": 2}, {"audit_interval": 4}, {"graded": True}],
}


@pytest.mark.parametrize("number", [0, 3, 6, 9])
def test_another_constant_does_not_reproduce_it(vectors: Path, number: int) -> None:
    level, run = recorded(vectors, number)
    for other in OTHER_CONSTANTS[level.name]:
        assert worst(replace(level, **other), run) > 1e-3, other


# --- slow definitions


def slow_share(level: Any, scores: list[float], n: int) -> float:
    flagged = sum(scores) if level.graded else sum(1 for s in scores if s >= level.threshold)
    per_step = n / len(scores) if level.examples_per_step is None else level.examples_per_step
    return min(n, flagged * per_step) / n


def slow_doubt(level: ClientLevel, s: float) -> float:
    if s <= level.threshold:
        return float(0.5 * expit(level.sharpness * (s / level.threshold - 0.5)))
    return float(
        0.5 + 0.5 * expit(level.sharpness * ((s - level.threshold) / (1 - level.threshold) - 0.5))
    )


# round from 1, scores or None, examples; one client's participations in order
Part = tuple[int, list[float] | None, int]


def slow_step(level: StepLevel, parts: list[Part]) -> tuple[float, str]:
    used: list[tuple[float, int]] = []
    for number, scores, n in parts:
        if number <= level.scored_rounds or not used:
            if scores is None:
                factor = 0.0
                continue
            used.append((slow_share(level, scores, n), n))
        last = len(used)
        alpha = level.decay**last + sum(
            level.decay ** (last - 1 - i) * n * (1 - r) for i, (r, n) in enumerate(used)
        )
        beta = level.decay**last + sum(
            level.decay ** (last - 1 - i) * n * r for i, (r, n) in enumerate(used)
        )
        factor = alpha / (alpha + beta)
    return factor, ""


def slow_client(level: ClientLevel, parts: list[Part]) -> tuple[float, str]:
    used: list[float] = []
    for number, scores, _ in parts:
        if number <= level.scored_rounds or not used:
            if scores is None:
                factor = 0.0
                continue
            used.append(1 - slow_doubt(level, scores[-1]))
        factor = sum(used) / len(used)
    return factor, ""


def slow_shadow(level: ShadowLevel, parts: list[Part]) -> tuple[float, str]:
    _, scores, n = parts[-1]
    return (0.0 if scores is None else (1 - slow_share(level, scores, n)) ** level.exponent), ""


def slow_evidence(level: EvidenceLevel, parts: list[Part]) -> tuple[float, str]:
    status, frozen, seen, waited, clean = "none", 0.0, [], 0, 0
    for _, scores, n in parts:
        if status != "none":
            audited = status == "benign" or level.rehabilitation is not None
            if not audited or waited + 1 < level.audit_interval:
                waited, factor = waited + 1, frozen
                continue
            if scores is None:
                factor = 0.0
                continue
            waited, benign, factor = 0, scores[-1] < level.threshold, frozen
            clean = clean + 1 if benign else 0
            if (status == "benign" and not benign) or (
                status == "malicious" and clean == level.rehabilitation
            ):
                status, seen, factor = "none", [], 0.0
            continue
        if scores is None:
            factor = 0.0
            continue
        factor = (1 - slow_share(level, scores, n)) ** level.exponent
        seen.append((factor, scores[-1] < level.threshold))
        if len(seen) == level.min_evidence:
            if all(benign for _, benign in seen):
                status, frozen = "benign", sum(f for f, _ in seen) / len(seen)
                factor = frozen
            elif not any(benign for _, benign in seen):
                status, frozen, factor = "malicious", 0.0, 0.0
            seen, waited, clean = [], 0, 0
    return factor, status


def slow_cumulative(level: CumulativeLevel, parts: list[Part]) -> tuple[float, str]:
    _, scores, _ = parts[-1]
    if scores is None:
        return 0.0, ""
    rounds = sum(past is not None for _, past, _ in parts)
    cut = float(expit(logit(level.threshold) / rounds**level.shrink))
    return (0.0 if scores[0] >= cut else 1 - scores[0] / cut if level.graded else 1.0), ""


SLOW: dict[str, Callable[[Any, list[Part]], tuple[float, str]]] = {
    "step": slow_step,
    "client": slow_client,
    "shadow": slow_shadow,
    "evidence": slow_evidence,
    "cumulative": slow_cumulative,
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("level", VARIANTS, ids=ids)
def test_factors_are_the_definition(level: Level, seed: int) -> None:
    rounds = federation(level, seed)
    found, status, _ = play(level, rounds)
    history: dict[str, list[Part]] = {}
    for number, (scores, examples) in enumerate(rounds, start=1):
        assert found[number - 1].keys() == examples.keys()
        for client, n in examples.items():
            history.setdefault(client, []).append((number, scores.get(client), n))
            factor, verdict = SLOW[level.name](level, history[client])
            assert found[number - 1][client] == pytest.approx(factor, rel=1e-10, abs=1e-12), (
                number,
                client,
            )
            assert 0 <= found[number - 1][client] <= 1
            if level.name == "evidence":
                assert status[number - 1].get(client, "none") == verdict
            else:
                assert status[number - 1] == {}


def test_the_random_rounds_reach_every_verdict() -> None:
    """Negative control of the test above: it is not the idle branches that agree."""
    turns = set()
    for level in VARIANTS:
        if level.name == "evidence":
            for seed in range(4):
                _, status, _ = play(level, federation(level, seed))
                turns |= {(before.get(c), now[c]) for before, now in pairwise(status) for c in now}
    assert turns >= {
        ("none", "benign"),
        ("none", "malicious"),
        ("benign", "none"),
        ("malicious", "none"),
        ("malicious", "malicious"),
    }


# --- theorems


@pytest.mark.parametrize("level", [ShadowLevel(), EvidenceLevel(), CumulativeLevel()], ids=ids)
def test_all_benign_is_full_trust(level: Level) -> None:
    rng = np.random.default_rng(0)
    highest = 0.49 if one_score(level) else 0.79  # below every cut
    steps = 1 if one_score(level) else 4
    rounds = [
        ({c: rng.uniform(0, highest, steps).tolist() for c in "abc"}, dict.fromkeys("abc", 64))
        for _ in range(12)
    ]
    found, _, _ = play(level, rounds)
    assert all(factors == dict.fromkeys("abc", 1.0) for factors in found)
    poisoned = [
        ({**scores, "b": [0.99] * len(scores["b"])}, examples) for scores, examples in rounds
    ]
    assert all(factors == {"a": 1.0, "b": 0.0, "c": 1.0} for factors in play(level, poisoned)[0])


@pytest.mark.parametrize("level", VARIANTS, ids=ids)
def test_clients_permute_factors_to_the_last_bit(level: Level) -> None:
    rounds = federation(level, 7)
    clients = sorted({client for _, examples in rounds for client in examples})
    shuffled = np.random.default_rng(7).permutation(clients).tolist()
    renamed = dict(zip(clients, shuffled, strict=True))

    def mixed(values: dict[str, Any]) -> dict[str, Any]:
        return {renamed[client]: value for client, value in values.items()}

    found, status, _ = play(level, rounds)
    other, other_status, _ = play(level, [(mixed(s), mixed(n)) for s, n in rounds])
    assert other == [mixed(factors) for factors in found]
    assert other_status == [mixed(verdicts) for verdicts in status]
    assert other != found  # negative control


@pytest.mark.parametrize("level", VARIANTS, ids=ids)
def test_higher_scores_never_earn_more_in_the_first_round(level: Level) -> None:
    steps = 1 if one_score(level) else 3
    factors = [
        level.update(level.init(), {"a": [s] * steps}, {"a": 15})[0]["a"]
        for s in np.linspace(0, 1, 41)
    ]
    assert all(high >= low for high, low in pairwise(factors))
    assert factors[0] > 0.9
    assert factors[-1] < 0.1


def test_overstated_examples_dilute_flagged_steps_only_if_a_step_has_a_fixed_size() -> None:
    def factor(level: Level, n: int) -> float:
        return level.update(level.init(), {"a": [0.9] * 4}, {"a": n})[0]["a"]

    fixed = ShadowLevel(examples_per_step=16)
    assert factor(ShadowLevel(), 64) == factor(ShadowLevel(), 10**6) == factor(fixed, 64) == 0.0
    assert factor(fixed, 10**6) > 0.999


@pytest.mark.parametrize("level", VARIANTS, ids=ids)
def test_the_state_is_plain_and_not_changed(level: Level) -> None:
    state = level.init()
    for number, (scores, examples) in enumerate(federation(level, 10), start=1):
        before = copy.deepcopy(state)
        asked = copy.deepcopy((scores, examples))
        _, after = level.update(state, {c: np.array(s) for c, s in scores.items()}, examples)
        level.wanted(state, examples)
        level.status(state)
        assert state == before
        assert (scores, examples) == asked
        assert json.loads(json.dumps(after, allow_nan=False)) == after
        assert after["round"] == number
        state = after
