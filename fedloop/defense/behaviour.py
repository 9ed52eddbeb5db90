"""A veto on top of a level: what an update does, beside what its weights look like.

Whatever it says, it can only take weight away. It fails closed: a client of whom it says nothing,
or nothing finite, does not count, and neither does a round whose aggregate it refuses: parts that
look harmless alone are heard together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta
from loraprobe.adapters.pair import LoRAPair

from ..checks import is_number
from ..errors import ConfigError, EvidenceError
from .weighing import Weighed

AGGREGATE = "aggregate"  # it is read alone, so no client is confused with it


class SecondOpinion(Protocol):
    """What a `Defense` needs of it; `fedloop.measure.behaviour.Behaviour` is one."""

    @property
    def cut(self) -> float:
        """The score from which an update is refused."""

    def read(
        self, round: int, start: Adapter, changed: Mapping[str, Adapter]
    ) -> Mapping[str, float]:
        """Name -> score of an adapter, kind "weights", against the round's start; NaN for none."""


def checked_opinion(opinion: Any) -> SecondOpinion | None:
    """A second opinion or None as it is; raise ConfigError for anything else."""
    if opinion is not None and not (
        is_number(getattr(opinion, "cut", None)) and callable(getattr(opinion, "read", None))
    ):
        raise ConfigError(
            f"behaviour: got {opinion!r}; expected an object with a finite `cut` and a method"
            " `read`, such as fedloop.measure.behaviour.Behaviour(model, tokenizer,"
            " Prompts.read(path), cut)"
        )
    return opinion  # type: ignore[no-any-return]


def refused(
    opinion: SecondOpinion, round: int, start: Adapter | None, deltas: Mapping[str, Adapter]
) -> dict[str, str]:
    """Who is refused, and why.

    Args:
        start: the round's global LoRA.
        deltas: name -> its change of factors.

    Raises:
        EvidenceError: there is no start.
    """
    if start is None:
        raise EvidenceError(
            "a second opinion puts updates on the model; give assess() the round's global LoRA as"
            " start="
        )
    changed = {name: add_delta(start, delta) for name, delta in deltas.items()}
    scores = opinion.read(round, start, changed)
    reasons = {}
    for name in deltas:
        score = float(scores.get(name, math.nan))
        if not math.isfinite(score):
            reasons[name] = "behaviour: it could not be read, which is no evidence of innocence"
        elif score >= opinion.cut:
            reasons[name] = f"behaviour: score {score:.3g}; the cut is {opinion.cut:.3g}"
    return reasons


def weighted_mean(weights: Mapping[str, float], deltas: Mapping[str, Adapter]) -> Adapter:
    """The mean of changes of factors, A and B apart, of the clients with a weight."""
    first, *rest = [(deltas[client], w) for client, w in weights.items() if w > 0]
    pairs = {}
    for module, pair in first[0].items():
        A, B = (first[1] * np.asarray(m, np.float64) for m in (pair.A, pair.B))
        for delta, weight in rest:
            A += weight * np.asarray(delta[module].A, np.float64)
            B += weight * np.asarray(delta[module].B, np.float64)
        pairs[module] = LoRAPair(A.astype(np.float32), B.astype(np.float32), pair.scaling)
    return Adapter(pairs, kind=first[0].kind, base_model=first[0].base_model)


def reweighed(
    opinion: SecondOpinion,
    round: int,
    start: Adapter | None,
    weighed: Weighed,
    deltas: Mapping[str, Adapter],
    allowed: Mapping[str, str],
    again: Callable[[Mapping[str, str]], Weighed],
) -> tuple[Weighed, dict[str, str]]:
    """A round without those who are refused, none at all if its aggregate is; and who they are.

    Args:
        weighed: the round as the level has it.
        deltas: client -> its change of factors.
        allowed: clients that nobody asks about.
        again: weighs the round without these clients.

    Raises:
        EvidenceError: there is no start.
    """
    if weighed.weights is None:
        return weighed, {}
    counting = [client for client, weight in weighed.weights.items() if weight > 0]
    suspects = {client: deltas[client] for client in counting if client not in allowed}
    bad = refused(opinion, round, start, suspects)
    if bad:
        weighed = again(bad)
        weighed = weighed._replace(reasons={**weighed.reasons, **bad})
    return (
        together(
            weighed,
            deltas,
            lambda mean: refused(opinion, round, start, {AGGREGATE: mean}).get(AGGREGATE, ""),
        ),
        bad,
    )


def together(
    weighed: Weighed, deltas: Mapping[str, Adapter], why_not: Callable[[Adapter], str]
) -> Weighed:
    """The round, or a skipped one where there is a reason against the weighted mean of it."""
    if weighed.weights is None:
        return weighed
    why = why_not(weighted_mean(weighed.weights, deltas))
    return weighed._replace(weights=None, note=f"skipped: the aggregate: {why}") if why else weighed
