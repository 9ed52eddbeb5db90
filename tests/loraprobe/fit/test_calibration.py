"""Thresholds keep their budget on new groups, calibration is a monotone map that makes scores mean
what they say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from loraprobe.calibration import METHODS, Calibration, Method
from loraprobe.errors import FitError
from loraprobe.fit.calibration import budget_of, fit_calibration, fnr_threshold, fpr_threshold
from loraprobe.metrics import auroc, ece

REPEATS = 1500


def grouped_scores(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of 1 to 4 rows a group, alike within it, and the group of each row.

    Groups are exchangeable.
    """
    sizes = rng.integers(1, 5, size=groups)
    index = np.repeat(np.arange(groups), sizes)
    return expit(rng.normal(size=groups)[index] + 0.7 * rng.normal(size=len(index))), index


def highest(scores: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The highest score of each group."""
    found = np.zeros(index.max() + 1)
    np.maximum.at(found, index, scores)
    return found


def realised(budget: float, groups: int, what: str, shift: int = 0) -> tuple[float, float]:
    """Mean and standard error over fresh draws of the share of new groups on the wrong side of a
    cut.

    `what`: "fpr", "fnr" (scores mirrored), or "rows", the same cut with every row taken for a group
        of its own.
    """
    rng, shares = np.random.default_rng(groups), []
    for _ in range(REPEATS):
        scores, index = grouped_scores(rng, groups)
        new = highest(*grouped_scores(rng, 40))
        if what == "fnr":
            cut = fnr_threshold(budget, 1 - scores, np.ones(len(scores), int), index)
            shares.append(np.mean(1 - new < cut))
        else:
            keys = np.arange(len(scores)) if what == "rows" else index
            shares.append(
                np.mean(new >= fpr_threshold(budget, scores, np.zeros(len(scores), int), keys))
            )
    return float(np.mean(shares)), float(np.std(shares) / np.sqrt(REPEATS))


@pytest.mark.parametrize(
    ("budget", "groups", "exact"),
    [(0.1, 9, 0.1), (0.1, 39, 0.1), (0.05, 30, 1 / 31), (0.25, 50, 12 / 51)],
)
def test_the_share_of_new_groups_flagged_is_the_conformal_one(
    budget: float, groups: int, exact: float
) -> None:
    """For exchangeable groups without ties it is exactly floor((m + 1) budget) / (m + 1).

    Within the budget, and near it.
    """
    assert exact <= budget
    for what in ("fpr", "fnr"):
        share, error = realised(budget, groups, what)
        assert abs(share - exact) < 4 * error
        assert share <= budget + 4 * error


def test_counting_rows_as_groups_breaks_the_budget() -> None:
    share, error = realised(0.1, 39, "rows")
    # negative control: the group's highest score is what has to stay below
    assert share > 0.1 + 10 * error


def test_threshold_is_the_smallest_number_that_lets_its_group_through() -> None:
    scores, labels = np.array([0.1, 0.9, 0.2, 0.3, 0.4, 1.0]), np.array([0, 0, 0, 0, 0, 1])
    groups = ["a", "a", "b", "c", "d", "evil"]
    # rank ceil(5 * 0.6) = 3 of 0.2, 0.3, 0.4, 0.9
    assert fpr_threshold(0.4, scores, labels, groups) == np.nextafter(0.4, 1)
    assert fpr_threshold(0.2, scores, labels, groups) == np.nextafter(0.9, 1)  # rank 4
    # flags nothing at all
    assert fpr_threshold(0.2, np.minimum(scores * 2, 1), labels, groups) == np.nextafter(1.0, 2)
    assert fnr_threshold(0.4, 1 - scores, 1 - labels, groups) == pytest.approx(0.6)


@given(st.floats(0.001, 0.999))
@settings(deadline=None, max_examples=100)
def test_too_few_groups_are_refused_with_the_number_that_is_enough(budget: float) -> None:
    needed = int(np.ceil(1 / budget)) - 1
    scores = np.linspace(0, 1, needed)
    fpr_threshold(budget, scores, np.zeros(needed, int), range(needed))
    fewer = needed - 1
    with pytest.raises(FitError, match=rf"needs at least {needed} malicious groups, got {fewer}"):
        fnr_threshold(
            budget, np.linspace(0, 1, 2 * fewer), np.ones(2 * fewer, int), list(range(fewer)) * 2
        )


@pytest.mark.parametrize(
    "text", [*"fpr fpr: fpr:0 fpr:1 fpr:-0.1 fpr:nan fpr:x fnr:0.1".split(), "", "fpr:0.1:2"]
)
def test_budgets_of_another_form_are_refused(text: str) -> None:
    assert budget_of("fpr:0.01", "fpr") == 0.01
    with pytest.raises(FitError, match="'fpr:'"):
        budget_of(text, "fpr")


def miscalibrated(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(overconfident and shifted scores, labels, the true probabilities) of n rows."""
    rng = np.random.default_rng(seed)
    true = rng.normal(scale=1.5, size=n)
    return expit(4 * true + 2), (rng.random(n) < expit(true)).astype(int), expit(true)


@pytest.mark.parametrize("method", METHODS)
def test_calibration_lowers_the_error_of_a_miscalibrated_score_and_keeps_its_order(
    method: Method,
) -> None:
    scores, labels, _ = miscalibrated(3000, 0)
    calibration = fit_calibration(
        method, scores, labels, [row // 3 for row in range(3000)], "local step"
    )
    assert (calibration.method, calibration.unit, calibration.rows, calibration.groups) == (
        method,
        "local step",
        3000,
        1000,
    )
    new, truth, true = miscalibrated(6000, 1)
    mapped = calibration(new)
    assert mapped.shape == new.shape
    assert mapped.dtype == np.float64
    assert mapped.min() >= 0
    assert mapped.max() <= 1
    assert ece(truth, new) > 0.15
    assert ece(truth, mapped) < 0.03
    assert np.abs(mapped - true).mean() < 0.04 < 0.15 < np.abs(new - true).mean()
    assert (np.diff(calibration(np.linspace(0, 1, 500))) >= 0).all()
    # Platt is strictly monotone, isotonic merges scores into ties
    assert auroc(truth, mapped) == pytest.approx(
        auroc(truth, new), abs=1e-12 if method == "platt" else 2e-3
    )


def test_platt_recovers_the_distortion_and_leaves_calibrated_scores_alone() -> None:
    scores, labels, true = miscalibrated(20_000, 2)
    undo = fit_calibration("platt", scores, labels, range(20_000), "adapter")
    assert (undo.inputs[0], undo.outputs[0]) == (
        pytest.approx(1 / 4, rel=0.05),
        pytest.approx(-1 / 2, rel=0.1),
    )
    nothing = fit_calibration("platt", true, labels, range(20_000), "adapter")
    assert (nothing.inputs[0], nothing.outputs[0]) == (
        pytest.approx(1, rel=0.05),
        pytest.approx(0, abs=0.05),
    )


@pytest.mark.parametrize("gap", [1e-9, 0.2, 0.5])
def test_platt_claims_no_certainty_from_few_separable_rows(gap: float) -> None:
    labels = np.arange(20) % 2
    mapped = fit_calibration("platt", 0.5 + gap * (2 * labels - 1), labels, range(20), "adapter")(
        0.5 + gap * (2 * labels - 1)
    )
    # Platt's targets for 10 rows of a class: 11 / 12 and 1 / 12
    assert mapped[labels == 1] == pytest.approx(11 / 12, abs=0.01)
    assert mapped[labels == 0] == pytest.approx(1 / 12, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["reversed", "constant"])
def test_scores_that_do_not_rise_with_the_labels_are_refused(method: Method, kind: str) -> None:
    scores, labels, _ = miscalibrated(500, 0)
    fit_calibration(method, scores, labels, range(500), "adapter")
    with pytest.raises(FitError, match=r"rise"):
        fit_calibration(
            method,
            1 - scores if kind == "reversed" else np.full(500, 0.3),
            labels,
            range(500),
            "adapter",
        )


def test_scores_of_exactly_0_and_1_stay_finite_and_ordered() -> None:
    mapped = Calibration("platt", (0.5,), (0.0,), "adapter", 4, 4)(
        np.array([0.0, 1e-6, 0.5, 1 - 1e-6, 1.0])
    )
    assert np.isfinite(mapped).all()
    assert (np.diff(mapped) > 0).all()
    assert mapped[2] == 0.5
    outside = Calibration("isotonic", (0.2, 0.4), (0.1, 0.9), "adapter", 4, 4)(
        np.array([0.0, 0.3, 1.0])
    )
    assert outside == pytest.approx([0.1, 0.5, 0.9])  # clipped beyond the knots


@pytest.mark.parametrize(
    ("method", "inputs", "outputs"),
    [
        ("platt", (0.0,), (1.0,)),
        ("platt", (-1.0,), (1.0,)),
        ("platt", (1.0, 2.0), (0.0, 0.0)),
        ("platt", (np.inf,), (0.0,)),
        ("platt", (1.0,), (np.nan,)),
        ("platt", (), ()),
        ("isotonic", (), ()),
        ("isotonic", (0.1, 0.2), (0.1,)),
        ("isotonic", (0.2, 0.1), (0.1, 0.2)),
        ("isotonic", (0.1, 0.2), (0.2, 0.1)),
        ("isotonic", (0.1, 0.2), (0.2, 1.1)),
        ("isotonic", (0.1, 0.2), (-0.1, 1.0)),
        ("beta", (1.0,), (1.0,)),
    ],
)
def test_maps_that_are_not_monotone_probabilities_cannot_be_made(
    method: Any, inputs: tuple[float, ...], outputs: tuple[float, ...]
) -> None:
    Calibration("isotonic", (0.1, 0.2), (0.1, 0.2), "adapter", 2, 2)
    with pytest.raises(FitError):
        Calibration(method, inputs, outputs, "adapter", 2, 2)


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_are_for_a_prior_of_one_half_whatever_the_training_shares(
    method: Method,
) -> None:
    rng = np.random.default_rng(0)
    benign, malicious = (1 / (1 + np.exp(-rng.normal(mean, 1, 20_000))) for mean in (-1.0, 1.0))
    points = np.array([0.3, 0.5, 0.8])
    maps = []
    for share in (2_000, 20_000):  # of the malicious rows that are in training
        scores, labels = (
            np.r_[benign, malicious[:share]],
            np.r_[np.zeros(20_000, int), np.ones(share, int)],
        )
        maps.append(fit_calibration(method, scores, labels, range(len(labels)), "adapter")(points))
    assert maps[0] == pytest.approx(maps[1], abs=0.04)
    # halfway between the two classes; by the training shares it would be 0.09
    assert maps[0][1] == pytest.approx(0.5, abs=0.05)
