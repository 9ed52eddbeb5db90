"""What every fit stands on: checked rows, groups held out whole, and the row space of wide data."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FitError, LayoutMismatch, NonFiniteError
from ..heads import FloatArray, check_features
from ..metrics import both_classes, checked_labels

Groups = Iterable[Hashable] | None
Kinds = Sequence[Sequence[Hashable]]
"""One entry a row: the kind of data it was trained on, then the kinds that were mixed into it."""
Float64 = NDArray[np.float64]

_COLUMN_BLOCK = 4096  # columns in float64 at a time: (2000, 40960) at once would be 655 MB


@dataclass(frozen=True)
class TrainingData:
    """Checked inputs of a fit.

    Attributes:
        x: (n, p) float32, finite.
        y: (n,), 0 = benign, 1 = malicious, both present.
        groups: (n,), equal numbers for rows that belong together.
        kinds: (n,) the kind of data that each row names first; its group where none are named.
    """

    x: FloatArray
    y: NDArray[np.int64]
    groups: NDArray[np.int64]
    kinds: tuple[Hashable, ...]


def check_training_data(x: Any, y: Any, groups: Groups, kinds: Kinds | None = None) -> TrainingData:
    """Check x (n, p), y (n,), groups (n,) and kinds (n,).

    Without groups, each row is a group of its own.

    Raises:
        FitError: lengths differ, x is not a finite numeric (n, p), or the labels are not 0 and 1
            with both present.
    """
    shape = np.shape(x)
    if len(shape) != 2 or 0 in shape:
        raise FitError(
            f"fit: got features of shape {shape}; expected a non-empty (n, p). Pass the array that"
            " a Featurizer returns"
        )
    try:
        features = check_features(x, shape[1])
    except (LayoutMismatch, NonFiniteError) as error:
        raise FitError(f"fit: {error}") from error
    labels = both_classes(checked_labels(y, len(features)))
    codes = _group_numbers(range(len(features)) if groups is None else groups)
    if codes.shape != (len(features),):
        raise FitError(f"fit: got {len(codes)} groups for {len(features)} rows; expected one a row")
    row_kinds = codes.tolist() if kinds is None else first_kinds(kinds, len(features))
    return TrainingData(x=features, y=labels, groups=codes, kinds=tuple(row_kinds))


def _group_numbers(groups: Iterable[Hashable]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    try:
        return np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)
    except TypeError as error:
        raise FitError(
            f"fit: got a group that cannot be compared ({error}); expected a hashable one a row,"
            " such as a client id"
        ) from error


def first_kinds(kinds: Kinds, count: int) -> list[Hashable]:
    """The kind that every row names first.

    Raises:
        FitError: not one entry a row, or an entry that is empty or no list.
    """
    entries = [tuple(entry) if isinstance(entry, tuple | list) else () for entry in kinds]
    if len(entries) != count or not all(entries):
        raise FitError(
            f"got kinds of {sum(map(bool, entries))} adapters for {count}; expected a list for"
            " each, its own kind first, such as ['alpaca']"
        )
    return [entry[0] for entry in entries]


def held_out_mask(
    y: NDArray[np.int64], groups: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Choose whole groups to hold out: about ``fraction`` of the rows of each class.

    Args:
        y: (n,) labels 0/1.
        groups: (n,) group numbers; a group may hold both classes.

    Returns:
        (n,) bool, True for held-out rows. No group is on both sides, and both sides hold both
        classes.

    Raises:
        FitError: a class has fewer than two groups (then no such split exists), or ``fraction`` is
            not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise FitError(
            f"held-out fraction: got {fraction}; expected a number between 0 and 1, such as 0.2"
        )
    groups_of = {label: set(groups[y == label].tolist()) for label in (0, 1)}
    if min(len(members) for members in groups_of.values()) < 2:
        raise FitError(
            f"held-out split: got {len(groups_of[0])} benign and {len(groups_of[1])} malicious"
            " groups, expected at least 2 of each, so that whole groups can be held out. Add"
            " clients or runs, or choose a head without early stopping (linear)"
        )
    rng = np.random.default_rng(seed)
    held: set[int] = set()
    # The class with fewer groups has less choice, so it goes first.
    for label in sorted(groups_of, key=lambda c: len(groups_of[c])):
        numbers, sizes = np.unique(groups[y == label], return_counts=True)
        missing = fraction * sizes.sum() - sizes[np.isin(numbers, list(held))].sum()  # rows
        for i in rng.permutation(len(numbers)):
            group = int(numbers[i])
            nearer = abs(missing - sizes[i]) < abs(missing)
            wanted = nearer or not held & groups_of[label]
            spared = all(members - held - {group} for members in groups_of.values())
            if group not in held and wanted and spared:
                held.add(group)
                missing -= sizes[i]
    return np.isin(groups, list(held))


def row_space(x: FloatArray) -> tuple[Float64, Float64]:
    """Coordinates of the rows of x (n, p) in an orthonormal basis V (p, k) that is not formed.

    With x x' = U S^2 U', the basis is V = x' U / S. Directions below the rounding of x x' are
    dropped.

    Returns:
        (coordinates x V = U S (n, k), row weights U / S (n, k)): the vector V c of feature space is
        x' (U / S) c.
    """
    values, vectors = np.linalg.eigh(inner_products(x, x))
    keep = values > len(x) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    singular = np.sqrt(values[keep])  # (k,)
    return vectors[:, keep] * singular, vectors[:, keep] / singular


def _column_blocks(x: FloatArray) -> Iterator[Float64]:
    return (
        x[:, start : start + _COLUMN_BLOCK].astype(np.float64)
        for start in range(0, x.shape[1], _COLUMN_BLOCK)
    )


def inner_products(x: FloatArray, other: FloatArray) -> Float64:
    """x other': (n, p), (m, p) -> (n, m), in float64."""
    products = np.zeros((len(x), len(other)))
    for left, right in zip(_column_blocks(x), _column_blocks(other), strict=True):
        products += left @ right.T
    return products


def combine_rows(x: FloatArray, weights: Float64) -> Float64:
    """x' weights: (n, p), (n, ...) -> (p, ...), in float64."""
    return np.concatenate([block.T @ weights for block in _column_blocks(x)])


def pos_weight_of(y: NDArray[np.int64]) -> float:
    """n_benign / n_malicious, so that both classes weigh the same in the loss."""
    return float((y == 0).sum() / (y == 1).sum())


def logistic(x: Float64, y: NDArray[np.int64], C: float, max_iter: int) -> tuple[Float64, float]:
    """Class-balanced L2 logistic regression to convergence: coefficients (p,) and intercept.

    Raises:
        FitError: no convergence within `max_iter`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # scikit-learn's tol of 1e-4 stops while coefficients still move in the second digit: the loss
    # is only 1/(C n) strongly convex
    model = LogisticRegression(
        C=C, class_weight="balanced", solver="lbfgs", max_iter=max_iter, tol=1e-9
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            model.fit(x, y)
        except ConvergenceWarning as error:
            raise FitError(
                f"logistic regression: got no convergence in {max_iter} iterations. Lower C ({C})"
                " or raise max_iter"
            ) from error
    return model.coef_[0], float(model.intercept_[0])
