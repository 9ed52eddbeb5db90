"""Exact aggregation is exact, averaging factors is not; ranks, frozen A and rejected clients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedloop.errors import AggregationError
from fedloop.rules.lora import (
    LORA_AGGREGATION,
    average_exactly,
    average_factors,
    average_frozen_a,
    exact_residual,
    lora_aggregation,
)

SCALING = 2.0
WEIGHTS = torch.tensor([3.0, 1.0, 0.5, 2.0], dtype=torch.float64)
Pairs = list[tuple[Tensor, Tensor]]


def clients(
    ranks: tuple[int, ...] = (4, 4, 4, 4), dtype: torch.dtype = torch.float64, frozen: bool = False
) -> Pairs:
    rng = torch.Generator().manual_seed(0)
    pairs = [
        (
            torch.randn(r, 24, generator=rng, dtype=torch.float64),
            torch.randn(12, r, generator=rng, dtype=torch.float64),
        )
        for r in ranks
    ]
    return [((pairs[0][0] if frozen else A).to(dtype), B.to(dtype)) for A, B in pairs]


def wanted(pairs: Pairs, weights: Tensor = WEIGHTS) -> Tensor:
    """The weighted mean of the clients' products."""
    products = torch.stack([SCALING * B.double() @ A.double() for A, B in pairs])
    return torch.einsum("n,nij->ij", weights / weights.sum(), products)


def gap(name: str, pairs: Pairs, **options: Any) -> float:
    """How far the new global product, with what goes into the base, is from it; relative."""
    mean = LORA_AGGREGATION[name](pairs, WEIGHTS, scaling=SCALING, **options)
    product = SCALING * mean.B.double() @ mean.A.double()
    residual = mean.residual()
    return float(
        (product + (0 if residual is None else residual) - wanted(pairs)).norm()
        / wanted(pairs).norm()
    )


def test_exact_is_exact_and_factors_are_not() -> None:
    assert gap("exact", clients()) < 1e-10
    assert gap("factors", clients()) > 0.5
    assert gap("frozen_a", clients(frozen=True)) < 1e-10
    assert gap("factors", clients(frozen=True)) < 1e-10  # with one A the two agree


def test_rounding_of_what_is_sent_is_in_the_residual() -> None:
    pairs = clients(dtype=torch.float32)
    mean = average_exactly(pairs, WEIGHTS, scaling=SCALING)
    assert (mean.A.dtype, mean.B.dtype) == (torch.float32, torch.float32)
    assert gap("exact", pairs) < 1e-10


def test_the_means_are_those_of_the_factors() -> None:
    pairs = clients()
    shares = WEIGHTS / WEIGHTS.sum()
    for average in (average_factors, average_exactly):
        mean = average(pairs, WEIGHTS)
        torch.testing.assert_close(
            mean.A, torch.einsum("n,nij->ij", shares, torch.stack([A for A, _ in pairs]))
        )
        torch.testing.assert_close(
            mean.B, torch.einsum("n,nij->ij", shares, torch.stack([B for _, B in pairs]))
        )
    assert average_factors(pairs, WEIGHTS).residual() is None


def test_the_residual_is_factored_until_it_is_asked_for() -> None:
    pairs = clients()
    mean = average_exactly(pairs, WEIGHTS, scaling=SCALING)
    assert mean.left is not None
    assert mean.right is not None
    assert (tuple(mean.left.shape), tuple(mean.right.shape)) == ((12, 20), (20, 24))
    torch.testing.assert_close(
        exact_residual(pairs, WEIGHTS, SCALING), wanted(pairs) - SCALING * mean.B @ mean.A
    )
    alike = average_exactly([pairs[0]] * 3, torch.ones(3)).residual()
    assert alike is not None
    assert alike.abs().max() < 1e-12  # clients that agree leave nothing behind


def test_padding_keeps_products_and_different_ranks_need_it() -> None:
    pairs = clients((2, 4, 1, 3))
    for name in LORA_AGGREGATION:
        with pytest.raises(AggregationError, match=r"got ranks \[2, 4, 1, 3\].*pad=True"):
            LORA_AGGREGATION[name](pairs, WEIGHTS)
    assert gap("exact", pairs, pad=True) < 1e-10
    assert gap("factors", pairs, pad=True) > 0.5
    mean = average_factors(pairs, WEIGHTS, pad=True)
    assert (tuple(mean.A.shape), tuple(mean.B.shape)) == ((4, 24), (12, 4))
    # The rank of a rejected client does not count.
    assert average_factors(pairs, torch.tensor([1.0, 0, 1, 1]), pad=True).A.shape == (3, 24)
    with pytest.raises(AggregationError, match="got ranks"):
        average_frozen_a(pairs, WEIGHTS, pad=True)


def test_a_changed_a_is_not_frozen() -> None:
    pairs = clients(frozen=True)
    mean = average_frozen_a(pairs, WEIGHTS)
    assert torch.equal(mean.A, pairs[0][0])
    assert mean.A.data_ptr() != pairs[0][0].data_ptr()
    assert mean.residual() is None
    A = pairs[2][0].clone()
    A[0, 0] += 1e-9
    pairs[2] = (A, pairs[2][1])
    with pytest.raises(AggregationError, match="got 1 of 4 clients whose A differs"):
        average_frozen_a(pairs, WEIGHTS)
    rejected = WEIGHTS.clone()
    rejected[2] = 0
    assert torch.equal(average_frozen_a(pairs, rejected).A, pairs[0][0])


@pytest.mark.parametrize("name", LORA_AGGREGATION)
def test_a_client_of_weight_zero_moves_nothing_and_inputs_stay(name: str) -> None:
    pairs, weights = clients(frozen=True), torch.tensor([3.0, 0.0, 0.5, 2.0])
    expected = LORA_AGGREGATION[name]([pairs[0], *pairs[2:]], weights[weights > 0])
    bad: Any
    for bad in (
        torch.full((4, 24), math.nan),
        torch.full((4, 24), 1e30),
        torch.zeros(7, 3),
        "nothing",
    ):
        result = LORA_AGGREGATION[name]([pairs[0], (bad, pairs[1][1]), *pairs[2:]], weights)
        assert torch.equal(result.A, expected.A)
        assert torch.equal(result.B, expected.B)
        assert (result.residual() is None) == (expected.residual() is None)
    weights[1] = 1e-6
    with pytest.raises(AggregationError, match="client 1"):
        LORA_AGGREGATION[name](
            [pairs[0], (torch.full((4, 24), math.nan), pairs[1][1]), *pairs[2:]], weights
        )
    arrays = [(A.numpy(), B.numpy()) for A, B in pairs]
    LORA_AGGREGATION[name](arrays, weights.numpy())
    assert all(
        np.array_equal(A, B)
        for pair, same in zip(arrays, clients(frozen=True), strict=True)
        for A, B in zip(pair, same, strict=True)
    )


@pytest.mark.parametrize("name", LORA_AGGREGATION)
def test_what_is_not_one_modules_factors_is_refused(name: str) -> None:
    pairs = clients(frozen=True)
    average = LORA_AGGREGATION[name]
    other = (torch.ones(4, 24, dtype=torch.float64), torch.ones(13, 4, dtype=torch.float64))
    for wrong, weights, message in (
        ([*pairs[:3], other], WEIGHTS, r"expected one module's"),
        (
            [(pairs[0][1], pairs[0][0]), *pairs[1:]],
            WEIGHTS,
            r"expected \(r, d_in\) and \(d_out, r\)",
        ),
        ([(pairs[0][0][0], pairs[0][1]), *pairs[1:]], WEIGHTS, r"expected \(r, d_in\)"),
        ([(pairs[0][0].long(), pairs[0][1]), *pairs[1:]], WEIGHTS, "floating-point"),
        (pairs, WEIGHTS[:3], r"expected \(4,\)"),
        (pairs, 0 * WEIGHTS, "Skip the round"),
        ([], torch.ones(0), "Skip the round"),
    ):
        with pytest.raises(AggregationError, match=message):
            average(wrong, weights)


def test_names_and_scalings_that_make_no_sense_are_refused() -> None:
    assert lora_aggregation("exact") is average_exactly
    with pytest.raises(AggregationError, match="'mean'; expected one of factors, exact, frozen_a"):
        lora_aggregation("mean")
    for scaling in (math.nan, math.inf):
        with pytest.raises(AggregationError, match="expected a finite number, alpha / r"):
            average_exactly(clients(), WEIGHTS, scaling=scaling)
