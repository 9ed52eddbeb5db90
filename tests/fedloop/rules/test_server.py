"""Server optimisers, FedProx and SCAFFOLD, against their equations and recorded rounds."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedloop.config import Config
from fedloop.errors import AggregationError, ConfigError
from fedloop.rules.rule import AGGREGATORS
from fedloop.rules.server_optimizers import (
    SERVER_OPTIMIZERS,
    make_server_optimizer,
    proximal_gradient,
    scaffold_client_variate,
    scaffold_server_variate,
)
from tests.helpers.federated import same_tree

DELTAS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.01
WITH_VARIANT = ("fedavgm", "fedadagrad", "fedyogi", "fedadam")


def play(name: str, deltas: Tensor, **options: Any) -> list[Tensor]:
    """What is applied in every round."""
    optimizer = make_server_optimizer(name, **options)
    state = optimizer.init(deltas.shape[1])
    applied = []
    for delta in deltas:
        change, state = optimizer.step(state, delta)
        applied.append(change)
    return applied


# ---- recorded vectors ----


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", ["fedavg", *WITH_VARIANT])
def test_the_official_first_round_agrees(vectors: Path, number: int, name: str) -> None:
    with np.load(vectors / f"official_aggregation_{number}.npz") as recorded:
        start, n_k, expected = recorded["global"], recorded["num_examples"], recorded[f"out_{name}"]
        deltas = recorded["locals"] - start
    weights = n_k if name in ("fedavg", "fedavgm") else np.ones(len(n_k))
    options = {"variant": "official"} if name in WITH_VARIANT else {}
    applied = play(name, AGGREGATORS["mean"](deltas, weights)[None], **options)[0]
    assert np.abs(start + applied.numpy() - expected).max() < 1e-6
    assert np.abs(start - expected).max() > 1e-4
    if name in ("fedyogi", "fedadam"):
        textbook = play(name, AGGREGATORS["mean"](deltas, weights)[None])[0]
        assert np.abs(start + textbook.numpy() - expected).max() > 1e-4


# ---- the equations, slowly ----


def slow(
    name: str,
    deltas: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    tau: float,
    official: bool,
) -> list[float]:
    """One coordinate, round by round: Reddi et al. 2021, Algorithm 2, and FedAvgM."""
    m, v, applied = 0.0, tau**2, []
    for number, delta in enumerate(deltas):
        if name == "fedavgm":
            m = beta1 * m + (delta if not official or number == 0 else (1 - beta1) * delta)
            applied.append(lr * m)
            continue
        m = delta if official and number == 0 else beta1 * m + (1 - beta1) * delta
        square = (m if official else delta) ** 2
        if name == "fedadagrad":
            v = v + square
        elif name == "fedadam":
            v = beta2 * v + (1 - beta2) * square
        else:
            v = v - (1 - beta2) * square * ((v > square) - (v < square))
        applied.append(lr * m / (math.sqrt(v) + tau))
    return applied


@pytest.mark.parametrize("name", WITH_VARIANT)
@pytest.mark.parametrize("variant", ["textbook", "official"])
def test_every_round_is_the_equation(name: str, variant: str) -> None:
    options: dict[str, float] = {"lr": 0.7, "beta1": 0.8, "tau": 0.003}
    if name == "fedavgm":
        del options["tau"]
    if name in ("fedyogi", "fedadam"):
        options["beta2"] = 0.95
    applied = torch.stack(play(name, DELTAS, variant=variant, **options))
    for column in range(6):
        full = {"beta2": 0.95, "tau": 0.003, **options}
        expected = slow(name, DELTAS[:, column].tolist(), official=variant == "official", **full)
        np.testing.assert_allclose(applied[:, column], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_step_changes_no_input_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    optimizer = make_server_optimizer(name)
    deltas = DELTAS.float()
    state = optimizer.init(6)
    for delta in deltas[:2]:
        _, state = optimizer.step(state, delta)
    before = copy.deepcopy(state)
    assert {type(value) for value in state.values()} <= {Tensor, int}
    torch.save(state, tmp_path / "state.pt")
    applied, after = optimizer.step(state, deltas[2])
    assert applied.dtype == torch.float32
    assert after["rounds"] == 3
    assert torch.equal(deltas, DELTAS.float())
    assert same_tree(state, before)
    again, resumed = optimizer.step(torch.load(tmp_path / "state.pt"), deltas[2].numpy())
    assert torch.equal(again, applied)
    assert same_tree(resumed, after)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_what_cannot_be_applied_is_refused(name: str) -> None:
    optimizer = make_server_optimizer(name)
    state = optimizer.init(3)
    others = make_server_optimizer("fedavg").init(3)
    infinite = torch.tensor([1.0, math.nan, 1.0])
    cases: list[tuple[Any, Any, str]] = [
        (state, torch.ones(4), r"expected \(3,\)"),
        (state, torch.ones(1, 3), r"expected \(3,\)"),
        (state, infinite, "NaN"),
        (state, torch.tensor([1, 2, 3]), "floating-point"),
        ({}, torch.ones(3), "made by this optimiser's init"),
    ]
    if name in WITH_VARIANT:
        cases.append((others, torch.ones(3), "expected one with a tensor 'momentum'"))
    for kept, delta, message in cases:
        with pytest.raises(AggregationError, match=message):
            optimizer.step(kept, delta)
    with pytest.raises(AggregationError, match="got d=0"):
        optimizer.init(0)
    with pytest.raises(AggregationError, match="overflows"):
        make_server_optimizer("fedavg", lr=1e3).step(others, torch.full((3,), 1e38))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adam", {}, "'adam'; expected one of fedavg, fedprox, scaffold"),
        ("fedavg", {"beta1": 0.9}, "no option 'beta1'; expected any of lr"),
        *[("fedprox", {"lr": lr}, "lr: got") for lr in (0.0, -1.0, math.nan, math.inf, "1", True)],
        ("fedavgm", {"beta1": 1.0}, "FedAvgM.beta1: got 1.0"),
        ("fedadam", {"beta2": -1}, "FedAdam.beta2: got -1"),
        ("fedyogi", {"tau": 0}, "FedYogi.tau: got 0"),
        ("fedadagrad", {"variant": "Reddi"}, "expected one of textbook, official"),
    ],
)
def test_names_and_options_are_checked_before_anything_runs(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_server_optimizer(name, **options)
    values = {"model": {"base": "none"}, "clients": {"benign": ["builtin:benign"]}}
    with pytest.raises(ConfigError, match=message):
        Config.of({**values, "aggregation": {"server": name, "server_options": options}})


# ---- the clients' half ----


def test_the_proximal_gradient_is_that_of_the_proximal_term() -> None:
    start, parameters = DELTAS[0], DELTAS[1].clone().requires_grad_()
    (0.3 / 2 * (parameters - start).square().sum()).backward()
    torch.testing.assert_close(proximal_gradient(parameters.detach(), start, 0.3), parameters.grad)
    assert not proximal_gradient(start, start, 0.3).any()


def quadratic(lr: float, rounds: int, corrected: bool) -> float:
    """How far two clients of different minima and curvatures end from the minimum of their mean.

    After five SGD steps a round.
    """
    centres = DELTAS[:2] * 100
    curvatures = torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    x, c = torch.zeros(2, 6, dtype=torch.float64)
    variates = torch.zeros(2, 6, dtype=torch.float64)
    for _ in range(rounds):
        deltas = torch.zeros_like(variates)
        changes = torch.zeros_like(variates)
        for k in range(2):
            y = x.clone()
            for _ in range(5):
                correction = corrected * (c - variates[k])
                y = y - lr * (curvatures[k] * (y - centres[k]) + correction)
            deltas[k] = y - x
            after = scaffold_client_variate(c, variates[k], deltas[k], steps=5, lr=lr)
            changes[k] = after - variates[k]
        c = scaffold_server_variate(c, changes, torch.ones(2), num_clients=2)
        variates = variates + changes
        x = x + deltas.mean(0)
    return float((x - (curvatures * centres).sum(0) / curvatures.sum()).norm())


def test_scaffold_reaches_the_minimum_that_averaging_misses() -> None:
    assert quadratic(0.1, 300, corrected=True) < 1e-8
    assert quadratic(0.1, 300, corrected=False) > 1e-2


def test_the_control_variate_is_the_mean_gradient() -> None:
    lr = 0.05
    c = torch.full((6,), 0.2, dtype=torch.float64)
    c_i = torch.full((6,), -0.1, dtype=torch.float64)
    delta = -lr * (DELTAS + c - c_i).sum(0)
    variate = scaffold_client_variate(c, c_i, delta, steps=4, lr=lr)
    torch.testing.assert_close(variate, DELTAS.mean(0))


def test_the_server_variate_counts_all_clients_and_no_rejected_one() -> None:
    c, changes = torch.ones(6), DELTAS.float()
    expected = c + (changes[0] + changes[2]) / 10
    for bad in (0.0, math.nan, 1e30):
        rejected = changes.clone()
        rejected[[1, 3]] = bad
        torch.testing.assert_close(
            scaffold_server_variate(c, rejected, torch.tensor([3.0, 0, 1, 0]), num_clients=10),
            expected,
        )
