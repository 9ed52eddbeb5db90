"""How clients' LoRA factors become one.

Of one module, pairs A (r, d_in), B (d_out, r) and weights (n,).

The model uses the product B A, and the mean of products is not the product of means: averaging A
and B separately, as FedAvg on LoRA and the paper do, is another update than the clients' average.
Three ways:

- "factors": A and B separately (the paper's).
- "exact": the same factors, and what they miss, as a residual that goes into the frozen base weight
  (FedEx-LoRA).
- "frozen_a": A is never trained and the same for all, so that averaging B is exact (FFA-LoRA).

These take the trained factors, not factor deltas: a product of deltas is not a delta of products.
Weights are normalised to sum to 1; clients of weight 0 are dropped before anything is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AggregationError
from .rows import Array, positive_weights, tensor

Pair = tuple[Array, Array]


@dataclass(frozen=True)
class AggregatedPair:
    """The new global factors of one module.

    Attributes:
        A: (r, d_in).
        B: (d_out, r).
        left: (d_out, k) float64, and right (k, d_in) float64: left @ right is what to add to the
            base weight, with the LoRA scaling in it. None where nothing is to be added; k is the
            sum of the clients' ranks and r.
        right: see left.
    """

    A: Tensor
    B: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def residual(self) -> Tensor | None:
        """The dense (d_out, d_in) float64 change of the base weight, or None if there is none."""
        return None if self.left is None or self.right is None else self.left @ self.right


def average_factors(
    pairs: Sequence[Pair], weights: Array, *, pad: bool = False, scaling: float = 1.0
) -> AggregatedPair:
    """The weighted means of A and of B.

    Args:
        pad: bring smaller ranks to the largest with zeros (rows of A, columns of B), which leaves
            each product as it is. With "exact" the result is exact all the same; with "factors", a
            zero pulls the mean towards zero. All must
            share one scaling: fold alpha / r of each rank into B first.
        scaling: alpha / r; only a residual needs it.

    Raises:
        AggregationError: no weight above 0, factors that are not matrices of fitting shapes or not
            finite, or different ranks without pad.

    Source: arXiv:2601.07177 (FedAvg on LoRA); zero padding as HetLoRA, Cho et al. 2024
        (arXiv:2401.06432).
    """
    factors, shares = _weighted_pairs(pairs, weights, pad)
    A = sum(share * A.double() for share, (A, _) in zip(shares, factors, strict=True))
    B = sum(share * B.double() for share, (_, B) in zip(shares, factors, strict=True))
    return AggregatedPair(
        torch.as_tensor(A).to(factors[0][0].dtype), torch.as_tensor(B).to(factors[0][1].dtype)
    )


def average_exactly(
    pairs: Sequence[Pair], weights: Array, *, pad: bool = False, scaling: float = 1.0
) -> AggregatedPair:
    """The means of A and of B, and the residual.

    Scaling x (mean of B_k A_k - mean B x mean A), in factored form.

    base + residual + scaling x B A is then the weighted mean of the clients' weights, up to the
    residual's float64: it is taken against A and B as returned, so their rounding is in it.

    Args:
        pad: as in `average_factors`.
        scaling: alpha / r of the module.

    Source: FedEx-LoRA, Singhal et al. 2024 (arXiv:2410.09432).
    """
    if not abs(scaling) < float("inf"):
        raise AggregationError(f"got scaling={scaling}; expected a finite number, alpha / r")
    mean = average_factors(pairs, weights, pad=pad)
    factors, shares = _weighted_pairs(pairs, weights, pad)
    left = torch.cat(
        [scaling * share * B.double() for share, (_, B) in zip(shares, factors, strict=True)]
        + [-scaling * mean.B.double()],
        dim=1,
    )
    right = torch.cat([A.double() for A, _ in factors] + [mean.A.double()], dim=0)
    return AggregatedPair(mean.A, mean.B, left, right)


def average_frozen_a(
    pairs: Sequence[Pair], weights: Array, *, pad: bool = False, scaling: float = 1.0
) -> AggregatedPair:
    """A as it is and the weighted mean of B: exact, since B A is linear in B.

    Raises:
        AggregationError: as `average_factors`, or the clients' A are not equal, number for number:
            somebody trained or replaced it. Padding does not help: the A of different ranks are
            different.

    Source: FFA-LoRA, Sun et al. 2024 (arXiv:2403.12313).
    """
    factors, shares = _weighted_pairs(pairs, weights, False)
    first = factors[0][0]
    differing = [index for index, (A, _) in enumerate(factors) if not torch.equal(A, first)]
    if differing:
        raise AggregationError(
            f"got {len(differing)} of {len(factors)} clients whose A differs from the first one's;"
            " expected one frozen A. Reject clients that changed it, or use 'factors' or 'exact'."
        )
    B = sum(share * B.double() for share, (_, B) in zip(shares, factors, strict=True))
    return AggregatedPair(first.clone(), torch.as_tensor(B).to(factors[0][1].dtype))


def exact_residual(
    pairs: Sequence[Pair], weights: Array, scaling: float = 1.0, *, pad: bool = False
) -> Tensor:
    """Only the residual of `average_exactly`, dense (d_out, d_in) float64.

    What to add to the base weight.

    Raises:
        AggregationError: as `average_factors`.
    """
    mean = average_exactly(pairs, weights, pad=pad, scaling=scaling)
    return torch.as_tensor(mean.residual())


LORA_AGGREGATION: dict[str, Callable[..., AggregatedPair]] = {
    "factors": average_factors,
    "exact": average_exactly,
    "frozen_a": average_frozen_a,
}


def lora_aggregation(name: str) -> Callable[..., AggregatedPair]:
    """The way of this name.

    Raises:
        AggregationError: there is none; the message lists the names there are.
    """
    if name not in LORA_AGGREGATION:
        raise AggregationError(
            f"got LoRA aggregation {name!r}; expected one of {', '.join(LORA_AGGREGATION)}"
        )
    return LORA_AGGREGATION[name]


def _weighted_pairs(
    pairs: Sequence[Pair], weights: Array, pad: bool
) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """The checked pairs of weight above 0, of one rank, and their shares, which sum to 1."""
    numbers = positive_weights(weights, len(pairs))
    factors = [_checked(pairs[index], index) for index, weight in enumerate(numbers) if weight > 0]
    shares = [float(weight) for weight in numbers[numbers > 0] / numbers.sum()]
    outer = {(B.shape[0], A.shape[1]) for A, B in factors}
    if len(outer) > 1:
        raise AggregationError(
            f"got factors of modules of (d_out, d_in) {sorted(outer)}; expected one module's"
        )
    ranks = [len(A) for A, _ in factors]
    if len(set(ranks)) > 1 and not pad:
        raise AggregationError(
            f"got ranks {ranks}; expected equal ones. Use pad=True to fill up with zeros, and"
            " 'exact' to average the products."
        )
    return [_padded(A, B, max(ranks)) for A, B in factors], shares


def _checked(pair: Pair, index: int) -> tuple[Tensor, Tensor]:
    A, B = tensor(pair[0], f"A of client {index}"), tensor(pair[1], f"B of client {index}")
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise AggregationError(
            f"got A {tuple(A.shape)} and B {tuple(B.shape)} of client {index}; expected (r, d_in)"
            " and (d_out, r)"
        )
    if not (A.isfinite().all() and B.isfinite().all()):
        raise AggregationError(
            f"got NaN or infinity in the factors of client {index}; expected finite numbers. Reject"
            " the client."
        )
    return A, B


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - len(A)
    if not missing:
        return A, B
    return torch.cat([A, A.new_zeros(missing, A.shape[1])]), torch.cat(
        [B, B.new_zeros(B.shape[0], missing)], dim=1
    )
