"""Levels, random rounds and how to play them, for the tests of levels."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np

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

Scores = dict[str, list[float]]
Round = tuple[Scores, dict[str, int]]  # scores, num_examples

ALL = [make_level(name) for name in LEVELS]
VARIANTS = [
    *ALL,
    StepLevel(graded=True, scored_rounds=4),
    StepLevel(decay=0.5, threshold=0.3, examples_per_step=7),
    ClientLevel(threshold=0.4, sharpness=3, scored_rounds=3),
    ShadowLevel(graded=True, exponent=2.5),
    ShadowLevel(evidence="shadow_gradient", threshold=0.5),
    EvidenceLevel(threshold=0.5, audit_interval=2, rehabilitation=2),
    EvidenceLevel(threshold=0.5, min_evidence=1, audit_interval=1, rehabilitation=1, graded=True),
    EvidenceLevel(threshold=0.6, min_evidence=2, audit_interval=3, examples_per_step=9),
    CumulativeLevel(graded=True),
    CumulativeLevel(threshold=0.6, shrink=1.0),
]


def ids(level: Level) -> str:
    changed = [
        f"{f.name}={getattr(level, f.name)}"
        for f in fields(level)
        if getattr(level, f.name) != f.default
    ]
    return ",".join([level.name, *changed])


def one_score(level: Level) -> bool:
    return level.evidence in ("shadow_gradient", "update_features")


def play(
    level: Level, rounds: list[Round]
) -> tuple[list[dict[str, float]], list[dict[str, str]], dict[str, Any]]:
    """Factors and status of every round and the last state.

    The state goes through JSON in between.
    """
    state, factors, status = level.init(), [], []
    for scores, examples in rounds:
        found, state = level.update(state, scores, examples)
        state = json.loads(json.dumps(state, allow_nan=False))
        factors.append(found)
        status.append(level.status(state))
    return factors, status, state


def federation(level: Level, seed: int, rounds: int = 30, missing: float = 0.15) -> list[Round]:
    """Random rounds: benign, mixed and malicious clients that take part now and then and at times
    send no evidence. A score near the threshold is the threshold.
    """

    def snapped(scores: np.ndarray) -> list[float]:
        near = (abs(scores - level.threshold) < 0.05) & (level.name != "cumulative")
        return np.where(near, level.threshold, scores).tolist()

    rng = np.random.default_rng(seed)
    centre = {f"c{i}": rng.choice([0.1, 0.1, 0.5, 0.97]) for i in range(8)}
    played: list[Round] = []
    for _ in range(rounds):
        clients = [client for client in centre if rng.random() < 0.7] or ["c0"]
        steps = 1 if one_score(level) else int(rng.integers(1, 6))
        scores = {
            c: snapped(np.clip(rng.normal(centre[c], 0.25, steps), 0, 1))
            for c in clients
            if rng.random() >= missing
        }
        played.append((scores, {c: int(rng.integers(1, 100)) for c in clients}))
    return played
