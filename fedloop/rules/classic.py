"""Robust aggregation rules, textbook definitions: frozen options, each with its `aggregate`.

They are called through `fedloop.AGGREGATORS` or as a rule of `fedloop.make_rule`, where it says how
weights enter. `variant="official"` is what Safe-FedLLM's code computes instead, for the tables that
need it (OFFICIAL_OPTIONS). Every rule has `f`, the number of malicious rows to withstand: required
where a rule uses it, accepted and without effect elsewhere, so that rules can be exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..checks import Checked, Validity, integer, number, one_of, or_none
from ..errors import AggregationError
from .rows import (
    StreamingMean,
    Votes,
    by_sorted_columns,
    check_f,
    combine,
    inner_products,
    squared_distances,
    vector,
)

Variant = Literal["textbook", "official"]

_TAU = number(above=0)
# Field -> what is valid; a name means the same in every rule that has it.
_VALID: Mapping[str, Validity] = {
    "f": integer(0),
    "variant": one_of(("textbook", "official")),
    "m": or_none(integer(1)),
    "iterations": integer(1),
    "smoothing": number(above=0, below=1),
    "tau": Validity(
        lambda value: value == "median" if isinstance(value, str) else _TAU.holds(value),
        "a finite number above 0, or 'median'",
    ),
}


class _Options(Checked):
    valid = _VALID


@dataclass(frozen=True)
class Mean(_Options):
    """The weighted mean, weights normalised to sum to 1. It withstands nobody.

    Source: FedAvg, McMahan et al. 2017 (arXiv:1602.05629). `StreamingMean` is the same, row by row.
    """

    f: int = 0

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,)."""
        total = StreamingMean()
        shares = votes.weights / votes.weights.sum()
        for row, share in zip(votes.rows, shares, strict=True):
            total.add(row, share)
        return total.result()


@dataclass(frozen=True)
class Median(_Options):
    """The median of every coordinate.

    Attributes:
        variant: of an even number of rows, "textbook" takes the mean of the two middle values,
            "official" the lower one.

    Source: Yin et al. 2018 (arXiv:1803.01498).
    """

    f: int = 0
    variant: Variant = "textbook"

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,)."""
        low = (len(votes.rows) - 1) // 2
        high = len(votes.rows) // 2
        if self.variant == "official" or low == high:
            return by_sorted_columns(votes.rows, lambda values: values[:, low])
        return by_sorted_columns(
            votes.rows, lambda values: 0.5 * values[:, low] + 0.5 * values[:, high]
        )


@dataclass(frozen=True)
class TrimmedMean(_Options):
    """The mean of every coordinate without its f smallest and f largest values.

    Attributes:
        variant: "official" drops one value a side, whatever f.

    Source: Yin et al. 2018 (arXiv:1803.01498).
    """

    f: int
    variant: Variant = "textbook"

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,)."""
        n = len(votes.rows)
        trimmed = check_f(1 if self.variant == "official" else self.f, n)
        return by_sorted_columns(
            votes.rows, lambda values: values[:, trimmed : n - trimmed].mean(axis=1, dtype=float)
        )


@dataclass(frozen=True)
class Meamed(_Options):
    """Mean around median: of every coordinate the mean of the n - f values nearest to its median.

    Source: Xie et al. 2018 (arXiv:1802.10116).
    """

    f: int

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,)."""
        n = len(votes.rows)
        used = n - check_f(self.f, n)

        def near_median(values: NDArray[Any]) -> NDArray[Any]:
            middle = 0.5 * values[:, (n - 1) // 2] + 0.5 * values[:, n // 2]
            nearest = np.argsort(np.abs(values - middle[:, None]), axis=1, kind="stable")
            used_values = np.take_along_axis(values, nearest[:, :used], axis=1)
            means: NDArray[Any] = used_values.mean(axis=1, dtype=np.float64)
            return means

        return by_sorted_columns(votes.rows, near_median)


@dataclass(frozen=True)
class Krum(_Options):
    """The row whose nearest other rows are nearest: least sum of squares to its n - f - 2 nearest.

    Equal scores, as of the two ends of a shortest distance when there is one neighbour, go to the
    shorter row. Blanchard et al. prove resilience for n > 2f + 2; with fewer rows there is at least
    one neighbour, and no proof.

    Attributes:
        variant: "official" sums distances without squaring them, to n - f - 1 neighbours, and
            returns the mean of the best row and those neighbours: closer to Multi-Krum.

    Source: Blanchard et al. 2017 (arXiv:1703.02757).
    """

    f: int
    variant: Variant = "textbook"

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,)."""
        rows = votes.rows
        products = inner_products(rows)
        honest = len(rows) - check_f(self.f, len(rows))
        if self.variant == "textbook":
            best = _krum_order(products, honest)[:1]
            return combine(rows, _indicator(best, len(rows)))
        distances = np.sqrt(squared_distances(products))
        sums = np.sort(distances, axis=1)[:, :honest].sum(axis=1)  # a row's own 0 adds nothing
        best = np.lexsort((np.diag(products), sums))[0]
        nearest = np.argsort(distances[best], kind="stable")[:honest]
        return combine(rows, _indicator(nearest, len(rows)))


@dataclass(frozen=True)
class MultiKrum(_Options):
    """The mean of the m rows with the best Krum scores.

    Attributes:
        m: how many; n - f if it is None, as in ByzFL.

    Source: Blanchard et al. 2017 (arXiv:1703.02757), Multi-Krum.
    """

    f: int
    m: int | None = None

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,)."""
        rows = votes.rows
        honest = len(rows) - check_f(self.f, len(rows))
        count = honest if self.m is None else self.m
        if count > len(rows):
            raise AggregationError(
                f"got m={self.m}; expected 1 to {len(rows)} rows of weight above 0"
            )
        order = _krum_order(inner_products(rows), honest)
        return combine(rows, _indicator(order[:count], len(rows)))


@dataclass(frozen=True)
class GeometricMedian(_Options):
    """The weighted geometric median, the point of least weighted sum of distances.

    By smoothed Weiszfeld from zero.

    Attributes:
        iterations: three, as published and as in ByzFL, come close to the minimum; 100 reach it.
        smoothing: distances below smoothing x the (weighted) median distance count as that:
            relative, so that small deltas are not averaged (ByzFL's is 0.1, whatever the scale).

    Source: RFA, Pillutla et al. 2022 (arXiv:1912.13445).
    """

    f: int = 0
    iterations: int = 3
    smoothing: float = 1e-6

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,)."""
        products = inner_products(votes.rows)
        point = np.zeros(len(votes.rows))  # the median so far, as coefficients of the rows
        for _ in range(self.iterations):
            distances = _distances_to(point, products)
            least = self.smoothing * _weighted_median(distances, votes.weights)
            if least == 0:
                # Half of the weight lies on the point: it is a geometric median.
                break
            pull = votes.weights / np.maximum(distances, least)
            point = pull / pull.sum()
        return combine(votes.rows, point)


@dataclass(frozen=True)
class CenteredClipping(_Options):
    """From `start`, `iterations` times: add the mean of (row - point), each clipped to length tau.

    It starts at zero unless `Votes.start` says otherwise.

    Attributes:
        tau: in the units of the deltas. Rows shorter than tau are not clipped at all, so the
            published 10 makes this a plain mean of LoRA deltas, which are far shorter: choose one,
            or "median" for the median distance.

    Source: Karimireddy et al. 2021 (arXiv:2012.10333); defaults as ByzFL's vectors.
    """

    f: int = 0
    tau: float | Literal["median"] = 10.0
    iterations: int = 1

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,)."""
        rows = votes.rows
        n = len(rows)
        origin = None if votes.start is None else vector(votes.start, rows.shape[1], "start")
        products = inner_products(rows, None if origin is None else -origin)
        point = np.zeros(n)  # coefficients of the rows less the origin
        for _ in range(self.iterations):
            distances = _distances_to(point, products)
            longest = float(np.median(distances)) if isinstance(self.tau, str) else self.tau
            share = np.divide(longest, distances, out=np.ones(n), where=distances > longest) / n
            point = point * (1 - share.sum()) + share
        result = combine(rows, point)
        return result if origin is None else (result + (1 - point.sum()) * origin).to(rows.dtype)


@dataclass(frozen=True)
class NNM(_Options):
    """The mean of the rows that nearest-neighbour mixing made.

    Not robust by itself, since a far row is mixed with itself: put it before a robust rule,
    `make_rule("krum", f=2, pre="nnm")`.

    Source: Allouah et al. 2023 (arXiv:2302.01772).
    """

    f: int

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,)."""
        return combine(votes.rows, _mixing(votes.rows, self.f).mean(axis=0))


def mixed_rows(rows: Tensor, f: int) -> Tensor:
    """Nearest-neighbour mixing: every row (m, d) becomes the mean of its m - f nearest rows.

    A row is among its own nearest.

    Source: Allouah et al. 2023 (arXiv:2302.01772).
    """
    return combine(rows, _mixing(rows, f))


# What to pass to compute what Safe-FedLLM's code does in a first round. Besides, "flame" needs
# start= the global parameters and "lasa" sizes= the lengths of the parameters; fedadagrad, fedyogi
# and fedadam follow a mean of equal weights there.
OFFICIAL_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "mean": {},
    "median": {"variant": "official"},
    "trimmed_mean": {"variant": "official"},
    "krum": {"variant": "official"},
    "foolsgold": {},
    "residual": {},
    "dnc": {},
    "flame": {},
    "lasa": {},
}


def _indicator(indices: NDArray[np.intp], n: int) -> NDArray[np.float64]:
    """(n,) coefficients of the mean of the chosen rows."""
    coefficients = np.zeros(n)
    coefficients[indices] = 1 / len(indices)
    return coefficients


def _krum_order(products: NDArray[np.float64], honest: int) -> NDArray[np.intp]:
    """The rows from the best Krum score to the worst; honest = n - f."""
    nearest = np.sort(squared_distances(products), axis=1)[:, 1:]  # without the row itself
    sums = nearest[:, : max(1, honest - 2)].sum(axis=1)
    return np.lexsort((np.diag(products), sums))


def _distances_to(point: NDArray[np.float64], products: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,): how far every row is from the point that these coefficients of the rows make."""
    squares = np.diag(products) - 2 * products @ point + point @ products @ point
    return np.sqrt(np.maximum(squares, 0.0))


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """The smallest value up to which half of the weight lies."""
    order = np.argsort(values, kind="stable")
    upto = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(upto, 0.5 * upto[-1])]])


def _mixing(rows: Tensor, f: int) -> NDArray[np.float64]:
    """(m, m): row i holds the coefficients of the mean of its nearest rows."""
    used = len(rows) - check_f(f, len(rows))
    nearest = np.argsort(squared_distances(inner_products(rows)), axis=1, kind="stable")[:, :used]
    return np.stack([_indicator(indices, len(rows)) for indices in nearest])
