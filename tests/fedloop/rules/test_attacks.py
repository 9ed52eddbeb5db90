"""Attacks against recorded vectors or definitions, what evasion guarantees, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloop.config import Config
from fedloop.errors import AggregationError, ConfigError
from fedloop.rules.attacks import ATTACKS, alie_z, make_attack
from fedloop.rules.evasion import evade

H, D, N = 7, 23, 3


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def honest(rng: np.random.Generator) -> Any:
    return rng.normal(0.3, 1.0, (H, D))


# --- recorded vectors and definitions


@pytest.mark.parametrize("name", ["sign_flip", "ipm", "alie"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_agrees_with_byzfl(vectors: Path, number: int, name: str) -> None:
    recorded = np.load(vectors / f"byzfl_{number}.npz")
    options: dict[str, dict[str, float]] = {
        "sign_flip": {},
        "ipm": {"tau": 2.0},
        "alie": {"tau": 1.5},
    }
    sent = ATTACKS[name](recorded["honest"], 2, rng=np.random.default_rng(0), **options[name])
    assert sent.shape == (2, 257)
    for row in sent:
        np.testing.assert_allclose(row, recorded[f"atk_{name}"], rtol=0, atol=1e-6)
    # The tolerance tells a parameter from its neighbour.
    other = {"sign_flip": {"scale": 1.01}, "ipm": {"tau": 2.01}, "alie": {"z": 1.51}}[name]
    sent = ATTACKS[name](recorded["honest"], 2, **other)
    assert np.abs(sent[0] - recorded[f"atk_{name}"]).max() > 1e-4


def slow_z(n: int, m: int) -> float:
    """The z with Φ(z) = (n - m - s) / (n - m), by bisection, Φ through the error function."""
    s = math.floor(n / 2 + 1) - m
    wanted = (n - m - s) / (n - m)
    low, high = -10.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if (1 + math.erf(middle / math.sqrt(2))) / 2 < wanted else (low, middle)
        )
    return low


@pytest.mark.parametrize(("n", "m"), [(50, 24), (50, 12), (10, 3), (25, 5), (9, 4), (3, 1)])
def test_z_is_the_one_of_the_paper(n: int, m: int) -> None:
    assert alie_z(n, m) == pytest.approx(slow_z(n, m), abs=1e-9)


def test_z_by_hand_and_where_there_is_none() -> None:
    # two of 26 honest clients are needed: Φ⁻¹(24 / 26)
    assert alie_z(50, 24) == pytest.approx(1.4261, abs=1e-4)
    assert alie_z(3, 1) == 0.0  # one of two
    assert alie_z(20, 1) < 0 < alie_z(20, 9)
    for n, m in ((10, 6), (10, 9), (2, 1), (1, 1)):
        with pytest.raises(AggregationError, match="Give z"):
            alie_z(n, m)


def test_alie_uses_z_of_the_round_unless_it_is_given(honest: Any) -> None:
    mean, deviation = honest.mean(axis=0), honest.std(axis=0, ddof=1)
    np.testing.assert_allclose(
        ATTACKS["alie"](honest, N)[0], mean + slow_z(H + N, N) * deviation, atol=1e-9
    )
    majority = H + 1  # no z for these, so it has to be given
    for attackers in (N, majority):
        sent = ATTACKS["alie"](honest, attackers, z=0.7)
        np.testing.assert_allclose(sent[0], mean + 0.7 * deviation, atol=1e-12)
    with pytest.raises(AggregationError, match="Give z"):
        ATTACKS["alie"](honest, majority)


def test_scaling_multiplies_what_the_attackers_trained(
    honest: Any, rng: np.random.Generator
) -> None:
    own = rng.normal(size=(N, D))
    np.testing.assert_allclose(ATTACKS["scaling"](honest, N, own=own, factor=4), 4 * own)
    np.testing.assert_allclose(
        ATTACKS["scaling"](honest, N), np.tile(10 * honest.mean(axis=0), (N, 1))
    )


def test_noise_is_as_long_as_an_honest_update_and_comes_from_the_generator() -> None:
    honest = np.random.default_rng(1).normal(2.0, 1.0, (5, 20_000)) * 1e-3
    sent = ATTACKS["gaussian"](honest, 4, rng=np.random.default_rng(7))
    lengths = np.linalg.norm(sent, axis=1) / np.sqrt((np.linalg.norm(honest, axis=1) ** 2).mean())
    np.testing.assert_allclose(lengths, 1.0, atol=0.03)
    cosines = sent @ sent.T / np.linalg.norm(sent, axis=1)[:, None] / np.linalg.norm(sent, axis=1)
    assert np.abs(cosines - np.eye(4)).max() < 0.05  # every attacker has noise of its own
    assert (sent == ATTACKS["gaussian"](honest, 4, rng=np.random.default_rng(7))).all()
    assert (sent != ATTACKS["gaussian"](honest, 4, rng=np.random.default_rng(8))).any()
    wide = ATTACKS["gaussian"](honest, 4, rng=np.random.default_rng(7), std=2.0)
    assert wide.std() == pytest.approx(2.0, rel=0.02)


# --- mimic


def test_mimic_copies_the_client_farthest_out_on_the_main_axis(rng: np.random.Generator) -> None:
    honest = rng.normal(0.0, 0.01, (H, D))
    honest[4, 2] = -5.0
    honest[1, 2] = 3.0
    honest[6, 9] = 4.0  # farther than client 1, but along another axis
    assert (ATTACKS["mimic"](honest, N, rng=rng) == honest[4]).all()
    assert (ATTACKS["mimic"](honest, N, rng=rng, index=0) == honest[0]).all()
    assert (ATTACKS["mimic"](np.ones((4, D)), N, rng=rng) == 1).all()
    centred = honest - honest.mean(axis=0)
    axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]  # d × d, too large for real updates
    assert np.abs(honest @ axis).argmax() == 4


# --- evasion

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.floats(-3, 3), st.floats(1e-6, 1e6))
def test_evasion_hits_the_target_changes_as_little_as_possible_and_keeps_the_bound(
    seed: int, target: float, length: float
) -> None:
    rng = np.random.default_rng(seed)
    update, w = rng.normal(size=(2, D)) * [[2.0], [length]]
    u = w / np.linalg.norm(w)
    max_norm = abs(target) + rng.uniform(0.1, 12.0)
    free, bound = evade(update, w, target), evade(update, w, target, max_norm)
    for moved in (free, bound):
        assert moved @ u == pytest.approx(target, abs=1e-9)
    assert np.linalg.norm(bound) <= max_norm * (1 + 1e-12)
    # Along u only.
    assert np.linalg.norm(free - update) == pytest.approx(abs(update @ u - target), abs=1e-9)
    if np.linalg.norm(free) <= max_norm:
        assert (bound == free).all()
    # Nothing else that fulfils both is nearer: try points all over the disc, and close by.
    radius = math.sqrt(max_norm**2 - target**2)
    for _ in range(20):
        offset = rng.normal(size=D) * rng.choice([1e-3, 1.0, 10.0])
        offset += bound if rng.random() < 0.5 else 0
        rest = offset - (offset @ u) * u
        other = target * u + rest * min(1.0, radius / np.linalg.norm(rest))
        assert np.linalg.norm(other - update) >= np.linalg.norm(bound - update) - 1e-9


def test_evasion_of_long_updates_of_ordinary_scale_leaves_no_rounding_behind(
    rng: np.random.Generator,
) -> None:
    w = rng.normal(size=40_960)
    update = 1e6 * w + rng.normal(size=w.size)
    assert abs(evade(update, w) @ w) / np.linalg.norm(w) < 1e-6
    # A direction whose squares underflow is still a direction.
    assert np.linalg.norm(evade(w, w * 1e-200)) < 1e-9


def test_the_score_of_a_linear_probe_falls_to_what_was_aimed_at(
    honest: Any, rng: np.random.Generator
) -> None:
    w, c, own = rng.normal(size=D), -2.0, rng.normal(size=(N, D))
    own += 4 * w / np.linalg.norm(w)

    def score(x: Any) -> Any:
        return 1 / (1 + np.exp(-(x @ w + c)))

    assert (score(own) > 0.8).all()
    sent = ATTACKS["probe_evasion"](honest, N, rng=rng, own=own, direction=w, target=0.0)
    units = sent / np.linalg.norm(sent, axis=1, keepdims=True)  # also when it normalises
    for seen in (sent, units):
        np.testing.assert_allclose(score(seen), 1 / (1 + math.exp(2.0)))
    assert ((sent * own).sum(axis=1) > 0).all()  # what the attackers trained is still in it
    # No target: where the honest mean is.
    hidden = ATTACKS["probe_evasion"](honest, N, own=own, direction=w)
    np.testing.assert_allclose(hidden @ w, honest.mean(axis=0) @ w)
    bound = ATTACKS["probe_evasion"](honest, N, own=own, direction=w, target=0.0, max_norm=1.5)
    np.testing.assert_allclose(np.linalg.norm(bound, axis=1), 1.5)


def test_without_a_probe_the_direction_is_guessed_from_the_two_means(
    honest: Any, rng: np.random.Generator
) -> None:
    own = rng.normal(size=(N, D))
    guess = own.mean(axis=0) - honest.mean(axis=0)
    attack = ATTACKS["probe_evasion"]
    guessed = attack(honest, N, own=own, direction=guess)
    np.testing.assert_allclose(attack(honest, N, own=own), guessed)
    without = np.tile(honest.mean(axis=0), (N, 1))
    np.testing.assert_allclose(attack(honest, N), without, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(3), np.zeros(3)), "length 0"),
        ((np.ones(3), np.ones(4)), "length 4; expected 3"),
        ((np.ones(3), np.ones(3), 2.0, 1.9), "at least .target."),
        ((np.ones(3), np.ones(3), 0.0, -1.0), "at least .target."),
        ((np.ones(3), np.ones(3), math.nan), "target nan"),
        ((np.ones(3), np.ones(3), 0.0, math.inf), "max_norm inf"),
        ((np.array([1.0, math.nan]), np.ones(2)), "update with NaN"),
        ((np.ones(2), np.array([1.0, math.inf])), "direction with NaN"),
        ((np.ones((1, 3)), np.ones(3)), r"shape \(1, 3\)"),
    ],
)
def test_what_evasion_cannot_do_is_an_error(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(AggregationError, match=message):
        evade(*arguments)


# --- what holds for all of them


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float32, torch.bfloat16])
def test_arrays_give_arrays_tensors_give_tensors_and_nothing_is_overwritten(
    honest: Any, name: str, kind: Any
) -> None:
    given = (
        torch.tensor(honest, dtype=kind) if isinstance(kind, torch.dtype) else honest.astype(kind)
    )
    before = given.clone() if isinstance(given, torch.Tensor) else given.copy()
    sent = ATTACKS[name](given, N, rng=np.random.default_rng(5))
    assert type(sent) is type(given)
    assert sent.dtype == kind
    assert tuple(sent.shape) == (N, D)
    assert (given == before).all()
    wide = torch.as_tensor(given).double().numpy()
    exact = ATTACKS[name](wide, N, rng=np.random.default_rng(5))
    loose = {np.float32: 1e-6, np.float64: 0.0, torch.float32: 1e-6, torch.bfloat16: 1e-2}[kind]
    got = torch.as_tensor(sent).double().numpy()
    np.testing.assert_allclose(got, exact, rtol=loose, atol=loose)


@pytest.mark.parametrize(
    "honest",
    [
        np.ones(D),
        np.ones((0, D)),
        np.ones((3, 0)),
        np.full((3, D), math.nan),
        torch.full((3, 4), math.inf),
        np.full((3, D), "1"),
        np.ones((2, 3), dtype=complex),
        np.ones((2, 3), dtype=bool),
        [[1.0, 2.0], [1.0]],
        None,
    ],
)
def test_updates_that_are_not_finite_rows_are_an_error(honest: Any) -> None:
    with pytest.raises(AggregationError, match="got honest"):
        make_attack("sign_flip")(honest, 1)


@pytest.mark.parametrize(
    ("name", "brought"),
    [
        ("scaling", {"own": np.ones((N + 1, D))}),
        ("scaling", {"own": np.ones((N, D - 1))}),
        ("probe_evasion", {"own": np.full((N, D), math.inf)}),
        ("probe_evasion", {"direction": np.zeros(D)}),
        ("probe_evasion", {"direction": np.ones(D + 1)}),
        ("gaussian", {"rng": None}),
        ("gaussian", {"rng": np.random.RandomState(0)}),
        ("mimic", {"index": H}),
        ("collusion", {"honest": np.ones((H, D))}),
    ],
)
def test_what_does_not_fit_the_round_is_an_error(
    honest: Any, name: str, brought: dict[str, Any]
) -> None:
    with pytest.raises(AggregationError, match="got"):
        ATTACKS[name](
            **{"honest": honest, "n_byzantine": N, "rng": np.random.default_rng(0), **brought}
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("allie", {}, "'allie'; expected one of sign_flip, scaling, .*, probe_evasion"),
        ("sign_flip", {"scale": math.nan}, "SignFlip.scale: got nan; expected a finite number"),
        ("scaling", {"factor": math.nan}, "Scaling.factor: got nan"),
        ("scaling", {"factor": "10"}, "Scaling.factor: got '10'"),
        ("scaling", {"own": [[1.0]]}, "no option 'own'; expected any of factor"),
        ("gaussian", {"std": -1.0}, "None or a finite number of at least 0"),
        ("ipm", {"tau": True}, "IPM.tau: got True"),
        ("alie", {"z": math.inf}, "None or a finite number"),
        ("alie", {"z": 1.0, "tau": 1.0}, "got both z 1.0 and tau 1.0"),
        ("alie", {"zeal": 1}, "no option 'zeal'; expected any of z, tau"),
        *[("mimic", {"index": index}, "Mimic.index: got") for index in (-1, True, 1.0)],
        ("probe_evasion", {"max_norm": -1}, "None or a finite number of at least 0"),
        ("probe_evasion", {"direction": [1.0]}, "no option 'direction'"),
    ],
)
def test_names_and_options_are_checked_before_anything_runs(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attack(name, **options)
    attacked = {"update_attack": name, "update_attack_options": options}
    with pytest.raises(ConfigError, match=message):
        Config.of(
            {"model": {"base": "none"}, "clients": {"benign": ["builtin:benign"], **attacked}}
        )


@pytest.mark.parametrize("n", [2, 3, 5, H + 2])
def test_covers_of_colluders_cancel(honest: Any, rng: np.random.Generator, n: int) -> None:
    own = rng.normal(0, 1, (n, D))
    sent = ATTACKS["collusion"](honest, n, own=own, times=4.0)
    np.testing.assert_allclose(sent.mean(axis=0), own.mean(axis=0), atol=1e-12)
    covers = np.linalg.norm(sent - own, axis=1)
    assert covers.mean() == pytest.approx(4.0 * np.linalg.norm(own, axis=1).mean())
    with pytest.raises(AggregationError, match="at least 2"):
        ATTACKS["collusion"](honest, 1, own=own[:1])


def test_alie_needs_a_deviation_and_an_overflow_is_not_sent(honest: Any) -> None:
    with pytest.raises(AggregationError, match="at least 2"):
        ATTACKS["alie"](honest[:1], 1, z=1.0)
    for narrow in (honest.astype(np.float32), torch.tensor(honest, dtype=torch.float16)):
        with pytest.raises(AggregationError, match="overflows"):
            ATTACKS["scaling"](narrow, 1, factor=1e39)


@pytest.mark.parametrize("n", [0, -1, 1.0, True, None, "2"])
def test_a_number_of_attackers_that_is_none_is_an_error(honest: Any, n: Any) -> None:
    with pytest.raises(AggregationError, match="got n_byzantine"):
        make_attack("sign_flip")(honest, n)
