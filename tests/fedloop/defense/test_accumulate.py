"""The running mean is the mean; the sketch is unbiased; a median takes out what all share."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from fedloop.defense.accumulate import FeatureMean, State
from fedloop.errors import ConfigError, EvidenceError, StateError

P = 40
Round = dict[str, np.ndarray]


def rounds_of(
    rng: np.random.Generator, rounds: int = 6, clients: str = "abcde", size: int = P
) -> list[Round]:
    """Random rounds in which each client takes part with probability 0.7, the first one always."""
    return [
        {c: rng.normal(size=size) for c in clients if c == clients[0] or rng.random() < 0.7}
        for _ in range(rounds)
    ]


def play(mean: FeatureMean, rounds: list[Round]) -> tuple[list[Round], State]:
    state, found = mean.init(), []
    for features in rounds:
        means, state = mean.add(state, features)
        found.append(means)
    return found, state


def slow_means(rounds: list[Round], relative: bool = False) -> Round:
    """What the last round returns: the mean of a client's rounds, less the cohort's median."""
    means = {
        c: np.array([np.mean([past[c][i] for past in rounds if c in past]) for i in range(len(x))])
        for c, x in rounds[-1].items()
    }
    if relative and len(means) >= 3:
        median = np.array([np.median(column) for column in zip(*means.values(), strict=True)])
        means = {c: row - median for c, row in means.items()}
    return means


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_running_mean_is_the_mean_of_all_rounds(seed: int, relative: bool) -> None:
    rounds = rounds_of(np.random.default_rng(seed))
    found, state = play(FeatureMean(normalize=False, relative=relative), rounds)
    for upto, means in enumerate(found, start=1):
        expected = slow_means(rounds[:upto], relative)
        assert means.keys() == rounds[upto - 1].keys() == expected.keys()
        for client, mean in means.items():
            assert mean.dtype == np.float64
            np.testing.assert_allclose(mean, expected[client], rtol=0, atol=1e-13)
    assert {client: entry["count"] for client, entry in state.items()} == {
        c: sum(c in past for past in rounds) for c in state
    }
    assert set(state) == set().union(*rounds)


def test_a_benign_majority_keeps_the_median_of_relative_means() -> None:
    attack = np.full(P, 50.0)
    rng = np.random.default_rng(3)
    benign = {c: rng.normal(size=P) for c in "abcd"}
    mean = FeatureMean(normalize=False, relative=True)
    few, _ = mean.add({}, {**benign, "x": attack, "y": attack, "z": attack})
    many, _ = mean.add({}, {**benign, **{f"x{i}": attack for i in range(5)}})
    lengths = {c: np.linalg.norm(row) for c, row in few.items()}
    assert min(lengths[c] for c in "xyz") > 10 * max(lengths[c] for c in benign)
    assert np.linalg.norm(many["x0"]) == 0  # negative control: their majority looks like the norm


# --- the sketch


def sketched(x: np.ndarray, seed: int, sketch: int = 16) -> np.ndarray:
    return FeatureMean(normalize=False, sketch=sketch, seed=seed).add({}, {"a": x})[0]["a"]


def test_the_sketch_is_unbiased_and_keeps_inner_products() -> None:
    rng = np.random.default_rng(4)
    x, w, seeds = rng.normal(size=P), rng.normal(size=P), 4000
    estimates = np.array([sketched(x, seed) for seed in range(seeds)])  # (seeds, p)
    standard_error = estimates.std(axis=0) / np.sqrt(seeds)
    assert (np.abs(estimates.mean(axis=0) - x) < 5 * standard_error).all()
    products = estimates @ w
    assert abs(products.mean() - x @ w) < 4 * products.std() / np.sqrt(seeds)
    assert products.std() < 2 * np.linalg.norm(x) * np.linalg.norm(w) / np.sqrt(16)
    # A coordinate is off by norm / sqrt(sketch), as documented.
    assert estimates.std(axis=0).mean() == pytest.approx(np.linalg.norm(x) / 4, rel=0.1)
    # Negative control: one seed alone is far off.
    assert np.linalg.norm(estimates[0] - x) > 0.5 * np.linalg.norm(x)


def test_sketching_commutes_with_averaging_and_with_the_median() -> None:
    rounds = rounds_of(np.random.default_rng(6))
    found, state = play(FeatureMean(normalize=False, sketch=16, seed=3), rounds)
    for client, mean in found[-1].items():
        batch = slow_means(rounds)[client]
        np.testing.assert_allclose(mean, sketched(batch, 3), atol=1e-12)
    for entry in state.values():
        assert entry["mean"].shape == (16,)
    for cohort in ("abc", "abcd"):
        features = {c: np.random.default_rng(ord(c)).normal(size=P) for c in cohort}
        plain, _ = FeatureMean(False, False, 16, 3).add({}, features)
        relative, _ = FeatureMean(False, True, 16, 3).add({}, features)
        median = np.median(np.stack(list(plain.values())), axis=0)
        for client in cohort:
            np.testing.assert_allclose(relative[client], plain[client] - median, atol=1e-13)


# --- state


@pytest.mark.parametrize("mean", [FeatureMean(), FeatureMean(relative=True, sketch=8, seed=1)])
def test_the_state_is_not_changed_and_shares_nothing_with_the_input(mean: FeatureMean) -> None:
    rounds = rounds_of(np.random.default_rng(7))
    _, state = play(mean, rounds)
    before = copy.deepcopy(state)
    features = {"a": np.ones(P), "new": np.ones(P)}
    means, after = mean.add(state, features)
    np.testing.assert_equal(state, before)
    assert after["a"]["count"] == state["a"]["count"] + 1
    kept = copy.deepcopy(after)
    features["new"][:] = 7
    np.testing.assert_equal(after, kept)
    with pytest.raises(ValueError, match="read-only"):
        means["new"][0] = 7


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"b": np.ones(P + 1)}, f"'b'.*{P + 1} features.*{P}"),
        ({"c": np.ones(P), "d": np.ones(3)}, f"'d'.*3 features.*{P}"),
        ({"b": np.full(P, np.nan)}, "'b'.*not finite"),
        ({"b": np.append(np.ones(P - 1), np.inf)}, "'b'.*not finite"),
        ({"b": np.ones((1, P))}, r"'b'.*\(1, 40\)"),
        ({"b": np.float64(1)}, r"'b'.*shape \(\)"),
        ({"b": []}, r"'b'.*shape \(0,\)"),
        ({"b": ["1"] * P}, "'b'.*type"),
        ({"b": [True] * P}, "'b'.*bool"),
        ({"b": np.ones(P, complex)}, "'b'.*complex"),
        ({"b": [[1.0], [1.0, 2.0]]}, "'b'.*no array"),
        ({"b": None}, "'b'.*shape"),
    ],
)
@pytest.mark.parametrize("mean", [FeatureMean(), FeatureMean(sketch=8)])
def test_features_that_do_not_fit_are_refused(
    mean: FeatureMean, features: Any, message: str
) -> None:
    _, state = mean.add(mean.init(), {"a": np.ones(P)})
    before = copy.deepcopy(state)
    with pytest.raises(EvidenceError, match=message):
        mean.add(state, features)
    np.testing.assert_equal(state, before)
    if "c" in features:
        with pytest.raises(EvidenceError, match="'d'"):
            mean.add(mean.init(), features)


def test_the_state_of_another_sketch_is_refused() -> None:
    _, state = FeatureMean(sketch=8).add({}, {"a": np.ones(P)})
    for other in (FeatureMean(), FeatureMean(sketch=9)):
        with pytest.raises(StateError, match=r"'a'.*another sketch"):
            other.add(state, {"a": np.ones(P)})


BAD = [("normalize", 1), ("relative", 1), *(("sketch", value) for value in (0, 2.0, True))]


@pytest.mark.parametrize(("field", "value"), [*BAD, ("seed", -1), ("seed", None), ("seed", 0.5)])
def test_fields_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"FeatureMean\.{field}: got {value!r}"):
        FeatureMean(**{field: value})


def test_a_normalised_mean_has_length_one_and_the_direction_of_the_plain_one() -> None:
    rounds = rounds_of(np.random.default_rng(3))
    for relative in (False, True):
        plain, _ = play(FeatureMean(normalize=False, relative=relative), rounds)
        unit, state = play(FeatureMean(relative=relative), rounds)
        for before, after in zip(plain, unit, strict=True):
            for client, mean in before.items():
                assert np.linalg.norm(after[client]) == pytest.approx(1)
                np.testing.assert_allclose(after[client] * np.linalg.norm(mean), mean, atol=1e-12)
    # What is kept is the mean itself: unit vectors would not average.
    assert not np.allclose([np.linalg.norm(entry["mean"]) for entry in state.values()], 1)


def test_a_round_without_evidence_changes_nothing() -> None:
    _, state = play(FeatureMean(), rounds_of(np.random.default_rng(9)))
    assert FeatureMean().add(state, {}) == ({}, state)
