"""From a head's scores to probabilities that mean what they say, and to thresholds that hold.

Both are fitted on scores of adapters whose group the scoring head never saw (out of fold), and say
which unit they were fitted on: a cut calibrated on client updates is not one for single steps.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy.special import expit, logit

from ..errors import FitError

Method = Literal["platt", "isotonic"]
METHODS: tuple[Method, ...] = ("platt", "isotonic")
_CLIP = 1e-12  # keeps the logit of a saturated score finite


@dataclass(frozen=True)
class Calibration:
    """A monotone map of scores to probabilities.

    Attributes:
        method: "platt", sigmoid(a * logit(p) + b), or "isotonic", a step-wise linear map.
        inputs, outputs: (a,) and (b,) for Platt; the knots of the map for isotonic.
        unit: what one row was when it was fitted ("client update", "local step", ...).
        rows, groups: how much it was fitted on.

    Source: Platt 1999; Zadrozny & Elkan, KDD 2002.
    """

    method: Method
    inputs: tuple[float, ...]
    outputs: tuple[float, ...]
    unit: str
    rows: int
    groups: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise FitError(f"got calibration {self.method!r}; expected one of {', '.join(METHODS)}")
        numbers = (*self.inputs, *self.outputs)
        if (
            not numbers
            or len(self.inputs) != len(self.outputs)
            or not all(math.isfinite(number) for number in numbers)
        ):
            raise FitError("a calibration needs as many finite inputs as outputs, at least one")
        if self.method == "platt" and (len(self.inputs) != 1 or self.inputs[0] <= 0):
            raise FitError(
                f"got Platt slope {self.inputs}; expected one slope above 0: scores must rise with"
                " the probability"
            )
        if self.method == "isotonic" and not (
            _rises(self.inputs)
            and _rises(self.outputs)
            and 0 <= self.outputs[0] <= self.outputs[-1] <= 1
        ):
            raise FitError("isotonic knots must rise, and their outputs must lie in [0, 1]")

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """(n,) scores in [0, 1] -> (n,) probabilities."""
        if self.method == "platt":
            return np.asarray(
                expit(self.inputs[0] * logit(np.clip(scores, _CLIP, 1 - _CLIP)) + self.outputs[0])
            )
        return np.asarray(np.interp(scores, self.inputs, self.outputs))


def fit_calibration(
    method: Method, scores: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable], unit: str
) -> Calibration:
    """Fit on out-of-fold scores (n,) in [0, 1] and labels (n,) 0 / 1.

    The two classes weigh the same, so the probabilities are those for a prior of one half: the
    share of malicious rows among training adapters is chosen, and says nothing of those to be
    scored.

    Raises:
        FitError: unknown method, or the scores do not rise with the labels.
    """
    if method not in METHODS:
        raise FitError(f"got calibration {method!r}; expected one of {', '.join(METHODS)}")
    if len(set(labels.tolist())) < 2:
        raise FitError("got labels of one class only; a calibration needs both")
    weights = 0.5 * len(labels) / np.bincount(labels, minlength=2)[labels]  # (n,)
    if method == "platt":
        slope, offset = _platt(logit(np.clip(scores, _CLIP, 1 - _CLIP)), labels, weights)
        return Calibration(method, (slope,), (offset,), unit, len(scores), len(set(groups)))
    from sklearn.isotonic import IsotonicRegression

    curve = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(
        scores, labels, sample_weight=weights
    )
    inputs, outputs = tuple(map(float, curve.X_thresholds_)), tuple(map(float, curve.y_thresholds_))
    if outputs[0] == outputs[-1]:
        raise FitError(
            "got scores that do not rise with the labels; an isotonic map of them would give every"
            " adapter the same probability"
        )
    return Calibration(method, inputs, outputs, unit, len(scores), len(set(groups)))


def _platt(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Slope and offset by maximum likelihood of Platt's smoothed targets, (n+1)/(n+2) for a
    malicious row and 1/(n+2) for a benign one.

    With targets of 1 and 0 a score that separates the classes would be called certain after ten
    rows of each.
    """
    from sklearn.linear_model import LogisticRegression

    # The solver stops at an absolute gradient: unscaled, logits that span 1e-4 would get a slope of
    # 0.
    low, width = float(logits.min()), float(np.ptp(logits)) or 1.0
    malicious, benign = int((labels == 1).sum()), int((labels == 0).sum())
    target = np.where(labels == 1, (malicious + 1) / (malicious + 2), 1 / (benign + 2))
    both, answers = np.tile((logits - low) / width, 2)[:, None], np.repeat([1, 0], len(logits))
    model = LogisticRegression(C=1e6, max_iter=1000, tol=1e-8).fit(
        both, answers, sample_weight=np.concatenate([weights * target, weights * (1 - target)])
    )
    slope = float(model.coef_[0, 0]) / width
    return slope, float(model.intercept_[0]) - slope * low


def fpr_threshold(
    budget: float, scores: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable]
) -> float:
    """The lowest threshold at which a new benign group is flagged with probability at most
    `budget`.

    Split-conformal: a group counts with its highest score, and the ceil((m + 1)(1 - budget))-th of
    m benign groups is the last one let through. Holds for groups exchangeable with these, not for a
    kind of benign data that none of them resembles.

    Raises:
        FitError: the budget is not in (0, 1), or there are too few benign groups for it.

    Source: Vovk et al., Algorithmic Learning in a Random World, 2005 (inductive conformal
        prediction).
    """
    return float(
        np.nextafter(
            _conformal_bound(
                budget, scores[labels == 0], _of(groups, labels == 0), "benign", "fpr"
            ),
            2.0,
        )
    )


def fnr_threshold(
    budget: float, scores: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable]
) -> float:
    """The highest cut below which a new malicious group falls with probability at most `budget`.

    The mirror image of `fpr_threshold`, on the lowest score of each malicious group.
    """
    return -_conformal_bound(
        budget, -scores[labels == 1], _of(groups, labels == 1), "malicious", "fnr"
    )


def budget_of(text: str, name: str) -> float:
    """The number in "fpr:0.01".

    Raises:
        FitError: the text is not of this form.
    """
    head, _, number = text.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if head != name or not 0 < value < 1:
        raise FitError(
            f"got {text!r}; expected a number in [0, 1], or '{name}:' and a share between 0 and 1"
            f" such as '{name}:0.01'"
        )
    return value


def _conformal_bound(
    budget: float, scores: np.ndarray, groups: Sequence[Hashable], what: str, name: str
) -> float:
    highest: dict[Hashable, float] = {}
    for score, group in zip(scores, groups, strict=True):
        highest[group] = max(float(score), highest.get(group, -math.inf))
    rank = math.ceil((len(highest) + 1) * (1 - budget))
    if rank > len(highest):
        needed = math.ceil(1 / budget) - 1
        raise FitError(
            f"{name}:{budget:g} needs at least {needed} {what} groups, got {len(highest)}. Add"
            " groups or allow a larger share of errors."
        )
    return sorted(highest.values())[rank - 1]


def _of(groups: Sequence[Hashable], mask: np.ndarray) -> list[Hashable]:
    return [group for group, keep in zip(groups, mask, strict=True) if keep]


def _rises(values: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in pairwise(values))
