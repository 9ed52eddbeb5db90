"""The mass-mean head is the difference of two means of kinds, and held-out scores by kind come
from heads that never met the kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from loraprobe import fit_probe
from loraprobe.errors import FitError
from loraprobe.fit.calibration import fit_calibration, fpr_threshold
from loraprobe.fit.fit import held_out_scores, kind_splits
from loraprobe.fit.heads import fit_head
from loraprobe.metrics import auroc
from tests.helpers.probes import labelled

P = 60


def kinds_of_rows(
    per_kind: int = 12, kinds: int = 5, seed: int = 0, shift: float = 1.0, offset: float = 1.5
) -> tuple[Any, Any, list[tuple[str]]]:
    """Rows (n, P) of as many benign as malicious kinds: every kind has an offset of its own.

    The classes differ along one direction.
    """
    rng = np.random.default_rng(seed)
    attack = np.eye(P)[0]
    x, y, names = [], [], []
    for label in (0, 1):
        for kind in range(kinds):
            centre = offset * rng.normal(size=P) / np.sqrt(P) + label * shift * attack
            x.append(centre + 0.3 * rng.normal(size=(per_kind, P)) / np.sqrt(P))
            y += [label] * per_kind
            names += [(f"{'bm'[label]}{kind}",)] * per_kind
    return np.concatenate(x).astype(np.float32), np.array(y), names


def slow_direction(x: np.ndarray, y: np.ndarray, kinds: list[tuple[str]]) -> np.ndarray:
    """The definition, row by row."""
    means: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for label, kind in sorted(
        {(int(label), kind[0]) for label, kind in zip(y, kinds, strict=True)}
    ):
        means[label].append(
            sum(
                row.astype(np.float64)
                for row, k, c in zip(x, kinds, y, strict=True)
                if k[0] == kind and c == label
            )
            / sum(k[0] == kind and c == label for k, c in zip(kinds, y, strict=True))
        )
    difference = sum(means[1]) / len(means[1]) - sum(means[0]) / len(means[0])
    return difference / np.linalg.norm(difference)


def test_the_direction_is_the_difference_of_the_means_of_the_kinds() -> None:
    x, y, kinds = kinds_of_rows()
    head = fit_head("mass_mean", x, y, None, seed=0, kinds=kinds)
    assert np.allclose(
        head.coef / np.linalg.norm(head.coef), slow_direction(x, y, kinds), atol=1e-6
    )


def test_more_rows_of_a_kind_do_not_move_it_and_without_kinds_they_do() -> None:
    x, y, kinds = kinds_of_rows()
    again = [row for row, kind in enumerate(kinds) if kind == ("b0",)] * 5
    more = np.r_[np.arange(len(y)), again]
    balanced = [
        fit_head(
            "mass_mean", x[rows], y[rows], None, seed=0, kinds=[kinds[row] for row in rows]
        ).coef
        for rows in (np.arange(len(y)), more)
    ]
    plain = [
        fit_head("mass_mean", x[rows], y[rows], None, seed=0).coef
        for rows in (np.arange(len(y)), more)
    ]
    unit = [[coef / np.linalg.norm(coef) for coef in pair] for pair in (balanced, plain)]
    assert np.allclose(*unit[0], atol=1e-6)
    assert not np.allclose(*unit[1], atol=1e-2)


def middle_of(
    x: np.ndarray, y: np.ndarray, kinds: list[tuple[str]], labels: tuple[int, ...] = (0, 1)
) -> np.ndarray:
    """Half-way between the mean benign and the mean malicious kind, or the mean of one of them."""
    means = []
    for label in labels:
        found = sorted({kind for kind, known in zip(kinds, y, strict=True) if known == label})
        means.append(
            np.mean([x[[one == kind for one in kinds]].mean(axis=0) for kind in found], axis=0)
        )
    return np.mean(means, axis=0)


def test_it_is_the_posterior_of_two_normal_distributions() -> None:
    x, y, kinds = kinds_of_rows(shift=0.6)
    along = (x - middle_of(x, y, kinds)) @ slow_direction(x, y, kinds)
    variance = (along[y == 0].var() + along[y == 1].var()) / 2
    half = np.linalg.norm(
        middle_of(x, y, kinds) - middle_of(x[y == 0], y[y == 0], kinds[: len(y) // 2], (0,))
    )
    densities = [norm.pdf(along, centre, variance**0.5) for centre in (-half, half)]
    assert np.allclose(
        fit_head("mass_mean", x, y, None, seed=0, kinds=kinds)(x),
        densities[1] / sum(densities),
        atol=1e-5,
    )


def test_a_direction_that_turns_round_on_unseen_kinds_cannot_be_calibrated() -> None:
    """Two kinds a class, the second of each opposite to the first.

    Trained on one, the other looks like the other class.
    """
    centres = {"b0": [1, 0, 1], "b1": [-1, 0.1, 1], "m0": [-1, 0, 1.1], "m1": [1, 0.1, 1.1]}
    x = np.array(
        [centre for centre in centres.values() for _ in range(8)], np.float32
    ) + np.random.default_rng(0).normal(0, 0.01, (32, 3))
    kinds, y = [(name,) for name in centres for _ in range(8)], np.repeat([0, 1], 16)
    scores = held_out_scores(
        x.astype(np.float32), y, list(range(32)), kinds=kinds, head="mass_mean"
    )
    with pytest.raises(FitError, match=r"must rise|slope above 0"):
        fit_calibration("platt", scores, y, list(range(32)), "adapter")


def test_a_kind_never_trains_the_head_that_scores_it_nor_do_mixtures_with_it() -> None:
    _, y, kinds = kinds_of_rows(per_kind=4)
    mixed = [
        (*kind, "b0") if kind[0].startswith("m") and row % 2 else kind
        for row, kind in enumerate(kinds)
    ]
    splits = list(kind_splits(mixed, len(y)))
    assert sorted(row for _, test in splits for row in test) == list(range(len(y)))
    for train, test in splits:
        [scored] = {mixed[row][0] for row in test}
        assert train
        assert all(scored not in mixed[row] for row in train)


def test_out_of_kind_scores_are_lower_than_out_of_fold_scores_where_kinds_differ() -> None:
    x, y, kinds = kinds_of_rows(shift=0.2)
    clients = list(range(len(y)))
    assert (
        auroc(y, held_out_scores(x, y, clients, head="linear"))
        > auroc(y, held_out_scores(x, y, clients, kinds=kinds, head="linear")) + 0.1
    )


def test_a_probe_with_kinds_takes_its_cut_from_kinds_that_were_left_out() -> None:
    made = labelled(groups=24)
    kinds = [
        (f"{label}{group[-1]}",) for label, group in zip(made.labels, made.groups, strict=True)
    ]
    options: dict[str, Any] = {"threshold": "fpr:0.1", "calibration": "platt", "recipe": "all_b"}
    with_kinds = fit_probe(
        made.adapters, made.labels, head="mass_mean", groups=made.groups, kinds=kinds, **options
    )
    training = with_kinds.facts["training"]
    assert training["kinds"] == len(set(kinds))
    assert "out-of-kind" in training["score_distribution"]["what"]
    assert "folds" not in training
    features = with_kinds.featurizer(made.adapters)
    scores = held_out_scores(features, made.labels, made.groups, kinds=kinds, head="mass_mean")
    calibration = fit_calibration("platt", scores, made.labels, made.groups, "adapter")
    assert with_kinds.calibration == calibration
    assert with_kinds.threshold == fpr_threshold(0.1, calibration(scores), made.labels, made.groups)


@pytest.mark.parametrize("kinds", [[("a",)] * 3, [()] * 24, [("a",)] * 24, ["a", "ab"] * 12])
def test_kinds_that_do_not_allow_a_fit_are_refused(kinds: Any) -> None:
    x, y = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32), np.arange(24) % 2
    with pytest.raises(FitError, match=r"expected"):
        held_out_scores(x, y, list(range(24)), kinds=kinds, head="linear")


def test_means_that_are_the_same_are_refused() -> None:
    x, y = np.ones((24, 5), np.float32), np.arange(24) % 2
    with pytest.raises(FitError, match="the same"):
        fit_head("mass_mean", x, y, None, seed=0)
