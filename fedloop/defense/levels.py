"""Levels: from a client's scores, P(malicious), to its security factor in [0, 1].

A level is a frozen set of hyper-parameters with four functions of a state:

    state = level.init()
    due = level.wanted(state, clients)                              # whom to score this round
    factors, state = level.update(state, scores, num_examples)      # scores: client -> (n_steps,)
    level.status(state)                                             # standing verdicts

The state is plain data (it survives JSON unchanged), counts rounds and is never changed in place.
All is keyed by client id; no result depends on the order of a mapping. A client that was wanted and
has no scores gets factor 0 in this round and keeps its trust as it was (the official code trusts
it). One that was not wanted keeps its last factor; scores given for it are checked and not used.

Threat model: shadow and step deltas but the last, and gradients, come out of the client's own
trainer: a dishonest client can forge them unless the server recomputes them. The last step and the
update's features are what it submitted.

Source: arXiv:2601.07177, and its official code for what the paper leaves open; `CumulativeLevel` is
ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from numpy.typing import ArrayLike

from ..checks import named
from .accumulate import FeatureMean
from .cumulative import CumulativeLevel
from .paper_levels import ClientLevel, EvidenceLevel, ShadowLevel, StepLevel
from .trust import (
    LAST_STEP,
    LOCAL_STEPS,
    SHADOW_GRADIENT,
    SHADOW_STEPS,
    UPDATE_FEATURES,
    Evidence,
    State,
)

__all__ = [
    "LAST_STEP",
    "LEVELS",
    "LOCAL_STEPS",
    "SHADOW_GRADIENT",
    "SHADOW_STEPS",
    "UPDATE_FEATURES",
    "ClientLevel",
    "CumulativeLevel",
    "Evidence",
    "EvidenceLevel",
    "Level",
    "ShadowLevel",
    "StepLevel",
    "make_level",
]


@runtime_checkable
class Level(Protocol):
    """What a `Defense` needs of a level; the five of this project have it."""

    @property
    def name(self) -> str:
        """In `LEVELS`."""

    @property
    def evidence(self) -> Evidence:
        """What it reads."""

    @property
    def threshold(self) -> float:
        """The score that speaks for malicious, in (0, 1)."""

    @property
    def accumulator(self) -> FeatureMean | None:
        """What averages features over rounds before they are scored; None to score each step."""

    def init(self) -> State:
        """The state before the first round."""

    def wanted(self, state: State, clients: Iterable[str]) -> set[str]:
        """Which of the coming round's clients have to be scored."""

    def update(
        self, state: State, scores: Mapping[str, ArrayLike], num_examples: Mapping[str, int]
    ) -> tuple[dict[str, float], State]:
        """Play one round: client -> factor, and the next state."""

    def status(self, state: State) -> dict[str, str]:
        """Client -> standing verdict, of a level that has any."""


LEVELS: Mapping[
    str, type[StepLevel | ClientLevel | ShadowLevel | EvidenceLevel | CumulativeLevel]
] = {
    "step": StepLevel,
    "client": ClientLevel,
    "shadow": ShadowLevel,
    "evidence": EvidenceLevel,
    "cumulative": CumulativeLevel,
}


def make_level(name: str, /, **values: Any) -> Level:
    """The level of this name, with these fields set and the paper's constants for the others.

    Raises:
        ConfigError: no such level or field (the message lists the valid ones), or a value that is
            not valid.
    """
    return named("level", name, LEVELS, values)


def cut_of(level: Level | None, client: str, state: Mapping[str, Any]) -> float:
    """The score from which a level took this round's evidence to speak against a client.

    Args:
        state: the level's after the round.
    """
    if isinstance(level, CumulativeLevel):
        cut = level.cut(state["clients"][client]["rounds"])
        return min(cut, state.get("edge") or cut)  # an edge is never 0
    return level.threshold if level else 1.0
