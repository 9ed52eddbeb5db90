"""The invariant features of many adapters, for many choices of training adapters.

A study that leaves kinds, sources and settings out fits the bases of
`loraprobe.features.invariant` anew for every fold. Here sums over all adapters are kept, and what
is left out is subtracted: exact, and a second a fold instead of minutes.
tests/zoo/test_smollm2_study.py holds both against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraprobe import Adapter
from loraprobe.features import leaf_name

_PASSES = 4
_EXTRA = 8
Array = Any


@dataclass
class _Module:
    """All adapters' changes of one weight, D_i = left_i @ right_i, of norm 1 each.

    Attributes:
        owners: (n,) which adapters have it.
        place: (columns,) to which of the owners, and to which of its columns, a column belongs.
        left, right: factors, side by side: (d_out, columns), (d_in, columns).
        roots: C with C_i C_i^T = D_i D_i^T, (d_out, columns), and the same of D_i^T D_i.
        sums: sum D D^T (d_out, d_out) and sum D^T D (d_in, d_in) over all; None where there are
            fewer columns than that, and the roots are the shorter way.
        warm: leading directions of the sums.
    """

    owners: np.ndarray
    place: tuple[np.ndarray, np.ndarray]
    left: np.ndarray
    right: np.ndarray
    roots: tuple[np.ndarray, np.ndarray]
    sums: tuple[np.ndarray | None, np.ndarray | None]
    warm: list[np.ndarray]


class Study:
    """Adapters read once; features for any training subset."""

    def __init__(self, adapters: Sequence[Adapter], leaves: Sequence[str], k: int = 8) -> None:
        self.count = len(adapters)
        self.k = k
        names = dict.fromkeys(name for adapter in adapters for name in adapter)
        read = sorted(name for name in names if leaf_name(name) in leaves)
        self.modules = {name: _read(adapters, name, k) for name in read}

    def features(self, keep: np.ndarray) -> np.ndarray:
        """Features of all adapters, with bases and centre of those in `keep`: (n, p) float32.

        Every row is scaled to norm 1; zero where a module is not adapted.
        """
        blocks = [_block(module, keep, self.count, self.k) for module in self.modules.values()]
        rows = np.concatenate(blocks, axis=1)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        unit_rows: np.ndarray = (rows / np.maximum(norms, 1e-12)).astype(np.float32)
        return unit_rows


def grams(adapters: Sequence[Adapter], keeps: Sequence[np.ndarray], k: int = 8) -> list[np.ndarray]:
    """Inner products of the features of all modules, for each choice of training adapters.

    One module is held at a time, so that adapters of large models can be studied.

    Returns:
        One matrix a choice, (n, n) float64, of rows of norm 1.
    """
    totals = [np.zeros((len(adapters),) * 2) for _ in keeps]
    for name in sorted({name for adapter in adapters for name in adapter}):
        module = _read(adapters, name, k)
        for keep, total in zip(keeps, totals, strict=True):
            block = _block(module, keep, len(adapters), k).astype(np.float64)
            total += block @ block.T
    for total in totals:
        norms = np.sqrt(np.maximum(np.diag(total), 1e-24))
        total /= np.outer(norms, norms)
    return totals


def _block(module: _Module, keep: np.ndarray, count: int, k: int) -> np.ndarray:
    """One module's features of all adapters, (count, k k + k (k + 1) / 2); zero where it is not."""
    left, right = (_basis(module, side, keep, k) for side in (0, 1))
    product = _spread(module, left.T @ module.left) @ _spread(module, right.T @ module.right).mT
    root = _spread(module, left.T @ module.roots[0])
    at = np.triu_indices(left.shape[1])
    gram = (root @ root.mT)[:, at[0], at[1]] * np.where(at[0] == at[1], 1.0, np.sqrt(2))
    values = np.concatenate([product.reshape(len(product), -1), gram], axis=1)
    counted = keep[module.owners]
    values -= values[counted].mean(axis=0) if counted.any() else 0.0
    rows = np.zeros((count, values.shape[1]), np.float32)
    rows[module.owners] = values
    return rows


def coordinates(products: np.ndarray) -> np.ndarray:
    """Rows with these inner products: (n, n) float32."""
    values, vectors = np.linalg.eigh(products)
    found: np.ndarray = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
    return found


def _spread(module: _Module, columns: np.ndarray) -> np.ndarray:
    """Columns given back to their owners: (k, columns) -> (n, k, largest rank)."""
    owner, column = module.place
    by_owner = np.zeros((len(module.owners), len(columns), int(column.max()) + 1), np.float32)
    by_owner[owner, :, column] = columns.T
    return by_owner


def _read(adapters: Sequence[Adapter], name: str, k: int) -> _Module:
    owners: list[int] = []
    parts: list[tuple[Array, Array, Array, Array]] = []
    for index, adapter in enumerate(adapters):
        if name not in adapter:
            continue
        pair = adapter[name]
        B = np.asarray(pair.B, np.float64) * pair.scaling
        A = np.asarray(pair.A, np.float64)
        norm = float(np.sqrt(np.vdot(B.T @ B, A @ A.T)))
        if not norm > 0:
            continue
        B /= norm
        owners.append(index)
        parts.append((B, A.T, B @ _root(A @ A.T), A.T @ _root(B.T @ B)))
    left, right, *roots = (
        np.concatenate([part[at] for part in parts], axis=1).astype(np.float32) for at in range(4)
    )
    ranks = [part[0].shape[1] for part in parts]
    place = np.repeat(np.arange(len(ranks)), ranks), np.concatenate([np.arange(r) for r in ranks])
    sums = tuple(root @ root.T if len(root) <= len(place[0]) else None for root in roots)
    module = _Module(np.array(owners), place, left, right, tuple(roots), sums, [])  # type: ignore[arg-type]
    nobody = np.ones(len(adapters), bool)
    module.warm = [_random(len(root), k) for root in roots]
    module.warm = [_iterated(module, side, nobody, 12) for side in (0, 1)]
    return module


def _root(square: Array) -> Array:
    """R with R R^T = a symmetric matrix that is not negative."""
    values, vectors = np.linalg.eigh(square)
    return vectors * np.sqrt(np.maximum(values, 0))


def _basis(module: _Module, side: int, keep: np.ndarray, k: int) -> Array:
    """The k leading directions of a side, over the kept adapters."""
    if keep[module.owners].all():
        return module.warm[side][:, :k]
    return _iterated(module, side, keep, _PASSES)[:, :k]


def _iterated(module: _Module, side: int, keep: np.ndarray, passes: int) -> Array:
    """Subspace iteration on the sum over the kept adapters, which is never built."""
    mask = keep[module.owners][module.place[0]]
    roots, total, basis = module.roots[side], module.sums[side], module.warm[side]
    roots = roots[:, mask if total is None else ~mask]

    def image(columns: Array) -> Array:
        part = roots @ (roots.T @ columns)
        return part if total is None else total @ columns - part

    for _ in range(passes):
        basis = np.linalg.qr(image(basis)).Q
    vectors = np.linalg.eigh(basis.T @ image(basis)).eigenvectors
    return basis @ vectors[:, ::-1]


def _random(size: int, k: int) -> Array:
    rng = np.random.default_rng(0)
    start = rng.standard_normal((size, min(k + _EXTRA, size))).astype(np.float32)
    return np.linalg.qr(start).Q
