"""The mass-mean head: one direction, from the mean of the benign kinds of data to the mean of the
malicious ones.

Nothing but two means is fitted, and no row is separated from another. With a handful of malicious
sources, whatever else sets those apart (their length, their topics) is what an optimised direction
comes to rest on, and a new source need not have it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FitError
from ..heads import FloatArray, LinearHead
from .data import Float64, Groups, check_training_data

Kinds = Sequence[Sequence[Hashable]]
"""One entry a row: the kind of data it was trained on, then the kinds that were mixed into it, if
any.
"""

# of the squared distance, the smallest variance: rows without any would make every score 0 or 1
_SHARPEST = 1e-3
_NO_DIRECTION = 1e-9  # rows have norm 1 or so: below this a difference of means is rounding


def fit_mass_mean(
    x: Any, y: Any, groups: Groups, *, seed: int, kinds: Kinds | None = None
) -> LinearHead:
    """P = sigmoid(a (x.w - c)), w from the mean of the benign kinds to that of the malicious ones,
    a kind being the mean of its rows.

    Kinds weigh alike, so that one with many rows does not stand for its class. c is half-way
    between the two means, and a is what makes P the posterior of two normal distributions of one
    variance (that of the rows along w within a class) and a prior of one half. Of
    kinds that were not trained on, P says too much: calibrate on scores by kind
    (`loraprobe.probe.out_of_kind_scores`), which fails where the direction does not carry over.
    Deterministic; `seed` is not used.

    Args:
        x: (n, p) features, best L2-normalised.
        kinds: (n,) see `Kinds`; rows belong to the kind they name first. None: every group is a
            kind.

    Raises:
        FitError: bad data, not one entry of kinds a row, or no difference between the means.

    Source: mass-mean probing, Marks & Tegmark, arXiv:2310.06824, without its covariance; kinds are
        this project's.
    """
    data = check_training_data(x, y, groups)
    own: list[Hashable] = (
        list(data.groups.tolist()) if kinds is None else own_kinds(kinds, len(data.y))
    )
    means = [_mean_of_kinds(data.x, data.y == label, own) for label in (0, 1)]
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


def own_kinds(kinds: Kinds, count: int) -> list[Hashable]:
    """The kind that every row names first.

    Raises:
        FitError: not one entry a row, or an entry that is empty.
    """
    entries = [tuple(entry) for entry in kinds]
    if len(entries) != count or not all(entries):
        raise FitError(
            f"got kinds of {sum(map(bool, entries))} adapters for {count}; expected at least its"
            " own kind for each"
        )
    return [entry[0] for entry in entries]


def _mean_of_kinds(x: FloatArray, counted: NDArray[np.bool_], own: Sequence[Hashable]) -> Float64:
    """The mean over kinds of the mean of their rows that count, (p,)."""
    rows: dict[Hashable, list[int]] = {}
    for row in np.flatnonzero(counted).tolist():
        rows.setdefault(own[row], []).append(row)
    return np.asarray(
        np.mean([x[chosen].mean(axis=0, dtype=np.float64) for chosen in rows.values()], axis=0)
    )
