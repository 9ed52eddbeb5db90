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

Entry = tuple[Hashable, ...]
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
    entries: list[Entry] = [(int(group),) for group in data.groups] if kinds is None else [tuple(entry) for entry in kinds]
    if len(entries) != len(data.y) or not all(entries):
        raise FitError(f"mass-mean head: got kinds of {sum(map(bool, entries))} rows for {len(data.y)} rows; expected at least its own for each")
    means = _KindMeans(data.x, data.y, entries)
    projected = np.empty(len(entries))
    for kind in dict.fromkeys(entry[0] for entry in entries):
        own = np.array([entry[0] == kind for entry in entries])
        projected[own] = data.x[own].astype(np.float64) @ means.direction(without=kind)
    spread = float(projected.std()) or 1.0
    slope, intercept = logistic(((projected - projected.mean()) / spread)[:, None], data.y, C=1.0, max_iter=2000)
    scale = float(slope[0]) / spread
    if scale <= 0:
        raise FitError(
            "mass-mean head: got a direction that does not carry over: kinds that it is made without lie on its wrong side. Add kinds of both classes"
        )
    return LinearHead((scale * means.direction()).astype(np.float32), intercept - scale * float(projected.mean()))


class _KindMeans:
    """Sums of the rows of one label and one entry, of which the mean of a kind is made with or without some of them."""

    def __init__(self, x: FloatArray, y: NDArray[np.int64], entries: Sequence[Entry]) -> None:
        keys = list(zip(y.tolist(), entries, strict=True))
        self.cells: list[tuple[int, Entry]] = list(dict.fromkeys(keys))
        index = {cell: number for number, cell in enumerate(self.cells)}
        rows = np.array([index[key] for key in keys])
        self.counts = np.bincount(rows)
        self.sums = np.stack([x[rows == number].sum(axis=0, dtype=np.float64) for number in range(len(self.cells))])  # (cells, p)

    def direction(self, without: Hashable | None = None) -> Float64:
        """From the mean benign kind to the mean malicious one, of norm 1 (p,); made of no row that has the kind `without` in it."""
        weights = np.zeros(len(self.cells))
        for label, (sign, name) in enumerate(((-1, "benign"), (1, "malicious"))):
            of_kind: dict[Hashable, list[int]] = {}
            for number, (known, entry) in enumerate(self.cells):
                if known == label and (without is None or without not in entry):
                    of_kind.setdefault(entry[0], []).append(number)
            if not of_kind:
                raise FitError(f"mass-mean head: without {without!r} there is no {name} row left; expected at least two {name} kinds. Add kinds")
            for cells in of_kind.values():
                weights[cells] = sign / (len(of_kind) * self.counts[cells].sum())
        difference: Float64 = weights @ self.sums
        norm = float(np.linalg.norm(difference))
        if norm < _NO_DIRECTION:
            raise FitError("mass-mean head: the benign and the malicious mean are the same; expected a difference. The recipe keeps no direction")
        return difference / norm
