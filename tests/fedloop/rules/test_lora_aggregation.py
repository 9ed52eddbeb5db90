"""Exact aggregation is exact, averaging factors is not; rejected clients move nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloop.errors import AggregationError
from fedloop.rules.lora import exact_residual

SCALING = 2.0
WEIGHTS = torch.tensor([3.0, 1.0, 0.5, 2.0], dtype=torch.float64)
Pairs = list[tuple[Tensor, Tensor]]


def clients(frozen: bool = False) -> Pairs:
    rng = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(4, 24, generator=rng).double(), torch.randn(12, 4, generator=rng).double())
        for _ in WEIGHTS
    ]
    return [(pairs[0][0] if frozen else A, B) for A, B in pairs]


def averaged(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The factors averaged apart, in float32 as they are sent."""
    shares = WEIGHTS / WEIGHTS.sum()
    A = torch.einsum("n,nij->ij", shares, torch.stack([A for A, _ in pairs]))
    B = torch.einsum("n,nij->ij", shares, torch.stack([B for _, B in pairs]))
    return A.float(), B.float()


def gap(pairs: Pairs, residual: Tensor | float) -> float:
    """How far the product with what goes into the base is from the mean of products; relative."""
    products = torch.stack([SCALING * B @ A for A, B in pairs])
    wanted = torch.einsum("n,nij->ij", WEIGHTS / WEIGHTS.sum(), products)
    A, B = averaged(pairs)
    product = SCALING * B.double() @ A.double()
    return float((product + residual - wanted).norm() / wanted.norm())


def test_exact_is_exact_and_factors_are_not() -> None:
    pairs = clients()
    residual = exact_residual(pairs, WEIGHTS, averaged(pairs), scaling=SCALING)
    assert gap(pairs, residual) < 1e-10
    assert gap(pairs, 0.0) > 0.5
    assert gap(clients(frozen=True), 0.0) < 1e-6  # with one A, averaging B is exact


def test_clients_that_agree_leave_nothing_behind() -> None:
    pair = clients()[0]
    assert exact_residual([pair] * 3, torch.ones(3), pair, scaling=1.0).abs().max() < 1e-12


def test_a_client_of_weight_zero_moves_nothing() -> None:
    pairs = clients()
    weights = torch.tensor([3.0, 0.0, 0.5, 2.0])
    new = averaged(pairs)
    expected = exact_residual([pairs[0], *pairs[2:]], weights[weights > 0], new, scaling=SCALING)
    bad: Any
    for bad in (torch.full((4, 24), math.nan), torch.zeros(7, 3), "nothing"):
        changed = [pairs[0], (bad, pairs[1][1]), *pairs[2:]]
        assert torch.equal(exact_residual(changed, weights, new, scaling=SCALING), expected)
    weights[1] = 1e-6
    changed = [pairs[0], (torch.full((4, 24), math.nan), pairs[1][1]), *pairs[2:]]
    with pytest.raises(AggregationError, match="client 1"):
        exact_residual(changed, weights, new, scaling=SCALING)


def test_what_is_not_one_modules_factors_is_refused() -> None:
    pairs = clients()
    A, B = pairs[0]
    other = (torch.ones(4, 24).double(), torch.ones(13, 4).double())
    for wrong, weights, scaling, message in (
        ([*pairs[:3], other], WEIGHTS, 1.0, "expected one module's"),
        ([(B, A), *pairs[1:]], WEIGHTS, 1.0, r"expected \(r, d_in\) and \(d_out, r\)"),
        ([(A[0], B), *pairs[1:]], WEIGHTS, 1.0, r"expected \(r, d_in\)"),
        ([(A.long(), B), *pairs[1:]], WEIGHTS, 1.0, "floating-point"),
        (pairs, WEIGHTS[:3], 1.0, r"expected \(4,\)"),
        (pairs, 0 * WEIGHTS, 1.0, "Skip the round"),
        ([], torch.ones(0), 1.0, "Skip the round"),
        (pairs, WEIGHTS, math.nan, "expected a finite number, alpha / r"),
    ):
        with pytest.raises(AggregationError, match=message):
            exact_residual(wrong, weights, pairs[0], scaling=scaling)
