"""What aggregation rules start from: checked rows, their inner products, the mean that streams.

Rows are clients' deltas (n, d), never parameters. Clients of weight 0 are left out before anything
is computed: 0 x NaN is NaN, so multiplying by their weight would not remove them. Long vectors are
read in blocks of columns and summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import AggregationError

Array = Tensor | NDArray[Any]
BLOCK = 1 << 16  # columns: 20 rows of float64 are 10 MB
BLOCK_NUMBERS = 1 << 24  # but no more numbers than this: 134 MB of float64, however many rows


@dataclass(frozen=True)
class Votes:
    """What a rule makes one delta of: the rows that count, and what a round brings beside them.

    Attributes:
        rows: (m, d), finite, each of weight above 0.
        weights: (m,), as they are.
        rng: of rules that draw; without it they draw nothing.
        sizes: lengths of the layers, in order, summing to d; None for one layer.
        start: (d,), where the deltas start from, or a rule's first point.
        history: (m, d), the sum of each client's deltas so far, this round's included.
    """

    rows: Tensor
    weights: NDArray[np.float64]
    rng: np.random.Generator | None = None
    sizes: Sequence[int] | None = None
    start: Tensor | None = None
    history: Tensor | None = None


def tensor(value: Array, name: str) -> Tensor:
    """The same numbers as a floating-point tensor on the CPU, outside of any graph.

    Half precision becomes float32.

    Raises:
        AggregationError: not a tensor or array of floating-point numbers.
    """
    if isinstance(value, np.ndarray) and value.dtype in (np.float16, np.float32, np.float64):
        contiguous = np.ascontiguousarray(value)
        value = torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = f"type {getattr(value, 'dtype', type(value).__name__)}"
        raise AggregationError(
            f"got {name} of {kind}; expected a torch tensor or NumPy array of floating-point"
            " numbers"
        )
    value = value.detach().cpu()
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def vector(value: Array, d: int, name: str) -> Tensor:
    """A checked (d,) tensor.

    Raises:
        AggregationError: another shape, not floating point, or NaN or infinity.
    """
    result = tensor(value, name)
    if result.shape != (d,):
        raise AggregationError(
            f"got {name} of shape {tuple(result.shape)}; expected ({d},): one number for each"
            " coordinate of a delta"
        )
    if not result.isfinite().all():
        raise AggregationError(f"got {name} with NaN or infinity; expected finite numbers")
    return result


def weighted_rows(
    deltas: Array, weights: Array
) -> tuple[Tensor, NDArray[np.float64], NDArray[np.bool_]]:
    """The rows that count.

    Returns:
        (m, d), their weights (m,) as they are, and (n,) which of the rows they are.

    Raises:
        AggregationError: not (n, d) and (n,), a weight that is negative or not finite, no weight
            above 0, or NaN or infinity in a row of positive weight.
    """
    rows = tensor(deltas, "deltas")
    if rows.ndim != 2 or 0 in rows.shape:
        raise AggregationError(
            f"got deltas of shape {tuple(rows.shape)}; expected (n, d), one row for each client"
        )
    numbers = positive_weights(weights, len(rows))
    mask = numbers > 0
    for index in np.flatnonzero(mask):
        if not rows[index].isfinite().all():
            raise AggregationError(
                f"got NaN or infinity in row {index} of weight {numbers[index]:g}; expected finite"
                " numbers. Reject the client."
            )
    return (rows if mask.all() else rows[torch.from_numpy(mask)]), numbers[mask], mask


def positive_weights(weights: Array, n: int) -> NDArray[np.float64]:
    """The weights (n,) as they are, float64.

    Raises:
        AggregationError: another shape, a weight that is negative or not finite, or no weight above
            0.
    """
    values = weights.detach().cpu().numpy() if isinstance(weights, Tensor) else weights
    try:
        numbers = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise AggregationError(
            f"got weights {weights!r}; expected one number for each client"
        ) from error
    if numbers.shape != (n,):
        raise AggregationError(
            f"got weights of shape {numbers.shape}; expected ({n},), one for each client"
        )
    if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
        raise AggregationError(
            f"got weights {numbers.tolist()}; expected finite numbers of at least 0"
        )
    if not numbers.any():
        raise AggregationError(
            f"got {n} weights that are all 0; expected at least one above 0. Skip the round: nobody"
            " is left to aggregate."
        )
    return numbers


def tolerable(n: int) -> int:
    """The largest f that rules accept for n rows of weight above 0: the largest below n / 2.

    Raises:
        AggregationError: n is below 1.
    """
    if n < 1:
        raise AggregationError(
            f"got n={n}; expected at least one row of weight above 0. Skip the round instead."
        )
    return (n - 1) // 2


def check_f(f: int, n: int) -> int:
    """The number of malicious rows to withstand, if n rows can withstand as many.

    Raises:
        AggregationError: half of the rows or more.
    """
    if 2 * f >= n:
        raise AggregationError(
            f"Cannot tolerate 2f >= n: got f={f}, n={n}; expected f of at most {tolerable(n)}."
            " n counts rows of weight above 0: give a smaller f (see tolerable) or sample more"
            " clients."
        )
    return f


def inner_products(rows: Tensor, shift: Tensor | None = None) -> NDArray[np.float64]:
    """(n, n) float64: the inner products of all rows, each row plus `shift` (d,) if it is given.

    Raises:
        AggregationError: they overflow.
    """
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in _columns(rows):
        block = rows[:, part].double()
        if shift is not None:
            block = block + shift[part]
        total += block @ block.T
    if not total.isfinite().all():
        raise AggregationError(
            "got deltas so long that their inner products overflow; expected lengths below 1e150."
            " Reject such clients first."
        )
    # Rounding must not make a distance depend on its direction.
    return (0.5 * (total + total.T)).numpy()


def squared_distances(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, n) from inner products: squared distances between all rows, exactly 0 on the diagonal."""
    squares = np.diag(products)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0)
    np.fill_diagonal(distances, 0.0)
    return distances


def combine(rows: Tensor, coefficients: NDArray[np.float64]) -> Tensor:
    """The sum of coefficient x row: (m,) -> (d,), or (k, m) -> (k, d).

    Summed in float64, in the rows' own type.
    """
    factors = torch.from_numpy(np.ascontiguousarray(coefficients, dtype=np.float64))
    result = torch.empty(*factors.shape[:-1], rows.shape[1], dtype=rows.dtype)
    for part in _columns(rows):
        result[..., part] = factors @ rows[:, part].double()
    return result


def by_sorted_columns(rows: Tensor, function: Callable[[NDArray[Any]], NDArray[Any]]) -> Tensor:
    """(d,): `function`, (columns, n) -> (columns,), of every coordinate's sorted values."""
    result = torch.empty(rows.shape[1], dtype=rows.dtype)
    for part in _columns(rows):
        # Copied so that each coordinate's values lie together: many times faster to sort than
        # across rows.
        values = rows[:, part].numpy().T.copy()
        values.sort(axis=1)
        result[part] = torch.from_numpy(function(values))
    return result


def _columns(rows: Tensor) -> Iterator[slice]:
    """The columns of rows (n, d) in blocks that fit into memory.

    The rows themselves may lie in a mapped file.
    """
    width = max(1, min(BLOCK, BLOCK_NUMBERS // len(rows)))
    return (slice(start, start + width) for start in range(0, rows.shape[1], width))


class StreamingMean:
    """The weighted mean of deltas that come one at a time: O(d) memory, however many there are.

    It adds in the order of `add`, in float64: the same order gives the same result bit for bit,
    another order one that may differ in the last bits. A delta of weight 0 is not looked at.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._dtype = torch.float32
        self._total = 0.0

    def add(self, delta: Array, weight: float) -> None:
        """Count a delta (d,) with a weight of at least 0.

        Raises:
            AggregationError: a weight that is not valid, or a delta of another length or with NaN
                or infinity.
        """
        if not (np.isfinite(weight) and weight >= 0):
            raise AggregationError(f"got weight {weight!r}; expected a finite number of at least 0")
        if weight == 0:
            return
        row = tensor(delta, "delta")
        row = vector(row, len(self._sum) if self._sum is not None else row.numel(), "delta")
        if self._sum is None:
            self._sum, self._dtype = torch.zeros(len(row), dtype=torch.float64), row.dtype
        self._sum.add_(row, alpha=float(weight))
        self._total += float(weight)

    def result(self) -> Tensor:
        """The mean so far (d,), in the type of the first delta.

        Raises:
            AggregationError: nothing of weight above 0 was added, or the sum overflowed.
        """
        if self._sum is None:
            raise AggregationError(
                "got no delta of weight above 0; expected at least one. Skip the round: nobody is"
                " left to aggregate."
            )
        mean = (self._sum / self._total).to(self._dtype)
        if not mean.isfinite().all():
            raise AggregationError(
                "got deltas or weights so large that their sum overflows; expected weights that sum"
                " to about 1"
            )
        return mean
