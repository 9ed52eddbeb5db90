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

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError, EvidenceError, StateError
from .accumulate import FeatureMean, check_fields, is_integer, is_number
from .weights import checked_examples, checked_scores

# What a level reads; whoever calls it brings the scores of exactly this.
LOCAL_STEPS = "local_steps"  # every local step of the round, since the round's global LoRA
LAST_STEP = "last_step"  # the last local step only, which is the submitted update
SHADOW_STEPS = (  # every step of the same examples trained again from the fixed initial LoRA
    "shadow_steps"
)
SHADOW_GRADIENT = (  # one gradient at that initial LoRA, averaged over rounds: one score
    "shadow_gradient"
)
UPDATE_FEATURES = (  # features of the submitted update, averaged over rounds: one score
    "update_features"
)

BENIGN, MALICIOUS, OPEN = "benign", "malicious", "none"

State = dict[str, Any]  # {"level": name, "round": rounds so far, "clients": {client: trust}}
Trust = dict[
    str, Any
]  # "factor": the last one; "since": participations since the last score; and the level's own
Scores = NDArray[np.float64]

# Field name -> what is valid; a name means the same in every level that has it.
_VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("threshold", "floor"),
        (lambda value: is_number(value) and 0 < value < 1, "a number in (0, 1)"),
    ),
    "decay": (lambda value: is_number(value) and 0 <= value <= 1, "a number in [0, 1]"),
    "shrink": (lambda value: is_number(value) and value >= 0, "a finite number >= 0"),
    **dict.fromkeys(
        ("sharpness", "exponent"),
        (lambda value: is_number(value) and value > 0, "a finite number > 0"),
    ),
    **dict.fromkeys(
        ("scored_rounds", "sketch_seed"), (lambda value: is_integer(value, 0), "an integer >= 0")
    ),
    **dict.fromkeys(
        ("min_evidence", "audit_interval"), (lambda value: is_integer(value, 1), "an integer >= 1")
    ),
    **dict.fromkeys(
        ("examples_per_step", "rehabilitation", "sketch"),
        (lambda got: got is None or is_integer(got, 1), "None or an integer >= 1"),
    ),
    **dict.fromkeys(
        ("graded", "normalize", "relative"),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
}
_SHADOW = {
    "evidence": (
        lambda value: value in (SHADOW_STEPS, SHADOW_GRADIENT),
        f"{SHADOW_STEPS} or {SHADOW_GRADIENT}",
    )
}
_CUMULATIVE = {
    "evidence": (
        lambda value: value in (UPDATE_FEATURES, SHADOW_GRADIENT),
        f"{UPDATE_FEATURES} or {SHADOW_GRADIENT}",
    )
}


def _init(level: Level) -> State:
    """The state before the first round."""
    return {"level": level.name, "round": 0, "clients": {}}


def _update(
    level: Level, state: State, scores: Mapping[str, ArrayLike], num_examples: Mapping[str, int]
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
        EvidenceError: scores that are not (n_steps,) numbers in [0, 1], or more than one where the
            level reads one; a scored client without examples; a count that is not a positive
            integer. The message names the client.
        StateError: the state is another level's, or none.
    """
    examples = checked_examples(num_examples)
    one = level.evidence in (SHADOW_GRADIENT, UPDATE_FEATURES)
    steps = checked_scores(scores, examples, 1 if one else None)
    wanted = level.wanted(state, examples)
    factors: dict[str, float] = {}
    trusts: dict[str, Trust] = dict(state["clients"])
    for client in sorted(examples):
        if client not in wanted:
            trusts[client] = {**trusts[client], "since": trusts[client]["since"] + 1}
        elif client in steps:
            trusts[client] = {
                **level._judge(trusts.get(client), steps[client], examples[client]),
                "since": 0,
            }
        else:
            factors[client] = 0.0
            continue
        factors[client] = trusts[client]["factor"]
    return factors, {**state, "round": state["round"] + 1, "clients": trusts}


def _everyone(level: Level, state: State, clients: Iterable[str]) -> set[str]:
    """Which of the coming round's clients have to be scored: all."""
    _check_state(level, state)
    return set(clients)


def _first_rounds(level: StepLevel | ClientLevel, state: State, clients: Iterable[str]) -> set[str]:
    """Which of the coming round's clients have to be scored.

    All, after `scored_rounds` only those that never were.
    """
    _check_state(level, state)
    if state["round"] < level.scored_rounds:
        return set(clients)
    return {client for client in clients if client not in state["clients"]}


def _no_status(level: Level, state: State) -> dict[str, str]:
    """This level has no standing verdicts: {}."""
    return {}


@dataclass(frozen=True)
class StepLevel:
    """Trust from every local step of the first rounds.

    The mean of a Beta distribution that forgets.

    With h of the round's n examples in flagged steps (h = min(n, flagged x examples a step)):
    alpha <- decay alpha + (n - h), beta <- decay beta + h, both from 1; f = alpha / (alpha + beta),
    always below 1.

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
    evidence: ClassVar[str] = LOCAL_STEPS
    accumulator: ClassVar[FeatureMean | None] = None

    init, update, wanted, status = _init, _update, _first_rounds, _no_status

    def __post_init__(self) -> None:
        check_fields(self, _VALID)

    def _judge(self, trust: Trust | None, steps: Scores, n: int) -> Trust:
        flagged = _flagged_share(self, steps, n) * n
        old = trust or {"alpha": 1.0, "beta": 1.0}
        alpha, beta = self.decay * old["alpha"] + (n - flagged), self.decay * old["beta"] + flagged
        return {"alpha": alpha, "beta": beta, "factor": alpha / (alpha + beta)}


@dataclass(frozen=True)
class ClientLevel:
    """Trust from the last local step of the first rounds: the running mean of 1 - t.

    With k the sharpness, t = sigmoid(k (s / threshold - 1/2)) / 2 for s <= threshold, else
    1/2 + sigmoid(k ((s - threshold) / (1 - threshold) - 1/2)) / 2. So 1 - t is at most 0.9967, at s
    = 0.

    Attributes:
        threshold: the score at which t crosses one half, in (0, 1).
        sharpness: k, above 0.
        scored_rounds: as in `StepLevel`.
    """

    threshold: float = 0.8
    sharpness: float = 10.0
    scored_rounds: int = 20
    name: ClassVar[str] = "client"
    evidence: ClassVar[str] = LAST_STEP
    accumulator: ClassVar[FeatureMean | None] = None

    init, update, wanted, status = _init, _update, _first_rounds, _no_status

    def __post_init__(self) -> None:
        check_fields(self, _VALID)

    def _judge(self, trust: Trust | None, steps: Scores, n: int) -> Trust:
        score, cut = float(steps[-1]), self.threshold
        if score <= cut:
            doubt = 0.5 * _sigmoid(self.sharpness * (score / cut - 0.5))
        else:
            doubt = 0.5 + 0.5 * _sigmoid(self.sharpness * ((score - cut) / (1 - cut) - 0.5))
        old = trust or {"rounds": 0, "factor": 0.0}
        rounds = old["rounds"] + 1
        return {"rounds": rounds, "factor": old["factor"] + (1 - doubt - old["factor"]) / rounds}


@dataclass(frozen=True)
class ShadowLevel:
    """No memory: f = (1 - r)^exponent, r the share of this round's examples in flagged shadow
    steps.

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
    evidence: str = SHADOW_STEPS
    name: ClassVar[str] = "shadow"

    init, update, wanted, status = _init, _update, _everyone, _no_status

    def __post_init__(self) -> None:
        check_fields(self, _VALID | _SHADOW)

    @property
    def accumulator(self) -> FeatureMean | None:
        """What averages gradients over rounds (at a fixed point they add up).

        None for shadow steps.
        """
        return FeatureMean() if self.evidence == SHADOW_GRADIENT else None

    def _judge(self, trust: Trust | None, steps: Scores, n: int) -> Trust:
        return {"factor": (1 - _flagged_share(self, steps, n)) ** self.exponent}


@dataclass(frozen=True)
class EvidenceLevel:
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
    evidence: str = SHADOW_STEPS
    name: ClassVar[str] = "evidence"

    init, update = _init, _update

    def __post_init__(self) -> None:
        check_fields(self, _VALID | _SHADOW)

    @property
    def accumulator(self) -> FeatureMean | None:
        """What averages gradients over rounds (at a fixed point they add up).

        None for shadow steps.
        """
        return FeatureMean() if self.evidence == SHADOW_GRADIENT else None

    def wanted(self, state: State, clients: Iterable[str]) -> set[str]:
        """Which of the coming round's clients have to be scored.

        Those without a verdict or due for an audit.
        """
        _check_state(self, state)
        return {client for client in clients if self._is_due(state["clients"].get(client))}

    def status(self, state: State) -> dict[str, str]:
        """The verdict on every client that was ever scored.

        "none" while it is open, "benign" or "malicious".
        """
        _check_state(self, state)
        return {client: trust["status"] for client, trust in state["clients"].items()}

    def _is_due(self, trust: Trust | None) -> bool:
        if trust is None or trust["status"] == OPEN:
            return True
        return (trust["status"] == BENIGN or self.rehabilitation is not None) and trust[
            "since"
        ] + 1 >= self.audit_interval

    def _judge(self, trust: Trust | None, steps: Scores, n: int) -> Trust:
        verdict = MALICIOUS if steps[-1] >= self.threshold else BENIGN
        if trust is not None and trust["status"] != OPEN:
            return self._audit(trust, verdict)
        factor = (1 - _flagged_share(self, steps, n)) ** self.exponent
        verdicts = [*(trust["verdicts"] if trust else []), verdict]
        factors = [*(trust["factors"] if trust else []), factor]
        if len(verdicts) < self.min_evidence:
            return _opened(factor, verdicts, factors)
        if len(set(verdicts)) > 1:
            return _opened(factor)
        return {
            "status": verdict,
            "factor": math.fsum(factors) / len(factors) if verdict == BENIGN else 0.0,
            "clean": 0,
        }

    def _audit(self, trust: Trust, verdict: str) -> Trust:
        if trust["status"] == BENIGN:
            return trust if verdict == BENIGN else _opened(0.0)
        clean = trust["clean"] + 1 if verdict == BENIGN else 0
        return _opened(0.0) if clean == self.rehabilitation else {**trust, "clean": clean}


@dataclass(frozen=True)
class CumulativeLevel:
    """A cut on the score of a client's mean features so far, which moves as more rounds go into the
    mean.

    The features are averaged by `accumulator` and the mean is scored by the probe; here that one
    score is compared with cut(T), T the rounds in which this client was scored; in log odds it is
    floor + (threshold - floor) T^-shrink. f is 0 at or above the cut, else 1. Averaging over T
    independent rounds divides the noise by sqrt(T), so a score nearer to the floor then tells as
    much as one at the threshold did. Ours, not the paper's.

    Attributes:
        threshold: cut(1), in (0, 1); from it the cut moves towards the floor.
        shrink: at least 0. 0 for a fixed cut; 1 for the sequential test, which adds up the log odds
            of independent rounds.
        floor: what the cut tends to, in (0, 1). One half where nothing is known; lower where benign
            clients of unseen kinds were seen to stay far below it, because what is left when the
            noise is gone is how kinds of data differ.
        graded: f = 1 - score / cut below the cut.
        evidence: "update_features", or "shadow_gradient".
        normalize, relative, sketch, sketch_seed: `normalize`, `relative`, `sketch` and `seed` of
            the `FeatureMean`.
    """

    threshold: float = 0.8
    shrink: float = 0.5
    floor: float = 0.5
    graded: bool = False
    evidence: str = UPDATE_FEATURES
    normalize: bool = True
    relative: bool = False
    sketch: int | None = None
    sketch_seed: int = 0
    name: ClassVar[str] = "cumulative"

    init, update, wanted, status = _init, _update, _everyone, _no_status

    def __post_init__(self) -> None:
        check_fields(self, _VALID | _CUMULATIVE)

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
        start, end = _log_odds(self.threshold), _log_odds(self.floor)
        return _sigmoid(end + (start - end) * float(rounds) ** -self.shrink)

    def _judge(self, trust: Trust | None, steps: Scores, n: int) -> Trust:
        rounds = (trust["rounds"] if trust else 0) + 1
        score, cut = float(steps[-1]), self.cut(rounds)
        if score >= cut:
            return {"rounds": rounds, "factor": 0.0}
        return {"rounds": rounds, "factor": 1 - score / cut if self.graded else 1.0}


Level = StepLevel | ClientLevel | ShadowLevel | EvidenceLevel | CumulativeLevel

LEVELS: dict[str, type[Level]] = {
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
    if name not in LEVELS:
        raise ConfigError(f"got level {name!r}; expected one of {', '.join(LEVELS)}")
    valid = [field.name for field in fields(LEVELS[name])]
    unknown = sorted(values.keys() - set(valid))
    if unknown:
        raise ConfigError(
            f"level {name!r} has no field {', '.join(map(repr, unknown))}; expected any of"
            f" {', '.join(valid)}"
        )
    return LEVELS[name](**values)


def _flagged_share(level: StepLevel | ShadowLevel | EvidenceLevel, steps: Scores, n: int) -> float:
    """h / n: the share of the round's n examples that were in flagged steps."""
    flagged = math.fsum(steps) if level.graded else int((steps >= level.threshold).sum())
    share = (
        flagged / len(steps)
        if level.examples_per_step is None
        else flagged * level.examples_per_step / n
    )
    return min(1.0, share)


def _opened(factor: float, verdicts: Sequence[str] = (), factors: Sequence[float] = ()) -> Trust:
    return {"status": OPEN, "factor": factor, "verdicts": list(verdicts), "factors": list(factors)}


def _check_state(level: Level, state: State) -> None:
    if not isinstance(state, dict) or state.get("level") != level.name:
        got = state.get("level") if isinstance(state, dict) else state
        raise StateError(
            f"got a state of {got!r}; expected one of the {level.name} level, as init() or update()"
            " returned it"
        )


def _log_odds(p: float) -> float:
    return math.log(p / (1 - p))


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))  # 1 / (1 + exp(-x)) overflows
