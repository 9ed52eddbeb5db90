"""What levels share: the state that they keep of every client, and a round of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import Checked
from ..errors import StateError
from .weights import checked_examples, checked_scores

Evidence = Literal["local_steps", "last_step", "shadow_steps", "shadow_gradient", "update_features"]
"""What a level reads; whoever calls it brings the scores of exactly this."""

# Every local step of the round, since the round's global LoRA.
LOCAL_STEPS: Final = "local_steps"
# The last local step only, which is the submitted update.
LAST_STEP: Final = "last_step"
# Every step of the same examples trained again from the fixed initial LoRA.
SHADOW_STEPS: Final = "shadow_steps"
# One gradient at that initial LoRA, averaged over rounds: one score.
SHADOW_GRADIENT: Final = "shadow_gradient"
# Features of the submitted update, averaged over rounds: one score.
UPDATE_FEATURES: Final = "update_features"

State = dict[str, Any]
"""{"level": name, "round": rounds so far, "clients": {client: trust}}"""

Trust = dict[str, Any]
"""{"factor": the last one, "since": participations since the last score}, and the level's own"""

Scores = NDArray[np.float64]


class Judge(Protocol):
    """What a round needs of a level."""

    @property
    def name(self) -> str:
        """In `LEVELS`."""

    @property
    def evidence(self) -> Evidence:
        """What it reads."""

    def wanted(self, state: State, clients: Iterable[str]) -> set[str]:
        """Which of the coming round's clients have to be scored."""

    def judge(self, trust: Trust | None, scores: Scores, examples: int) -> Trust:
        """A client's trust after its scores (n_steps,) of a round; None before the first."""


def check_state(name: str, state: State) -> None:
    """Whether a state is one of the level of this name.

    Raises:
        StateError: it is not.
    """
    if not isinstance(state, dict) or state.get("level") != name:
        got = state.get("level") if isinstance(state, dict) else state
        raise StateError(
            f"got a state of {got!r}; expected one of the {name} level, as init() or update()"
            " returned it"
        )


class Judging(Checked):
    """A level whose rounds are `judge`'d client by client.

    Everybody is scored in every round, and no verdict stands, unless a level says otherwise.
    """

    name: ClassVar[str]

    def init(self) -> State:
        """The state before the first round."""
        return {"level": self.name, "round": 0, "clients": {}}

    def wanted(self, state: State, clients: Iterable[str]) -> set[str]:
        """Whom to score in the coming round: all."""
        check_state(self.name, state)
        return set(clients)

    def status(self, state: State) -> dict[str, str]:
        """No standing verdicts."""
        return {}

    def update(
        self: Judge,
        state: State,
        scores: Mapping[str, ArrayLike],
        num_examples: Mapping[str, int],
    ) -> tuple[dict[str, float], State]:
        """Play one round.

        Args:
            state: of the last round; it is not changed.
            scores: client -> (n_steps,) P(malicious) in [0, 1], in the order of the steps, of the
                clients that were scored.
            num_examples: client -> examples that count, for every client of the round.

        Returns:
            client -> factor in [0, 1], for every client of the round; and the new state.

        Raises:
            EvidenceError: scores that are not (n_steps,) numbers in [0, 1], or more than one where
                the level reads one; a scored client without examples; a count that is not a
                positive integer. The message names the client.
            StateError: the state is another level's, or none.
        """
        examples = checked_examples(num_examples)
        one_score = self.evidence in (SHADOW_GRADIENT, UPDATE_FEATURES)
        checked = checked_scores(scores, examples, 1 if one_score else None)
        wanted = self.wanted(state, examples)
        factors: dict[str, float] = {}
        trusts: dict[str, Trust] = dict(state["clients"])
        for client in sorted(examples):
            if client in wanted and client not in checked:
                factors[client] = 0.0
                continue
            if client in wanted:
                trust = self.judge(trusts.get(client), checked[client], examples[client])
                trusts[client] = {**trust, "since": 0}
            else:
                trusts[client] = {**trusts[client], "since": trusts[client]["since"] + 1}
            factors[client] = trusts[client]["factor"]
        return factors, {**state, "round": state["round"] + 1, "clients": trusts}


class FirstRounds(Judging):
    """A level that scores everybody in its first rounds, later only who never was, once."""

    scored_rounds: int

    def wanted(self, state: State, clients: Iterable[str]) -> set[str]:
        """All, after `scored_rounds` those that never were scored."""
        check_state(self.name, state)
        if state["round"] < self.scored_rounds:
            return set(clients)
        return {client for client in clients if client not in state["clients"]}


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without its overflow."""
    return 0.5 * (1 + math.tanh(x / 2))
