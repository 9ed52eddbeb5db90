"""The invariant features of many adapters, for many choices of training adapters.

A study that leaves kinds, sources and settings out fits the bases of `loraprobe.invariant` anew for
every fold. Here sums over all adapters are kept, and what is left out is subtracted: exact, and a
second a fold instead of minutes. tests/zoo/test_smollm2_study.py holds both against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraprobe import Adapter

_PASSES = 4
_EXTRA = 8
Array = Any


@dataclass
class _Module:
    """All adapters' changes of one weight, D_i = left_i @ right_i, of norm 1 each.

    Attributes:
        owners: (n,) which adapters have it.
        starts: (n + 1,) columns of `left`, rows of `right`, of each.
        sums: sum D D^T (d_out, d_out) and sum D^T D (d_in, d_in) over all.
    """

    owners: np.ndarray
    starts: np.ndarray
    left: np.ndarray
    right: np.ndarray
    sums: tuple[np.ndarray, np.ndarray]
    warm: tuple[np.ndarray, np.ndarray]


class Study:
    """Adapters read once; features for any training subset."""

    def __init__(self, adapters: Sequence[Adapter], leaves: Sequence[str], k: int = 8) -> None:
        self.count = len(adapters)
        self.k = k
        names = dict.fromkeys(name for adapter in adapters for name in adapter)
        chosen = sorted(name for name in names if name.rsplit(".", 1)[-1] in leaves)
        self.modules = {name: _read(adapters, name, k) for name in chosen}

    def features(self, keep: np.ndarray, names: Sequence[str] = ("product", "gram")) -> np.ndarray:
        """Features of all adapters, with bases and centre of those in `keep`: (n, p) float32.

        Every row is scaled to norm 1, as the recipe's l2 does; zero where a module is not adapted.
        """
        blocks = [self._module(module, keep, names) for module in self.modules.values()]
        rows = np.concatenate(blocks, axis=1)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows / np.maximum(norms, 1e-12)).astype(np.float32)

    def _module(self, of: _Module, keep: np.ndarray, names: Sequence[str]) -> np.ndarray:
        left, right = (_basis(of, side, keep, self.k) for side in (0, 1))
        seen = left.T @ of.left
        there = of.right @ right
        parts = []
        for start, end in zip(of.starts[:-1], of.starts[1:], strict=True):
            here = seen[:, start:end]
            found = []
            if "product" in names:
                found.append((here @ there[start:end]).reshape(-1))
            if "gram" in names:
                core = here @ (of.right[start:end] @ of.right[start:end].T) @ here.T
                at = np.triu_indices(len(core))
                found.append(core[at] * np.where(at[0] == at[1], 1.0, np.sqrt(2)))
            parts.append(np.concatenate(found))
        values = np.array(parts)
        values -= values[keep[of.owners]].mean(axis=0)
        rows = np.zeros((self.count, values.shape[1]))
        rows[of.owners] = values
        return rows


def _read(adapters: Sequence[Adapter], name: str, k: int) -> _Module:
    owners, lefts, rights = [], [], []
    for index, adapter in enumerate(adapters):
        if name not in adapter:
            continue
        pair = adapter[name]
        B = np.asarray(pair.B, np.float32) * np.float32(pair.scaling)
        A = np.asarray(pair.A, np.float32)
        norm = float(np.sqrt(np.vdot(B.T @ B, A @ A.T)))
        if not norm > 0:
            continue
        owners.append(index)
        lefts.append(B / norm)
        rights.append(A)
    left, right = np.concatenate(lefts, axis=1), np.concatenate(rights)
    starts = np.cumsum([0, *(len(part) for part in rights)])
    sums = tuple(_sum(left, right, starts, side, range(len(owners))) for side in (0, 1))
    warm = tuple(_iterated(total, _random(len(total), k), k) for total in sums)
    return _Module(np.array(owners), starts, left, right, sums, warm)  # type: ignore[arg-type]


def _sum(left: Array, right: Array, starts: Array, side: int, which: Sequence[int]) -> Array:
    """sum D D^T (side 0) or D^T D (side 1) over some adapters."""
    total = np.zeros((len(left),) * 2 if side == 0 else (right.shape[1],) * 2, np.float32)
    for index in which:
        part = slice(starts[index], starts[index + 1])
        B, A = left[:, part], right[part]
        if side == 0:
            total += B @ (A @ A.T) @ B.T
        else:
            total += A.T @ (B.T @ B) @ A
    return total


def _basis(of: _Module, side: int, keep: Array, k: int) -> Array:
    """The k leading directions of a side, over the kept adapters."""
    out = np.flatnonzero(~keep[of.owners])
    if not len(out):
        return of.warm[side][:, :k]
    if len(out) > len(of.owners) / 2:
        kept = np.flatnonzero(keep[of.owners])
        total = _sum(of.left, of.right, of.starts, side, kept)
    else:
        total = of.sums[side] - _sum(of.left, of.right, of.starts, side, out)
    return _iterated(total, of.warm[side], k)[:, :k]


def _iterated(total: Array, start: Array, k: int) -> Array:
    side = start
    for _ in range(_PASSES):
        side = np.linalg.qr(total @ side).Q
    values, vectors = np.linalg.eigh(side.T @ (total @ side))
    found: Array = side @ vectors[:, ::-1]
    del values
    return found


def _random(size: int, k: int) -> Array:
    rng = np.random.default_rng(0)
    start = rng.standard_normal((size, min(k + _EXTRA, size))).astype(np.float32)
    return np.linalg.qr(start).Q
