"""From a head's scores to probabilities that mean what they say, and to thresholds that hold.

Both are fitted on scores of adapters whose group the scoring head never saw (out of fold), and say
which unit they were fitted on: a cut calibrated on client updates is not one for single steps.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ..calibration import Calibration, check_method, logit
from ..errors import FitError, quoted


@dataclass(frozen=True)
class Budget:
    """A share of errors that a cut may cost: "fpr:0.01" or "fnr:0.05"."""

    name: str
    share: float


def parse_cut(value: float | str, name: str) -> float | Budget:
    """A cut as a number, or as a budget that `fit_features` turns into one.

    >>> parse_cut("fpr:0.01", "fpr"), parse_cut(0.8, "fpr")
    (Budget(name='fpr', share=0.01), 0.8)

    Raises:
        FitError: it is neither.
    """
    prefix, colon, share = str(value).partition(":")
    try:
        number = float(share if colon else prefix)
    except ValueError:
        number = math.nan
    if not colon and 0 <= number <= np.nextafter(1.0, 2.0):
        return number
    if colon and prefix == name and 0 < number < 1:
        return Budget(name, number)
    raise FitError(
        f"got {quoted(value)}; expected a number in [0, 1], or '{name}:' and a share between 0 and"
        f" 1 such as '{name}:0.01'"
    )


def budget_of(text: str, name: str) -> float:
    """The share in "fpr:0.01".

    Raises:
        FitError: the text is not of this form.
    """
    cut = parse_cut(text, name)
    if not isinstance(cut, Budget):
        raise FitError(f"got {quoted(text)}; expected '{name}:' and a share such as '{name}:0.01'")
    return cut.share


def fit_calibration(
    method: str, scores: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable], unit: str
) -> Calibration:
    """Fit on out-of-fold scores (n,) in [0, 1] and labels (n,) 0 / 1.

    The two classes weigh the same, so the probabilities are those for a prior of one half: the
    share of malicious rows among training adapters is chosen, and says nothing of those to be
    scored.

    Raises:
        FitError: unknown method, or the scores do not rise with the labels.
    """
    name = check_method(method)
    if len(set(labels.tolist())) < 2:
        raise FitError("got labels of one class only; a calibration needs both")
    weights = 0.5 * len(labels) / np.bincount(labels, minlength=2)[labels]  # (n,)
    if name == "platt":
        slope, offset = _platt(logit(scores), labels, weights)
        return Calibration(name, (slope,), (offset,), unit, len(scores), len(set(groups)))
    from sklearn.isotonic import IsotonicRegression

    curve = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(
        scores, labels, sample_weight=weights
    )
    inputs = tuple(map(float, curve.X_thresholds_))
    outputs = tuple(map(float, curve.y_thresholds_))
    if outputs[0] == outputs[-1]:
        raise FitError(
            "got scores that do not rise with the labels; an isotonic map of them would give every"
            " adapter the same probability"
        )
    return Calibration(name, inputs, outputs, unit, len(scores), len(set(groups)))


def _platt(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Slope and offset by maximum likelihood of Platt's smoothed targets.

    These are (n+1)/(n+2) for a malicious row and 1/(n+2) for a benign one: with targets of 1 and 0
    a score that separates the classes would be called certain after ten rows of each.
    """
    from sklearn.linear_model import LogisticRegression

    # The solver stops at an absolute gradient: unscaled, logits that span 1e-4 would get slope 0.
    low = float(logits.min())
    width = float(np.ptp(logits)) or 1.0
    malicious = int((labels == 1).sum())
    benign = int((labels == 0).sum())
    target = np.where(labels == 1, (malicious + 1) / (malicious + 2), 1 / (benign + 2))
    both = np.tile((logits - low) / width, 2)[:, None]
    answers = np.repeat([1, 0], len(logits))
    model = LogisticRegression(C=1e6, max_iter=1000, tol=1e-8).fit(
        both, answers, sample_weight=np.concatenate([weights * target, weights * (1 - target)])
    )
    slope = float(model.coef_[0, 0]) / width
    return slope, float(model.intercept_[0]) - slope * low


def fpr_threshold(
    budget: float, scores: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable]
) -> float:
    """The lowest threshold that flags a new benign group with probability at most `budget`.

    Split-conformal: a group counts with its highest score, and the ceil((m + 1)(1 - budget))-th of
    m benign groups is the last one let through. Holds for groups exchangeable with these, not for a
    kind of benign data that none of them resembles.

    Raises:
        FitError: the budget is not in (0, 1), or there are too few benign groups for it.

    Source: Vovk et al., Algorithmic Learning in a Random World, 2005 (inductive conformal
        prediction).
    """
    benign = labels == 0
    bound = _conformal_bound(budget, scores[benign], _members(groups, benign), "benign", "fpr")
    return float(np.nextafter(bound, 2.0))


def fnr_threshold(
    budget: float, scores: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable]
) -> float:
    """The highest cut below which a new malicious group falls with probability at most `budget`.

    The mirror image of `fpr_threshold`, on the lowest score of each malicious group.
    """
    malicious = labels == 1
    members = _members(groups, malicious)
    return -_conformal_bound(budget, -scores[malicious], members, "malicious", "fnr")


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


def _members(groups: Sequence[Hashable], mask: np.ndarray) -> list[Hashable]:
    return [group for group, keep in zip(groups, mask, strict=True) if keep]
