"""Where to cut: ways that are fixed on federations with other attacks, and then say which members
of one federation they flag.

All of them read the same probes' scores. What they differ in is what a score is compared with, and
how participations count together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from fedloop.defense.levels import CumulativeLevel

from .federations import PARTICIPATIONS
from .readers import BUDGET

CERTAIN = 1e-9  # log odds stay finite
QUARTER, MISSED = (
    0.25,
    0.03,
)  # the sequential test is for this poison share, and may miss so many of its clients


@dataclass(frozen=True)
class Scored:
    """A federation's members, scored by probes that do not know a certain malicious source, nor a
    member's own kinds.

    Attributes:
        mean: (participations, members) of the mean direction of all updates so far.
        single: (participations, members) of that participation's update alone.
        role: (members,); share: (members,) of poison.
        kinds: of every member, what it holds.
    """

    mean: np.ndarray
    single: np.ndarray
    role: np.ndarray
    share: np.ndarray
    kinds: Sequence[frozenset[str]]

    @property
    def honest(self) -> np.ndarray:
        """(members,) the clients that are no attackers."""
        return np.isin(self.role, ("benign", "hard_negative"))

    @property
    def clients(self) -> np.ndarray:
        """(members,) all but the server's references."""
        return self.honest | (self.role == "malicious")

    def against_cohort(self) -> np.ndarray:
        """Like `mean`: 0.5 is the cohort's median client after as many participations, whatever
        that one scores.
        """
        odds = log_odds(self.mean)
        return np.asarray(expit(odds - np.median(odds[:, self.clients], axis=1, keepdims=True)))

    def against_references(self) -> np.ndarray:
        """Like `mean`: 0.5 is the median of the server's references that hold none of a member's
        kinds, after as many participations.
        """
        odds, references = log_odds(self.mean), np.flatnonzero(self.role == "reference")
        others = [
            [number for number in references if not own & self.kinds[number]] for own in self.kinds
        ]
        return np.asarray(
            expit(
                odds - np.stack([np.median(odds[:, chosen], axis=1) for chosen in others], axis=1)
            )
        )


Way = Callable[
    [Scored, Sequence[Scored]], np.ndarray
]  # one federation, those that the cut is made on -> (participations, members) flagged


def rule(benign: Sequence[np.ndarray]) -> CumulativeLevel:
    """The level whose cut lets a share BUDGET of benign clients above it, after one participation
    and after eight.

    Args:
        benign: of every federation that it is made on the scores (participations, clients) of its
            honest clients.
    """
    seen = np.concatenate(benign, axis=1)
    first, last = (
        float(log_odds(np.quantile(seen[number], 1 - BUDGET, method="higher")))
        for number in (0, PARTICIPATIONS - 1)
    )
    kept = PARTICIPATIONS**-0.5
    floor = (last - kept * first) / (1 - kept)
    # A little above the highest benign score that is let through.
    return CumulativeLevel(
        threshold=math.nextafter(_probability(first), 1),
        floor=math.nextafter(_probability(floor), 1),
    )


def above(scores: np.ndarray, level: CumulativeLevel) -> np.ndarray:
    """Which scores (participations, members) the level's cut flags."""
    return np.asarray(
        scores >= np.array([level.cut(rounds) for rounds in range(1, PARTICIPATIONS + 1)])[:, None]
    )


def by_rule(read: Callable[[Scored], np.ndarray]) -> Way:
    """The rule, on what is read of the members."""

    def flagged(one: Scored, others: Sequence[Scored]) -> np.ndarray:
        return above(read(one), rule([read(other)[:, other.honest] for other in others]))

    return flagged


def conformal(one: Scored, others: Sequence[Scored]) -> np.ndarray:
    """A cut for each number of participations.

    The conformal quantile of the honest clients (Vovk et al., 2005), none where they are too few.
    """
    seen = np.sort(
        np.concatenate([other.mean[:, other.honest] for other in others], axis=1), axis=1
    )
    rank = math.ceil((seen.shape[1] + 1) * (1 - BUDGET))
    cuts = seen[:, rank - 1] if rank <= seen.shape[1] else np.full(len(seen), np.inf)
    return np.asarray(one.mean > cuts[:, None])


def sequential(one: Scored, others: Sequence[Scored]) -> np.ndarray:
    """Wald's sequential test (1945) on the log odds of single participations.

    A quarter of poison against honest; the first verdict stands.

    Both are taken as normal with one variance, so that the evidence of a participation grows with
    its score.
    """
    honest = np.concatenate([log_odds(other.single[:, other.honest]).ravel() for other in others])
    poisoned = np.concatenate(
        [
            log_odds(
                other.single[:, (other.role == "malicious") & (other.share == QUARTER)]
            ).ravel()
            for other in others
        ]
    )
    variance = (honest.var() * len(honest) + poisoned.var() * len(poisoned)) / (
        len(honest) + len(poisoned)
    )
    apart, middle = poisoned.mean() - honest.mean(), (poisoned.mean() + honest.mean()) / 2
    evidence = np.cumsum(apart / variance * (log_odds(one.single) - middle), axis=0)
    guilty, cleared = (
        evidence >= math.log((1 - MISSED) / BUDGET),
        evidence <= math.log(MISSED / (1 - BUDGET)),
    )
    before = np.vstack(
        [np.zeros((1, evidence.shape[1]), bool), np.logical_or.accumulate(guilty | cleared)[:-1]]
    )
    return np.asarray(np.logical_or.accumulate(guilty & ~before))


WAYS: dict[str, Way] = {
    "the rule": by_rule(lambda scored: scored.mean),
    "the rule, relative to the cohort": by_rule(Scored.against_cohort),
    "the rule, relative to references": by_rule(Scored.against_references),
    "conformal, a cut for each participation": conformal,
    "sequential test of single participations": sequential,
}


def log_odds(p: np.ndarray) -> np.ndarray:
    """Of probabilities, kept finite."""
    return np.asarray(logit(np.clip(p, CERTAIN, 1 - CERTAIN)))


def _probability(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))
