"""A level of this project's own: evidence adds up in feature space, and the cut moves with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from ..checks import Validity, boolean, integer, is_integer, number, one_of, or_none
from ..errors import EvidenceError
from .accumulate import MIN_COHORT, FeatureMean
from .trust import (
    SHADOW_GRADIENT,
    UPDATE_FEATURES,
    Evidence,
    Judging,
    Scores,
    State,
    Trust,
    sigmoid,
)

_VALID: Mapping[str, Validity] = {
    **dict.fromkeys(("threshold", "floor"), number(above=0, below=1)),
    "shrink": number(at_least=0),
    "gap": or_none(number(above=0)),
    "watch": number(above=0, below=1),
    "sketch": or_none(integer(1)),
    "sketch_seed": integer(0),
    **dict.fromkeys(("graded", "normalize", "relative"), boolean()),
    "evidence": one_of((UPDATE_FEATURES, SHADOW_GRADIENT)),
}


@dataclass(frozen=True)
class CumulativeLevel(Judging):
    """A cut on the score of a client's mean features, which moves as rounds go into the mean.

    The features are averaged by `accumulator` and the mean is scored by the probe; here that one
    score is compared with cut(T), T the rounds in which this client was scored; in log odds it is
    floor + (threshold - floor) T^-shrink. f is 0 at or above the cut, else 1. Averaging over T
    independent rounds divides the noise by sqrt(T), so a score nearer to the floor then tells as
    much as one at the threshold did. With a gap the round's other clients are looked at as well:
    whoever stands apart from at least half of them is rejected below the cut too, see
    `edge_of_cohort`. Ours, not the paper's.

    Attributes:
        threshold: cut(1), in (0, 1); from it the cut moves towards the floor.
        shrink: at least 0. 0 for a fixed cut; 1 for the sequential test, which adds up the log odds
            of independent rounds.
        floor: what the cut tends to, in (0, 1). One half where nothing is known; lower where benign
            clients of unseen kinds were seen to stay far below it, because what is left when the
            noise is gone is how kinds of data differ.
        gap: in log odds, how far a client has to stand above the next lower score of the round to
            be rejected with all above it; None looks at no other client.
        watch: the score in (0, 1) below which nobody is rejected for standing apart.
        graded: f = 1 - score / cut below the cut.
        evidence: "update_features", or "shadow_gradient".
        normalize, relative, sketch, sketch_seed: `normalize`, `relative`, `sketch` and `seed` of
            the `FeatureMean`.
    """

    threshold: float = 0.8
    shrink: float = 0.5
    floor: float = 0.5
    gap: float | None = None
    watch: float = 0.5
    graded: bool = False
    evidence: Evidence = UPDATE_FEATURES
    normalize: bool = True
    relative: bool = False
    sketch: int | None = None
    sketch_seed: int = 0
    name: ClassVar[str] = "cumulative"
    valid: ClassVar[Mapping[str, Validity]] = _VALID

    @property
    def accumulator(self) -> FeatureMean | None:
        """What averages the features over rounds."""
        return FeatureMean(self.normalize, self.relative, self.sketch, self.sketch_seed)

    def cut(self, rounds: int) -> float:
        """The score from which a client with this many scored rounds is rejected.

        Raises:
            EvidenceError: rounds is not an integer >= 1.
        """
        if not is_integer(rounds, 1):
            raise EvidenceError(
                f"got rounds {rounds!r}; expected an integer >= 1, there is no cut before the first"
                " score"
            )
        if self.shrink == 0 or rounds == 1:
            return self.threshold
        start = _log_odds(self.threshold)
        end = _log_odds(self.floor)
        return sigmoid(end + (start - end) * float(rounds) ** -self.shrink)

    def update(
        self, state: State, scores: Mapping[str, ArrayLike], num_examples: Mapping[str, int]
    ) -> tuple[dict[str, float], State]:
        """Play one round; see `fedloop.defense.trust.Judging.update`.

        Where clients stand apart from the cohort, the new state's "edge" is the lowest score of
        them; it is None where nobody does.
        """
        factors, after = super().update(state, scores, num_examples)
        if self.gap is None:
            return factors, after
        last = {client: float(np.ravel(values)[-1]) for client, values in scores.items()}
        edge = edge_of_cohort(list(last.values()), self.gap, self.watch)
        trusts = after["clients"]
        for client, score in last.items():
            if edge is not None and score >= edge:
                factors[client] = 0.0
                trusts[client] = {**trusts[client], "factor": 0.0}
        return factors, {**after, "edge": edge}

    def judge(self, trust: Trust | None, scores: Scores, examples: int) -> Trust:
        """The trust after one more scored round."""
        rounds = (trust["rounds"] if trust else 0) + 1
        score = float(scores[-1])
        cut = self.cut(rounds)
        if score >= cut:
            return {"rounds": rounds, "factor": 0.0}
        return {"rounds": rounds, "factor": 1 - score / cut if self.graded else 1.0}


def edge_of_cohort(scores: Sequence[float], gap: float, watch: float) -> float | None:
    """The lowest score of the clients that stand apart from the rest of a round.

    Those are all above the lowest gap of this width, once half of the clients lie below it: honest
    clients are the larger half, or no comparison with the others can tell which half is.

    Args:
        scores: (n,) P(malicious) of the round's clients, in any order.
        gap: the width from which on a gap counts, in log odds, above 0.
        watch: the score below which nobody stands apart.

    Returns:
        None where nobody stands apart; always for fewer than three clients.

    Source: this project; measured in zoo/smollm2.md.
    """
    if len(scores) < MIN_COHORT:
        return None
    ordered = sorted(scores)
    for lower, upper in pairwise(ordered[(len(ordered) - 1) // 2 :]):
        if upper >= watch and _log_odds(upper) - _log_odds(lower) >= gap:
            return upper
    return None


def _log_odds(p: float) -> float:
    within = min(max(p, 1e-9), 1 - 1e-9)
    return math.log(within / (1 - within))
