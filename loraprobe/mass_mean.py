"""The mass-mean head: one direction, from the mean of the benign kinds of data to the mean of the malicious ones.

Nothing but two means is fitted, and no row is separated from another. With a handful of malicious sources, whatever else sets those
apart (their length, their topics) is what an optimised direction comes to rest on, and a new source need not have it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FitError
from .heads import FloatArray, LinearHead
from .training_data import Float64, Groups, check_training_data, logistic

Kinds = Sequence[Sequence[Hashable]]
"""One entry a row: the kind of data it was trained on, then the kinds that were mixed into it, if any."""

_NO_DIRECTION = 1e-9  # rows have norm 1 or so: below this a difference of means is rounding


def fit_mass_mean(x: Any, y: Any, groups: Groups, *, seed: int, kinds: Kinds | None = None) -> LinearHead:
    """P = sigmoid(a x.w + b), w from the mean of the benign kinds to that of the malicious ones, a kind being the mean of its rows.

    Kinds weigh alike, so that one with many rows does not stand for its class. (a, b) are a class-balanced logistic regression on
    projections of every row on the direction that is made without its own kind, so that the probability is one for kinds that were
    not trained on. Deterministic; `seed` is not used.

    Args:
        x: (n, p) features, best L2-normalised.
        kinds: (n,) see `Kinds`; rows belong to the kind they name first. None: every group is a kind.

    Raises:
        FitError: bad data, fewer than two kinds of a class, no difference between the means, or one that unseen kinds do not follow.

    Source: mass-mean probing, Marks & Tegmark, arXiv:2310.06824, without its covariance; kinds are this project's.
    """
    data = check_training_data(x, y, groups)
    entries = [(int(group),) for group in data.groups] if kinds is None else [tuple(entry) for entry in kinds]
    if len(entries) != len(data.y) or not all(entries):
        raise FitError(f"mass-mean head: got kinds of {sum(map(bool, entries))} rows for {len(data.y)} rows; expected at least its own for each")
    projected = np.empty(len(entries))
    for kind in dict.fromkeys(entry[0] for entry in entries):
        own, kept = (np.array([test(entry) for entry in entries]) for test in (lambda e, k=kind: e[0] == k, lambda e, k=kind: k not in e))
        projected[own] = data.x[own].astype(np.float64) @ _direction(data.x[kept], data.y[kept], [e for e, k in zip(entries, kept, strict=True) if k])
    spread = float(projected.std()) or 1.0
    slope, intercept = logistic(((projected - projected.mean()) / spread)[:, None], data.y, C=1.0, max_iter=2000)
    scale = float(slope[0]) / spread
    if scale <= 0:
        raise FitError(
            "mass-mean head: got a direction that does not carry over: kinds that it is made without lie on its wrong side. Add kinds of both classes"
        )
    direction = _direction(data.x, data.y, entries)
    return LinearHead((scale * direction).astype(np.float32), intercept - scale * float(projected.mean()))


def _direction(x: FloatArray, y: NDArray[np.int64], entries: Sequence[tuple[Hashable, ...]]) -> Float64:
    """Of norm 1, (p,)."""
    means = []
    for label, name in enumerate(("benign", "malicious")):
        kinds = [entry[0] if known == label else None for entry, known in zip(entries, y, strict=True)]
        found = [kind for kind in dict.fromkeys(kinds) if kind is not None]
        if not found:
            raise FitError(f"mass-mean head: without one of the kinds there is no {name} row left; expected at least two {name} kinds. Add kinds")
        means.append(np.mean([x[np.array([kind == one for kind in kinds])].mean(axis=0, dtype=np.float64) for one in found], axis=0))
    difference: Float64 = means[1] - means[0]
    norm = float(np.linalg.norm(difference))
    if norm < _NO_DIRECTION:
        raise FitError("mass-mean head: the benign and the malicious mean are the same; expected a difference. The recipe keeps no direction")
    return difference / norm
