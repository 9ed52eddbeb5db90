"""What FoolsGold, residual reweighting, DnC, FLAME and LASA promise, each by its paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedloop.errors import AggregationError
from tests.fedloop.rules.test_aggregate import ones, run, updates


def test_foolsgold_gives_sybils_one_voice() -> None:
    rng = np.random.default_rng(0)
    honest = rng.standard_normal((6, 200))
    rows = np.vstack([honest, np.repeat(rng.standard_normal((1, 200)), 3, axis=0)])
    expected = torch.from_numpy(honest.mean(0))
    torch.testing.assert_close(run("foolsgold", rows, ones(9)), expected, rtol=1e-9, atol=1e-12)
    # This round the sybils send noise; what they sent before still gives them away.
    hidden = np.vstack([honest, rng.standard_normal((3, 200))])
    assert (run("foolsgold", hidden, ones(9)) - expected).abs().max() > 0.1
    remembered = run("foolsgold", hidden, ones(9), history=hidden + 1e6 * rows)
    torch.testing.assert_close(remembered, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(AggregationError, match="Skip the round"):
        run("foolsgold", np.repeat(honest[:1], 4, axis=0), ones(4))


def test_residual_reweighting_leaves_values_on_a_line_alone() -> None:
    line = torch.arange(7.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0, 0.5, 3.0])
    torch.testing.assert_close(run("residual", line, ones(7)), line.mean(0), rtol=1e-9, atol=1e-12)
    line[0, 0] = 1e6
    assert abs(float(run("residual", line, ones(7))[0]) - 3) < 1
    torch.testing.assert_close(run("residual", line[:2], ones(2)), line[:2].mean(0))


def test_dnc_draws_coordinates_with_the_generator_only() -> None:
    rows = updates(9, 300)
    assert torch.equal(run("dnc", rows, ones(9)), run("dnc", rows, ones(9)))
    options = {"coordinates": 20, "iterations": 3}
    seeded = [run("dnc", rows, ones(9), rng=np.random.default_rng(1), **options) for _ in range(2)]
    assert torch.equal(*seeded)
    outlier = rows.clone()
    outlier[-2:, 0] += 100.0
    torch.testing.assert_close(run("dnc", outlier, ones(9)), rows[:7].mean(0))
    noise = torch.randn(9, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drawn = [
        run("dnc", noise, ones(9), rng=np.random.default_rng(seed), coordinates=5)
        for seed in range(8)
    ]
    assert not all(torch.equal(drawn[0], other) for other in drawn)
    with pytest.raises(AggregationError, match="no row that all of 40 iterations keep"):
        run("dnc", noise, ones(9), f=4, rng=np.random.default_rng(0), coordinates=2, iterations=40)


def test_dnc_removes_along_the_first_singular_vector() -> None:
    for seed in range(5):
        rows = np.random.default_rng(seed).standard_normal((8, 30))
        centred = rows - rows.mean(0)
        scores = np.square(centred @ np.linalg.svd(centred)[2][0])
        np.testing.assert_allclose(
            run("dnc", rows, ones(8), f=3),
            rows[np.argsort(scores)[:5]].mean(0),
            rtol=1e-10,
            atol=1e-12,
        )


def test_flame_adds_the_noise_that_is_asked_for() -> None:
    rows = updates(9, 4000)
    quiet = run("flame", rows, ones(9), rng=np.random.default_rng(0))
    assert torch.equal(quiet, run("flame", rows, ones(9)))
    bound = float(rows.norm(dim=1).median())
    noisy = run("flame", rows, ones(9), rng=np.random.default_rng(0), noise=0.01)
    assert abs(float((noisy - quiet).std()) / (0.01 * bound) - 1) < 0.05


def test_lasa_judges_every_layer_by_itself() -> None:
    rows = 0.01 * torch.randn(
        9, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    # One client is off in the first layer only: what clipping leaves of it is all positive.
    rows[0, :20] = 1.0
    bounds = {"sizes": [20, 40], "sparsity": 0.0}
    lengths = rows.norm(dim=1, keepdim=True)
    clipped = rows * (lengths.median() / lengths).clamp(max=1)
    every = run("lasa", rows, ones(9), **bounds, norm_bound=1e9, sign_bound=1e9)
    torch.testing.assert_close(every, clipped.mean(0), rtol=1e-9, atol=1e-12)
    judged = run("lasa", rows, ones(9), **bounds, norm_bound=2.0, sign_bound=2.0)
    torch.testing.assert_close(judged[:20], clipped[1:, :20].mean(0), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(judged[20:], clipped[1:, 20:].mean(0), rtol=1e-3)
    assert not run("lasa", torch.zeros(4, 6), ones(4)).any()
