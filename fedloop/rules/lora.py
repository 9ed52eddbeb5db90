"""How clients' LoRA factors become one, and what that loses of their average.

The model uses the product B A of a module's A (r, d_in) and B (d_out, r), and the mean of products
is not the product of means: averaging A and B separately, as FedAvg on LoRA and the paper do, is
another update than the clients' average (86 % apart for random factors). Three ways:

- "factors": A and B separately (the paper's, arXiv:2601.07177).
- "exact": the same factors, and what they miss, `exact_residual`, goes into the frozen base weight
  (FedEx-LoRA, Singhal et al. 2024, arXiv:2410.09432).
- "frozen_a": A is never trained and the same for all, so that averaging B is exact (FFA-LoRA, Sun
  et al. 2024, arXiv:2403.12313).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import AggregationError
from .rows import Array, positive_weights, tensor

LORA_AGGREGATION = ("factors", "exact", "frozen_a")

Pair = tuple[Array, Array]


def exact_residual(
    pairs: Sequence[Pair], weights: Array, averaged: Pair, *, scaling: float
) -> Tensor:
    """What one pair loses of the clients' average: scaling x (mean of B_k A_k - B A).

    base + residual + scaling x B A is then the weighted mean of the clients' weights, up to the
    residual's float64: the rounding of A and B is in it.

    Args:
        pairs: the clients' trained A (r, d_in) and B (d_out, r), not their changes: a product of
            changes is not a change of products.
        weights: (n,); they are normalised to sum to 1, and clients of weight 0 are dropped before
            anything is looked at.
        averaged: A and B of the new global LoRA.
        scaling: alpha / r of the module.

    Returns:
        (d_out, d_in) float64, to be added to the base weight.

    Raises:
        AggregationError: no weight above 0, factors that are not finite matrices of one module, or
            a scaling that is not finite.
    """
    if not abs(scaling) < float("inf"):
        raise AggregationError(f"got scaling={scaling}; expected a finite number, alpha / r")
    numbers = positive_weights(weights, len(pairs))
    counted = [(index, weight) for index, weight in enumerate(numbers) if weight > 0]
    A, B = _checked(averaged, "the average")
    lefts = [-scaling * B]
    rights = [A]
    for index, weight in counted:
        A_k, B_k = _checked(pairs[index], f"client {index}")
        lefts.append(scaling * float(weight / numbers.sum()) * B_k)
        rights.append(A_k)
    shapes = {(left.shape[0], right.shape[1]) for left, right in zip(lefts, rights, strict=True)}
    if len(shapes) > 1:
        raise AggregationError(
            f"got factors of modules of (d_out, d_in) {sorted(shapes)}; expected one module's"
        )
    return torch.cat(lefts, dim=1) @ torch.cat(rights, dim=0)


def _checked(pair: Pair, whose: str) -> tuple[Tensor, Tensor]:
    """A and B in float64."""
    A = tensor(pair[0], f"A of {whose}").double()
    B = tensor(pair[1], f"B of {whose}").double()
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise AggregationError(
            f"got A {tuple(A.shape)} and B {tuple(B.shape)} of {whose}; expected (r, d_in) and"
            " (d_out, r)"
        )
    if not (A.isfinite().all() and B.isfinite().all()):
        raise AggregationError(
            f"got NaN or infinity in the factors of {whose}; expected finite numbers. Reject the"
            " client."
        )
    return A, B
