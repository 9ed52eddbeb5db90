"""Rules by their definitions and by recorded vectors; nobody of weight 0 moves any of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedloop.errors import AggregationError
from fedloop.rules.classic import OFFICIAL_OPTIONS, mixed_rows
from fedloop.rules.rows import BLOCK, StreamingMean, inner_products, squared_distances, tolerable
from fedloop.rules.rule import AGGREGATORS

RULES = {
    **{name: {} for name in AGGREGATORS},
    **{f"{name} official": options for name, options in OFFICIAL_OPTIONS.items() if options},
}
USING_F = ("trimmed_mean", "meamed", "krum", "multi_krum", "nnm", "dnc")
BYZFL = (*USING_F[:4], "median", "geometric_median", "centered_clipping")


def run(rule: str, deltas: Any, weights: Any, f: int = 2, **options: Any) -> Tensor:
    return AGGREGATORS[rule.split()[0]](deltas, weights, f=f, **{**RULES[rule], **options})


def updates(n: int = 9, d: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Honest rows around one direction, the last two long and the other way."""
    rng = torch.Generator().manual_seed(seed)
    rows = 0.01 * torch.randn(n, d, generator=rng, dtype=torch.float64) + 0.01
    rows[-2:] *= -5
    return rows.to(dtype)


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


# ---- recorded vectors ----


@pytest.mark.parametrize("number", range(3))
def test_byzfl_agrees(vectors: Path, number: int) -> None:
    with np.load(vectors / f"byzfl_{number}.npz") as recorded:
        X, f = recorded["X"], recorded["f"]
        expected = {rule: recorded[f"out_{rule}"] for rule in (*BYZFL, "nnm")}
    weights = np.ones(len(X))
    mixed = expected.pop("nnm")
    np.testing.assert_allclose(mixed_rows(torch.from_numpy(X), int(f)), mixed, rtol=0, atol=1e-12)
    expected["nnm"] = mixed.mean(0)
    for rule, value in expected.items():
        np.testing.assert_allclose(AGGREGATORS[rule](X, weights, f=f), value, rtol=0, atol=1e-12)
        assert rule == "nnm" or np.abs(X.mean(0) - value).max() > 1e-2  # the mean would not do


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("rule", OFFICIAL_OPTIONS)
def test_the_official_variant_agrees(vectors: Path, number: int, rule: str) -> None:
    name = {"mean": "fedavg", "trimmed_mean": "trimmedmean"}.get(rule, rule)
    with np.load(vectors / f"official_aggregation_{number}.npz") as recorded:
        start, n_k, f = recorded["global"], recorded["num_examples"], recorded["f"]
        deltas = recorded["locals"] - start
        expected = recorded[f"out_{name}"]
    options = dict(OFFICIAL_OPTIONS[rule])
    if rule == "flame":
        options["start"] = start
    if rule == "lasa":
        shapes = json.loads((vectors / "layout.json").read_text())["shapes"]
        options["sizes"] = [math.prod(shape) for shape in shapes]
    result = AGGREGATORS[rule](deltas, n_k, f=f, **options)
    assert result.dtype == torch.float32
    assert np.abs(start + result.numpy() - expected).max() < 1e-6
    if number == 2 and rule in ("trimmed_mean", "krum", "flame", "lasa"):
        textbook = AGGREGATORS[rule](deltas, np.ones(len(deltas)), f=f)
        assert np.abs(start + textbook.numpy() - expected).max() > 1e-3


# ---- the definitions, slowly ----


def slow_median(rows: list[list[float]], f: int) -> list[float]:
    result = []
    for column in zip(*rows, strict=True):
        values, n = sorted(column), len(column)
        result.append(values[n // 2] if n % 2 else (values[n // 2 - 1] + values[n // 2]) / 2)
    return result


def slow_trimmed_mean(rows: list[list[float]], f: int) -> list[float]:
    return [
        math.fsum(sorted(column)[f : len(column) - f]) / (len(column) - 2 * f)
        for column in zip(*rows, strict=True)
    ]


def slow_meamed(rows: list[list[float]], f: int) -> list[float]:
    middle = slow_median(rows, f)
    columns = zip(*rows, strict=True)
    return [
        math.fsum(sorted(column, key=lambda x: abs(x - m))[: len(column) - f]) / (len(column) - f)
        for column, m in zip(columns, middle, strict=True)
    ]


def slow_scores(rows: list[list[float]], f: int) -> list[float]:
    scores = []
    for i, row in enumerate(rows):
        distances = sorted(
            math.fsum((a - b) ** 2 for a, b in zip(row, other, strict=True))
            for j, other in enumerate(rows)
            if j != i
        )
        scores.append(math.fsum(distances[: len(rows) - f - 2]))
    return scores


def slow_krum(rows: list[list[float]], f: int) -> list[float]:
    scores = slow_scores(rows, f)
    return rows[scores.index(min(scores))]


def slow_multi_krum(rows: list[list[float]], f: int) -> list[float]:
    scores = slow_scores(rows, f)
    best = sorted(range(len(rows)), key=lambda i: scores[i])[: len(rows) - f]
    return [math.fsum(rows[i][j] for i in best) / len(best) for j in range(len(rows[0]))]


@pytest.mark.parametrize(
    "slow",
    [slow_median, slow_trimmed_mean, slow_meamed, slow_krum, slow_multi_krum],
    ids=lambda slow: slow.__name__,
)
@pytest.mark.parametrize(("n", "f"), [(9, 2), (10, 3), (7, 2), (5, 1), (4, 0)])
def test_the_fast_rule_is_the_definition(slow: Callable[..., list[float]], n: int, f: int) -> None:
    rule = AGGREGATORS[slow.__name__.removeprefix("slow_")]
    for seed in range(10):
        rows = np.random.default_rng(seed).standard_normal((n, 6))
        expected = slow(rows.tolist(), f)
        np.testing.assert_allclose(rule(rows, np.ones(n), f=f), expected, rtol=0, atol=1e-12)
        if f and n > 4:
            rows[0] += 100
            assert not np.allclose(rule(rows, np.ones(n), f=f), rows.mean(0))


def test_krum_measures_the_deltas_and_not_where_they_start() -> None:
    start = 0.02 * torch.randn(4096, generator=torch.Generator().manual_seed(1))
    rows = updates(9, 4096, dtype=torch.float32) * 1e-3
    best = run("krum", rows, ones(9))
    assert any(torch.equal(best, row) for row in rows[:-2])
    parameters = start + rows
    squares = (parameters * parameters).sum(1)
    naive = squares[:, None] + squares[None] - 2 * parameters @ parameters.T
    exact = torch.cdist(rows.double(), rows.double()).square()
    ours = squared_distances(inner_products(rows))
    honest = torch.ones(7, 7).triu(1).bool()
    assert ((naive[:7, :7] / exact[:7, :7] - 1).abs()[honest] > 0.01).any()  # float32 on parameters
    np.testing.assert_allclose(ours, exact, rtol=1e-9, atol=1e-18)


def test_weights_enter_the_mean_and_the_geometric_median() -> None:
    rows = updates()
    weights = torch.arange(1.0, 10.0)
    torch.testing.assert_close(
        run("mean", rows, weights), (weights.double() / 45) @ rows, rtol=1e-13, atol=1e-15
    )
    repeated = rows.repeat_interleave(weights.long(), dim=0)
    for rule in RULES:
        result = run(rule, rows, weights)
        if rule == "geometric_median":
            torch.testing.assert_close(result, run(rule, repeated, ones(45)), rtol=1e-9, atol=1e-12)
        elif rule != "mean":
            torch.testing.assert_close(result, run(rule, rows, ones(9)), rtol=0, atol=0, msg=rule)


def test_the_geometric_median_minimises_the_sum_of_distances_at_any_scale() -> None:
    for scale in (1e-6, 1.0, 1e6):
        rows = updates() * scale
        rows[-2:] *= 10
        best = run("geometric_median", rows, ones(9), iterations=200)
        cost = lambda point: float((rows - point).norm(dim=1).sum())  # noqa: B023, E731
        for direction in torch.eye(40, dtype=torch.float64):
            assert cost(best) <= cost(best + 1e-3 * scale * direction) + 1e-12 * scale
        assert (
            cost(run("geometric_median", rows, ones(9)))
            < 1.05 * cost(best)
            < 0.9 * cost(rows.mean(0))
        )


def test_clipping_starts_where_it_is_told_and_bounds_every_row() -> None:
    rows = updates()
    start = rows[:7].mean(0)
    far = rows.clone()
    far[8] *= 1e6
    point = start.clone()
    for _ in range(3):
        point = point + torch.stack(
            [(row - point) * min(1.0, 0.05 / float((row - point).norm())) for row in far]
        ).mean(0)
    result = run("centered_clipping", far, ones(9), tau=0.05, iterations=3, start=start)
    torch.testing.assert_close(result, point, rtol=1e-6, atol=1e-9)
    # tau = 10 clips nothing here
    torch.testing.assert_close(run("centered_clipping", rows, ones(9)), rows.mean(0))
    assert (run("centered_clipping", rows, ones(9), tau="median") - rows.mean(0)).norm() > 1e-3


def test_mixing_comes_before_another_rule() -> None:
    rows, weights = updates(), ones(9)
    rows[4], weights[4] = math.nan, 0
    mixed = mixed_rows(rows[weights > 0], 2)
    assert float(mixed[:4].std(0).norm()) < float(rows[:4].std(0).norm())
    expected = run("trimmed_mean", mixed, ones(8))
    assert torch.equal(run("trimmed_mean", rows, weights, pre="nnm"), expected)
    assert not torch.equal(run("trimmed_mean", rows, weights), expected)


# ---- every rule ----


@pytest.mark.parametrize("rule", RULES)
def test_a_client_of_weight_zero_cannot_move_the_result(rule: str) -> None:
    rows, weights = updates(), torch.arange(1.0, 10.0)
    weights[[0, 5]] = 0
    expected = run(rule, rows[weights > 0], weights[weights > 0])
    for bad in (math.nan, math.inf, 1e300, 0.0):
        changed = rows.clone()
        changed[[0, 5]] = bad
        assert torch.equal(run(rule, changed, weights), expected)
    weights[0] = 1e-9  # the least weight counts
    changed = rows.clone()
    changed[0, 0] = math.nan
    with pytest.raises(AggregationError, match="NaN or infinity in row 0 of weight 1e-09"):
        run(rule, changed, weights)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_clients_and_of_coordinates_does_not_matter(rule: str) -> None:
    for n, f, d in ((9, 2, 40), (8, 3, 40), (5, 2, 40), (3, 0, 40), (7, 2, BLOCK + 7)):
        rows, weights = updates(n, d, seed=n), torch.arange(1.0, n + 1)
        expected = run(rule, rows, weights, f)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        columns = torch.randperm(d, generator=torch.Generator().manual_seed(d))
        mixed = run(rule, rows[order][:, columns], weights[order], f)
        torch.testing.assert_close(mixed, expected[columns], rtol=1e-9, atol=1e-13)
    rows, weights = updates(), torch.arange(1.0, 10.0)
    backwards = run("mean", rows.flip(0), weights)
    assert (run("mean", rows, weights) - backwards).norm() > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_inputs_stay_as_they_are_and_arrays_do_as_well_as_tensors(rule: str) -> None:
    rows, weights = updates(dtype=torch.float32), torch.arange(9.0)
    before, array, numbers = rows.clone(), rows.numpy().copy(), weights.numpy().copy()
    result = run(rule, rows, weights)
    assert result.shape == (40,)
    assert result.dtype == torch.float32
    assert torch.equal(rows, before)
    assert torch.equal(weights, torch.arange(9.0))
    array.flags.writeable = False
    assert torch.equal(run(rule, array, numbers), result)
    assert torch.equal(run(rule, np.asfortranarray(array)[:, ::1], numbers.tolist()), result)
    assert not run(rule, rows.clone().requires_grad_(), weights).requires_grad
    assert run(rule, rows.bfloat16(), weights).dtype == torch.float32


@pytest.mark.parametrize("rule", RULES)
def test_the_majority_holds_against_two_far_away(rule: str) -> None:
    rows = updates()
    honest = rows[:-2].mean(0)
    rows[-2:] = -1e4 * honest
    reached = float((run(rule, rows, ones(9)) - honest).norm() / honest.norm())
    # Clipping at 10 is no clipping of deltas, mixing needs a robust rule after it, trimming one a
    # side leaves one of two.
    exposed = {"mean", "centered_clipping", "nnm", "trimmed_mean official"}
    assert (reached > 10) == (rule in exposed), reached


def test_what_is_not_a_round_of_updates_is_refused() -> None:
    rows = updates()
    nan, inf = rows.clone(), rows.clone()
    nan[3, 7], inf[2, 0] = math.nan, -math.inf
    bad: Any
    for bad, weights, message in (
        (nan, ones(9), "row 3"),
        (inf, ones(9), "row 2"),
        (rows[0], ones(40), r"expected \(n, d\)"),
        (rows[:0], ones(0), r"expected \(n, d\)"),
        (rows.long(), ones(9), "floating-point"),
        (rows.tolist(), ones(9), "floating-point"),
        (rows.numpy().astype(str), ones(9), "floating-point"),
        (rows, ones(8), r"expected \(9,\)"),
        (rows, ones(9)[:, None], r"expected \(9,\)"),
        (rows, 0 * ones(9), "Skip the round"),
        (rows, -ones(9), "at least 0"),
        (rows, math.nan * ones(9), "finite"),
        (rows, math.inf * ones(9), "finite"),
        (rows, ["a"] * 9, "one number"),
    ):
        with pytest.raises(AggregationError, match=message):
            run("median", bad, weights)


@pytest.mark.parametrize("rule", [*USING_F, "krum official"])
def test_too_many_to_tolerate_is_refused(rule: str) -> None:
    rows, weights = updates(), ones(9)
    assert run(rule, rows, weights, f=4).isfinite().all()
    with pytest.raises(AggregationError, match=r"got f=5, n=9; expected f of at most 4"):
        run(rule, rows, weights, f=5)
    weights[:2] = 0
    with pytest.raises(AggregationError, match="got f=4, n=7"):
        run(rule, rows, weights, f=4)


@pytest.mark.parametrize("rule", [rule for rule in AGGREGATORS if rule not in USING_F])
def test_f_may_be_given_to_rules_that_have_no_use_for_it(rule: str) -> None:
    without = AGGREGATORS[rule](updates(), ones(9))
    assert torch.equal(AGGREGATORS[rule](updates(), ones(9), f=100), without)


def test_half_of_the_rows_are_never_tolerable() -> None:
    assert [tolerable(n) for n in range(1, 6)] == [0, 0, 1, 1, 2]
    with pytest.raises(AggregationError, match="got n=0"):
        tolerable(0)


@pytest.mark.parametrize(
    ("rule", "brought"),
    [
        ("multi_krum", {"m": 10}),
        ("centered_clipping", {"start": torch.zeros(3)}),
        ("centered_clipping", {"start": torch.full((40,), math.nan)}),
        ("foolsgold", {"history": torch.zeros(9, 39)}),
        ("foolsgold", {"history": torch.full((9, 40), math.nan)}),
        ("dnc", {"removed": 5}),
        ("flame", {"start": torch.zeros(3)}),
        ("lasa", {"sizes": [20, 19]}),
        ("lasa", {"sizes": [0, 40]}),
    ],
)
def test_what_does_not_fit_the_round_is_refused(rule: str, brought: dict[str, Any]) -> None:
    with pytest.raises(AggregationError, match=r"got .*expected"):
        run(rule, updates(), ones(9), **brought)


@pytest.mark.parametrize("rule", ["krum", "geometric_median", "foolsgold", "dnc", "flame", "lasa"])
def test_lengths_that_overflow_are_refused(rule: str) -> None:
    rows = updates()
    rows[0] = 1e300
    with pytest.raises(AggregationError, match="overflow"):
        run(rule, rows, ones(9))


# ---- the mean that streams ----


def test_the_streaming_mean_is_the_mean() -> None:
    rows, weights = updates(dtype=torch.float32), torch.arange(9.0)
    stream = StreamingMean()
    for row, weight in zip(rows, weights / weights.sum(), strict=True):
        stream.add(row if weight else torch.full((40,), math.nan), float(weight))
    torch.testing.assert_close(stream.result(), run("mean", rows, weights), rtol=1e-6, atol=0)
    claims = StreamingMean()
    for row, weight in zip(rows, weights, strict=True):
        claims.add(row.numpy(), 1000 * float(weight))
    torch.testing.assert_close(claims.result(), run("mean", rows, weights), rtol=1e-6, atol=0)


def test_the_streaming_mean_refuses_what_it_cannot_count() -> None:
    stream = StreamingMean()
    with pytest.raises(AggregationError, match="Skip the round"):
        stream.result()
    stream.add(torch.ones(3), 1.0)
    for delta, weight in (
        (torch.ones(3), -1.0),
        (torch.ones(3), math.nan),
        (torch.ones(4), 1.0),
        (torch.tensor([1.0, 2.0, math.inf]), 1.0),
    ):
        with pytest.raises(AggregationError, match="expected"):
            stream.add(delta, weight)
    assert torch.equal(stream.result(), torch.ones(3))
    stream.add(torch.full((3,), 1e308, dtype=torch.float64), 10.0)
    with pytest.raises(AggregationError, match="overflows"):
        stream.result()
