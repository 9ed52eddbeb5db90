"""The levels of arXiv:2601.07177: steps, the client's last step, shadow steps, evidence.

What the paper leaves open is its official code's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..checks import Validity, boolean, integer, number, one_of, or_none
from .accumulate import FeatureMean
from .trust import (
    LAST_STEP,
    LOCAL_STEPS,
    SHADOW_GRADIENT,
    SHADOW_STEPS,
    Evidence,
    FirstRounds,
    Judging,
    Scores,
    State,
    Trust,
    check_state,
    sigmoid,
)

BENIGN, MALICIOUS, OPEN = "benign", "malicious", "none"

# Field -> what is valid; a name means the same in every level that has it.
_VALID: Mapping[str, Validity] = {
    "threshold": number(above=0, below=1),
    "decay": number(at_least=0, at_most=1),
    **dict.fromkeys(("sharpness", "exponent"), number(above=0)),
    "scored_rounds": integer(0),
    **dict.fromkeys(("min_evidence", "audit_interval"), integer(1)),
    **dict.fromkeys(("examples_per_step", "rehabilitation"), or_none(integer(1))),
    "graded": boolean(),
    "evidence": one_of((SHADOW_STEPS, SHADOW_GRADIENT)),
}


class _Steps(FirstRounds):
    valid = _VALID
    accumulator: ClassVar[FeatureMean | None] = None


class _Shadows(Judging):
    valid = _VALID
    evidence: Evidence

    @property
    def accumulator(self) -> FeatureMean | None:
        """What averages gradients over rounds (they add up); None for shadow steps."""
        return FeatureMean() if self.evidence == SHADOW_GRADIENT else None


@dataclass(frozen=True)
class StepLevel(_Steps):
    """Trust from every local step of the first rounds.

    The mean of a Beta distribution that forgets. With h of the round's n examples in flagged steps
    (h = min(n, flagged x examples a step)): alpha <- decay alpha + (n - h), beta <- decay beta + h,
    both from 1; f = alpha / (alpha + beta), always below 1.

    Attributes:
        decay: what is left of the old trust after a scored round, in [0, 1].
        threshold: a step is flagged if its score is at least this, in (0, 1).
        scored_rounds: rounds in which everyone is scored; later only clients that never were, once;
            others keep their factor.
        examples_per_step: None for n / steps. A fixed number lets a client that overstates n dilute
            its steps.
        graded: the mean score of the steps stands in for the share that is flagged; not the
            paper's.
    """

    decay: float = 0.95
    threshold: float = 0.8
    scored_rounds: int = 20
    examples_per_step: int | None = None
    graded: bool = False
    name: ClassVar[str] = "step"
    evidence: ClassVar[Evidence] = LOCAL_STEPS

    def judge(self, trust: Trust | None, scores: Scores, examples: int) -> Trust:
        """The trust after one more scored round."""
        flagged = _flagged_share(self, scores, examples) * examples
        former = trust or {"alpha": 1.0, "beta": 1.0}
        alpha = self.decay * former["alpha"] + (examples - flagged)
        beta = self.decay * former["beta"] + flagged
        return {"alpha": alpha, "beta": beta, "factor": alpha / (alpha + beta)}


@dataclass(frozen=True)
class ClientLevel(_Steps):
    """Trust from the last local step of the first rounds: the running mean of 1 - t.

    With k the sharpness, t = sigmoid(k (s / threshold - 1/2)) / 2 for s <= threshold, else
    1/2 + sigmoid(k ((s - threshold) / (1 - threshold) - 1/2)) / 2. So 1 - t is at most 0.9967, at
    s = 0.

    Attributes:
        threshold: the score at which t crosses one half, in (0, 1).
        sharpness: k, above 0.
        scored_rounds: as in `StepLevel`.
    """

    threshold: float = 0.8
    sharpness: float = 10.0
    scored_rounds: int = 20
    name: ClassVar[str] = "client"
    evidence: ClassVar[Evidence] = LAST_STEP

    def judge(self, trust: Trust | None, scores: Scores, examples: int) -> Trust:
        """The trust after one more scored round."""
        score = float(scores[-1])
        cut = self.threshold
        if score <= cut:
            doubt = 0.5 * sigmoid(self.sharpness * (score / cut - 0.5))
        else:
            doubt = 0.5 + 0.5 * sigmoid(self.sharpness * ((score - cut) / (1 - cut) - 0.5))
        former = trust or {"rounds": 0, "factor": 0.0}
        rounds = former["rounds"] + 1
        mean = former["factor"] + (1 - doubt - former["factor"]) / rounds
        return {"rounds": rounds, "factor": mean}


@dataclass(frozen=True)
class ShadowLevel(_Shadows):
    """No memory: f = (1 - r)^exponent, r the share of examples in flagged shadow steps.

    Attributes:
        threshold: a step is flagged if its score is at least this, in (0, 1).
        exponent: how hard a flagged share is punished, above 0.
        examples_per_step, graded: as in `StepLevel`.
        evidence: "shadow_steps", or "shadow_gradient": one gradient in place of a shadow branch,
            one score.
    """

    threshold: float = 0.8
    exponent: float = 7
    examples_per_step: int | None = None
    graded: bool = False
    evidence: Evidence = SHADOW_STEPS
    name: ClassVar[str] = "shadow"

    def judge(self, trust: Trust | None, scores: Scores, examples: int) -> Trust:
        """The trust after this scored round alone."""
        return {"factor": (1 - _flagged_share(self, scores, examples)) ** self.exponent}


@dataclass(frozen=True)
class EvidenceLevel(_Shadows):
    """Shadow factors until a verdict stands, then the verdict.

    While it is open, f is the shadow level's, and the round speaks for malicious if the last step's
    score is at least the threshold. After `min_evidence` rounds: all malicious, frozen with f = 0;
    all benign, frozen with f = the mean of those rounds' factors; mixed, start again. A
    frozen-benign client is audited at every `audit_interval`-th round it takes part in: a benign
    last step keeps the verdict, a malicious one gives f = 0 and opens it again; an audit that is
    missed stays due. Frozen malicious is for ever, unless `rehabilitation` is set.

    Attributes:
        threshold, exponent, examples_per_step, graded: as in `ShadowLevel`; `graded` leaves
            verdicts as they are.
        min_evidence: verdicts needed to freeze, at least 1.
        audit_interval: participations from freezing, or from the last audit, to the next, at least
            1.
        rehabilitation: clean audits in a row after which a frozen-malicious client, then audited as
            often as a benign one, starts again without evidence; f is 0 up to and including the
            last of them. None: never.
        evidence: as in `ShadowLevel`.
    """

    threshold: float = 0.8
    exponent: float = 7
    min_evidence: int = 3
    audit_interval: int = 5
    examples_per_step: int | None = None
    graded: bool = False
    rehabilitation: int | None = None
    evidence: Evidence = SHADOW_STEPS
    name: ClassVar[str] = "evidence"

    def wanted(self, state: State, clients: Iterable[str]) -> set[str]:
        """Those without a verdict or due for an audit."""
        check_state(self.name, state)
        return {client for client in clients if self._is_due(state["clients"].get(client))}

    def status(self, state: State) -> dict[str, str]:
        """Every client ever scored -> "none" while its verdict is open, "benign", "malicious"."""
        check_state(self.name, state)
        return {client: trust["status"] for client, trust in state["clients"].items()}

    def judge(self, trust: Trust | None, scores: Scores, examples: int) -> Trust:
        """The trust after one more scored round, or an audit."""
        verdict = MALICIOUS if scores[-1] >= self.threshold else BENIGN
        if trust is not None and trust["status"] != OPEN:
            return self._audit(trust, verdict)
        factor = (1 - _flagged_share(self, scores, examples)) ** self.exponent
        verdicts = [*(trust["verdicts"] if trust else []), verdict]
        factors = [*(trust["factors"] if trust else []), factor]
        if len(verdicts) < self.min_evidence:
            return _opened(factor, verdicts, factors)
        if len(set(verdicts)) > 1:
            return _opened(factor)
        frozen = math.fsum(factors) / len(factors) if verdict == BENIGN else 0.0
        return {"status": verdict, "factor": frozen, "clean": 0}

    def _is_due(self, trust: Trust | None) -> bool:
        if trust is None or trust["status"] == OPEN:
            return True
        audited = trust["status"] == BENIGN or self.rehabilitation is not None
        return audited and trust["since"] + 1 >= self.audit_interval

    def _audit(self, trust: Trust, verdict: str) -> Trust:
        if trust["status"] == BENIGN:
            return trust if verdict == BENIGN else _opened(0.0)
        clean = trust["clean"] + 1 if verdict == BENIGN else 0
        return _opened(0.0) if clean == self.rehabilitation else {**trust, "clean": clean}


def _flagged_share(
    level: StepLevel | ShadowLevel | EvidenceLevel, scores: Scores, examples: int
) -> float:
    """h / n: the share of the round's n examples that were in flagged steps."""
    flagged = math.fsum(scores) if level.graded else int((scores >= level.threshold).sum())
    if level.examples_per_step is None:
        return min(1.0, flagged / len(scores))
    return min(1.0, flagged * level.examples_per_step / examples)


def _opened(factor: float, verdicts: Sequence[str] = (), factors: Sequence[float] = ()) -> Trust:
    return {"status": OPEN, "factor": factor, "verdicts": list(verdicts), "factors": list(factors)}
