"""Whether a head says the same of everything, so that it detects nothing whatever its card says."""

from __future__ import annotations

import numpy as np

from ..errors import ProbeFormatError
from . import MAX_DEPTH, Head, LinearHead, Probabilities, XGBoostHead, sigmoid

_LONGEST_ROW = 1e4  # features are unit vectors, or norms and spectra of adapters
_LEAST_MOVE = 1e-3  # of a probability


def check_varies(head: Head) -> None:
    """Refuse a head whose probability no row of features moves by a thousandth.

    Of a linear head (rows up to a length of 10,000) and of trees the range is exact; a perceptron
    is asked for rows of many lengths.

    Raises:
        ProbeFormatError: it says the same of everything.
    """
    probabilities = _range_of(head)
    if np.ptp(probabilities) < _LEAST_MOVE:
        raise ProbeFormatError(
            f"the {head.name} head says {probabilities[0]:.3g} of every adapter; expected scores"
            " that depend on what is scored. Fit it on adapters that differ, or use another probe"
        )


def _range_of(head: Head) -> Probabilities:
    """The least and the largest probability, or those of 80 random rows."""
    if isinstance(head, LinearHead):
        reach = _LONGEST_ROW * float(np.linalg.norm(head.coef.astype(np.float64)))
        return sigmoid(np.array([head.intercept - reach, head.intercept + reach]))
    if isinstance(head, XGBoostHead):
        return sigmoid(np.array([_extreme(head, np.minimum), _extreme(head, np.maximum)]))
    rows = np.random.default_rng(0).standard_normal((16, head.num_features)).astype(np.float32)
    lengths = np.float32(10.0) ** np.arange(-2, 3)  # of a number
    return np.concatenate([head(rows * length) for length in lengths])


def _extreme(head: XGBoostHead, choose: np.ufunc) -> float:
    """The logit where every tree ends in its least or largest leaf."""
    leaf = head.left == -1
    best = head.value.astype(np.float64)
    for _ in range(MAX_DEPTH):  # a level of all trees a turn, from the leaves up
        best = np.where(leaf, best, choose(best[head.left], best[head.right]))
    return float(best[head.roots].sum() + head.intercept)
