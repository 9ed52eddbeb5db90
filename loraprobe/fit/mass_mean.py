"""The mass-mean head: one direction, from the mean of benign kinds of data to that of malicious.

Nothing but two means is fitted, and no row is separated from another. With a handful of malicious
sources, whatever else sets those apart (their length, their topics) is what an optimised direction
comes to rest on, and a new source need not have it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import FitError
from ..heads import FloatArray, LinearHead
from .data import Float64, TrainingData
from .options import MassMeanOptions

# of the squared distance, the smallest variance: rows without any would make every score 0 or 1
_SHARPEST = 1e-3
_NO_DIRECTION = 1e-9  # rows have norm 1 or so: below this a difference of means is rounding


def fit_mass_mean(data: TrainingData, options: MassMeanOptions, seed: int) -> LinearHead:
    """P = sigmoid(a (x.w - c)), w from the mean of the benign kinds to that of the malicious ones.

    A kind is the mean of its rows, and kinds weigh alike, so that one with many rows does not stand
    for its class. c is half-way between the two means, and a is what makes P the posterior of two
    normal distributions of one variance (that of the rows along w within a class) and a prior of
    one half. Of kinds that were not trained on, P says too much: calibrate on scores by kind
    (`loraprobe.fit.fit.held_out_scores`), which fails where the direction does not carry over.
    Deterministic; the seed is not used.

    Raises:
        FitError: no difference between the means.

    Source: mass-mean probing, Marks & Tegmark, arXiv:2310.06824, without its covariance; kinds are
        this project's.
    """
    means = [_mean_of_kinds(data.x, data.y == label, data.kinds) for label in (0, 1)]
    difference = means[1] - means[0]
    distance = float(np.linalg.norm(difference))
    if distance < _NO_DIRECTION:
        raise FitError(
            "mass-mean head: the benign and the malicious mean are the same; expected a difference."
            " The recipe keeps no direction"
        )
    direction = difference / distance
    middle = float((means[0] + means[1]) @ direction) / 2
    along = np.array([row.astype(np.float64) @ direction for row in data.x]) - middle
    variance = float(np.mean([along[data.y == label].var() for label in (0, 1)]))
    scale = distance / max(variance, distance**2 * _SHARPEST)
    return LinearHead((scale * direction).astype(np.float32), -scale * middle)


def _mean_of_kinds(x: FloatArray, counted: NDArray[np.bool_], kinds: Sequence[Hashable]) -> Float64:
    """The mean over kinds of the mean of their rows that count, (p,)."""
    rows: dict[Hashable, list[int]] = {}
    for row in np.flatnonzero(counted).tolist():
        rows.setdefault(kinds[row], []).append(row)
    return np.asarray(
        np.mean([x[members].mean(axis=0, dtype=np.float64) for members in rows.values()], axis=0)
    )
