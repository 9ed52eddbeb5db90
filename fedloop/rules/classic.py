"""Aggregation rules: from clients' deltas (n, d) and weights (n,) to one delta (d,).

    delta = AGGREGATORS["trimmed_mean"](deltas, weights, f=2)

Textbook definitions by default; `variant="official"` is what Safe-FedLLM's code computes instead,
for the tables that need it (OFFICIAL_OPTIONS). How weights enter, in every rule: rows of weight 0
are dropped first, so a rejected client cannot move any result, whatever it sent; n below counts the
rows that remain. What the remaining weights do:

- mean, geometric_median: weighted.
- all others: nothing. Their guarantees count clients, and num_examples is a client's word; one
  client, one vote.

`f` is the number of malicious rows to withstand: required where a rule uses it (trimmed_mean,
meamed, krum, multi_krum, nnm, dnc), accepted and without effect elsewhere. It must stay below n / 2
*after* rejected clients are gone: clamp it with `tolerable(rule, remaining clients)`. Every rule
raises AggregationError for input that is not finite, of another shape, without weight, or too few
for f. Inputs are torch tensors or NumPy arrays and are never modified; the result is a CPU tensor
of their type (float32 for half precision).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import AggregationError
from .compared import dnc, flame, foolsgold, lasa, residual
from .rows import (
    Array,
    StreamingMean,
    by_sorted_columns,
    check_f,
    combine,
    inner_products,
    squared_distances,
    vector,
    weighted_rows,
)

__all__ = [
    "AGGREGATORS",
    "OFFICIAL_OPTIONS",
    "PRE_AGGREGATORS",
    "StreamingMean",
    "aggregator",
    "tolerable",
]

Aggregator = Callable[..., Tensor]
Variant = Literal["textbook", "official"]
Neighbours = Literal["blanchard", "byzfl"]


def mean(deltas: Array, weights: Array, *, f: SupportsIndex = 0) -> Tensor:
    """The weighted mean, weights normalised to sum to 1. It withstands nobody.

    Source: FedAvg, McMahan et al. 2017 (arXiv:1602.05629). `StreamingMean` is the same, row by row.
    """
    rows, numbers, _ = weighted_rows(deltas, weights)
    total = StreamingMean()
    for row, weight in zip(rows, numbers / numbers.sum(), strict=True):
        total.add(row, weight)
    return total.result()


def median(
    deltas: Array, weights: Array, *, f: SupportsIndex = 0, variant: Variant = "textbook"
) -> Tensor:
    """The median of every coordinate.

    Args:
        variant: of an even number of rows, "textbook" takes the mean of the two middle values,
            "official" the lower one.

    Source: Yin et al. 2018 (arXiv:1803.01498).
    """
    _one_of("variant", variant, ("textbook", "official"))
    rows, _, _ = weighted_rows(deltas, weights)
    low, high = (len(rows) - 1) // 2, len(rows) // 2
    if variant == "official" or low == high:
        return by_sorted_columns(rows, lambda values: values[:, low])
    return by_sorted_columns(rows, lambda values: 0.5 * values[:, low] + 0.5 * values[:, high])


def trimmed_mean(
    deltas: Array, weights: Array, *, f: SupportsIndex, variant: Variant = "textbook"
) -> Tensor:
    """The mean of every coordinate without its f smallest and f largest values.

    Args:
        variant: "official" drops one value a side, whatever f.

    Source: Yin et al. 2018 (arXiv:1803.01498).
    """
    _one_of("variant", variant, ("textbook", "official"))
    rows, _, _ = weighted_rows(deltas, weights)
    n = len(rows)
    trimmed = check_f(1 if variant == "official" else f, n)
    return by_sorted_columns(
        rows, lambda values: values[:, trimmed : n - trimmed].mean(axis=1, dtype=np.float64)
    )


def meamed(deltas: Array, weights: Array, *, f: SupportsIndex) -> Tensor:
    """Mean around median: of every coordinate the mean of the n - f values nearest to its median.

    Source: Xie et al. 2018 (arXiv:1802.10116).
    """
    rows, _, _ = weighted_rows(deltas, weights)
    n = len(rows)
    used = n - check_f(f, n)

    def near_median(values: NDArray[Any]) -> NDArray[Any]:
        middle = 0.5 * values[:, (n - 1) // 2] + 0.5 * values[:, n // 2]
        nearest = np.argsort(np.abs(values - middle[:, None]), axis=1, kind="stable")[:, :used]
        chosen: NDArray[Any] = np.take_along_axis(values, nearest, axis=1).mean(
            axis=1, dtype=np.float64
        )
        return chosen

    return by_sorted_columns(rows, near_median)


def krum(
    deltas: Array,
    weights: Array,
    *,
    f: SupportsIndex,
    neighbours: Neighbours = "blanchard",
    variant: Variant = "textbook",
) -> Tensor:
    """The row whose nearest other rows are nearest.

    The least sum of squared distances to its n - f - 2 nearest.

    Equal scores, as of the two ends of a shortest distance when there is one neighbour, go to the
    shorter row. Blanchard et al. prove resilience for n > 2f + 2; with fewer rows there is at least
    one neighbour, and no proof.

    Args:
        neighbours: how many are summed. "blanchard" n - f - 2, as published; "byzfl" n - f - 1, as
            ByzFL does. The vectors recorded from ByzFL agree with both.
        variant: "official" sums distances without squaring them, to n - f - 1 neighbours, and
            returns the mean of the
            best row and those neighbours: closer to Multi-Krum.

    Source: Blanchard et al. 2017 (arXiv:1703.02757).
    """
    _one_of("variant", variant, ("textbook", "official"))
    rows, _, _ = weighted_rows(deltas, weights)
    products, kept = inner_products(rows), len(rows) - check_f(f, len(rows))
    if variant == "textbook":
        return combine(rows, _indicator(_krum_order(products, kept, neighbours)[:1], len(rows)))
    distances = np.sqrt(squared_distances(products))
    best = np.lexsort((np.diag(products), np.sort(distances, axis=1)[:, :kept].sum(axis=1)))[
        0
    ]  # its own 0 adds nothing
    return combine(rows, _indicator(np.argsort(distances[best], kind="stable")[:kept], len(rows)))


def multi_krum(
    deltas: Array,
    weights: Array,
    *,
    f: SupportsIndex,
    m: int | None = None,
    neighbours: Neighbours = "blanchard",
) -> Tensor:
    """The mean of the m rows with the best Krum scores.

    Args:
        m: how many; n - f if it is not given, as in ByzFL.
        neighbours: as in `krum`.

    Source: Blanchard et al. 2017 (arXiv:1703.02757), Multi-Krum.
    """
    rows, _, _ = weighted_rows(deltas, weights)
    kept = len(rows) - check_f(f, len(rows))
    chosen = kept if m is None else m
    if not 1 <= chosen <= len(rows):
        raise AggregationError(f"got m={m}; expected 1 to {len(rows)} rows of weight above 0")
    return combine(
        rows, _indicator(_krum_order(inner_products(rows), kept, neighbours)[:chosen], len(rows))
    )


def geometric_median(
    deltas: Array,
    weights: Array,
    *,
    f: SupportsIndex = 0,
    iterations: int = 3,
    smoothing: float = 1e-6,
) -> Tensor:
    """The weighted geometric median.

    The point of least weighted sum of distances, by smoothed Weiszfeld from zero.

    Args:
        iterations: three, as published and as in ByzFL, come close to the minimum; 100 reach it.
        smoothing: distances below smoothing x the (weighted) median distance count as that:
            relative, so that small deltas are not averaged (ByzFL's is 0.1, whatever the scale).

    Source: RFA, Pillutla et al. 2022 (arXiv:1912.13445).
    """
    if iterations < 1 or not 0 < smoothing < 1:
        raise AggregationError(
            f"got iterations={iterations}, smoothing={smoothing}; expected at least 1 iteration and"
            " a smoothing between 0 and 1"
        )
    rows, numbers, _ = weighted_rows(deltas, weights)
    products = inner_products(rows)
    point = np.zeros(len(rows))  # the median so far, as coefficients of the rows
    for _ in range(iterations):
        distances = _distances_to(point, products)
        least = smoothing * _weighted_median(distances, numbers)
        if least == 0:
            # Half of the weight lies on the point: it is a geometric median.
            break
        pull = numbers / np.maximum(distances, least)
        point = pull / pull.sum()
    return combine(rows, point)


def centered_clipping(
    deltas: Array,
    weights: Array,
    *,
    f: SupportsIndex = 0,
    tau: float | Literal["median"] = 10.0,
    iterations: int = 1,
    start: Array | None = None,
) -> Tensor:
    """From `start`, `iterations` times: add the mean of (row - point), each clipped to length tau.

    Args:
        tau: in the units of the deltas. Rows shorter than tau are not clipped at all, so the
            published 10 makes this a
            plain mean of LoRA deltas, which are far shorter: choose one, or "median" for the median
                distance.
        start: (d,), the former round's result; zero if it is not given.

    Source: Karimireddy et al. 2021 (arXiv:2012.10333); defaults as ByzFL's vectors.
    """
    if (
        iterations < 1
        or (isinstance(tau, str) and tau != "median")
        or (not isinstance(tau, str) and not tau > 0)
    ):
        raise AggregationError(
            f"got iterations={iterations}, tau={tau!r}; expected at least 1 iteration and a tau"
            " above 0 or 'median'"
        )
    rows, _, _ = weighted_rows(deltas, weights)
    n = len(rows)
    origin = None if start is None else vector(start, rows.shape[1], "start")
    products = inner_products(rows, None if origin is None else -origin)
    point = np.zeros(n)  # coefficients of the rows less the origin
    for _ in range(iterations):
        distances = _distances_to(point, products)
        longest = float(np.median(distances)) if isinstance(tau, str) else tau
        share = np.divide(longest, distances, out=np.ones(n), where=distances > longest) / n
        point = point * (1 - share.sum()) + share
    result = combine(rows, point)
    return result if origin is None else (result + (1 - point.sum()) * origin).to(rows.dtype)


def nnm(deltas: Array, weights: Array, *, f: SupportsIndex) -> Tensor:
    """Nearest-neighbour mixing, before another rule.

    Every row becomes the mean of its n - f nearest rows, itself included.

    Returns:
        (n, d) like the input, so that it is followed by `rule(mixed, weights, f=f)`; rows of weight
        0 are zero.

    Source: Allouah et al. 2023 (arXiv:2302.01772).
    """
    rows, _, kept = weighted_rows(deltas, weights)
    mixed = rows.new_zeros(len(kept), rows.shape[1])
    mixed[kept.nonzero()[0]] = combine(rows, _mixing(rows, f))
    return mixed


def nnm_mean(deltas: Array, weights: Array, *, f: SupportsIndex) -> Tensor:
    """The mean of the rows that `nnm` mixed.

    What the name "nnm" stands for where one delta is asked for.

    Not robust by itself, since a far row is mixed with itself: put a robust rule after
        PRE_AGGREGATORS["nnm"].
    """
    rows, _, _ = weighted_rows(deltas, weights)
    return combine(rows, _mixing(rows, f).mean(axis=0))


AGGREGATORS: dict[str, Aggregator] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "meamed": meamed,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "centered_clipping": centered_clipping,
    "nnm": nnm_mean,
    "foolsgold": foolsgold,
    "residual": residual,
    "dnc": dnc,
    "flame": flame,
    "lasa": lasa,
}
PRE_AGGREGATORS: dict[str, Aggregator] = {"nnm": nnm}

# What to pass to compute what Safe-FedLLM's code does in a first round. Besides, "flame" needs
# start= the global parameters
# and "lasa" sizes= the lengths of the parameters; fedadagrad, fedyogi and fedadam follow a mean of
# equal weights there.
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


def aggregator(name: str) -> Aggregator:
    """The rule of this name.

    Raises:
        AggregationError: there is none; the message lists the names there are.
    """
    _one_of("aggregator", name, tuple(AGGREGATORS))
    return AGGREGATORS[name]


def tolerable(rule: str, n: int) -> int:
    """The largest f that `rule` accepts for n rows of weight above 0, for all rules the largest
    below n / 2.

    Raises:
        AggregationError: an unknown rule, or n below 1.
    """
    aggregator(rule)
    if n < 1:
        raise AggregationError(
            f"got n={n}; expected at least one row of weight above 0. Skip the round instead."
        )
    return (n - 1) // 2


def _one_of(what: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise AggregationError(f"got {what} {value!r}; expected one of {', '.join(valid)}")


def _indicator(chosen: NDArray[np.intp], n: int) -> NDArray[np.float64]:
    """(n,) coefficients of the mean of the chosen rows."""
    coefficients = np.zeros(n)
    coefficients[chosen] = 1 / len(chosen)
    return coefficients


def _krum_order(
    products: NDArray[np.float64], kept: int, neighbours: Neighbours
) -> NDArray[np.intp]:
    """The rows from the best Krum score to the worst; kept = n - f."""
    _one_of("neighbours", neighbours, ("blanchard", "byzfl"))
    nearest = np.sort(squared_distances(products), axis=1)[:, 1:]  # without the row itself
    count = max(1, kept - (2 if neighbours == "blanchard" else 1))
    return np.lexsort((np.diag(products), nearest[:, :count].sum(axis=1)))


def _distances_to(point: NDArray[np.float64], products: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,): how far every row is from the point that these coefficients of the rows make."""
    squares = np.diag(products) - 2 * products @ point + point @ products @ point
    return np.sqrt(np.maximum(squares, 0.0))


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """The smallest value up to which half of the weight lies."""
    order = np.argsort(values, kind="stable")
    upto = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(upto, 0.5 * upto[-1])]])


def _mixing(rows: Tensor, f: SupportsIndex) -> NDArray[np.float64]:
    """(m, m): row i holds the coefficients of the mean of its nearest rows."""
    used = len(rows) - check_f(f, len(rows))
    nearest = np.argsort(squared_distances(inner_products(rows)), axis=1, kind="stable")[:, :used]
    return np.stack([_indicator(chosen, len(rows)) for chosen in nearest])
