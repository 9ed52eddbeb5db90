"""Features of every client at the largest k, from which those of a smaller k are cut.

Directions are learnt in the order of their eigenvalues, so the first k of 32 are those of k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraprobe.adapters.adapter import Adapter
from loraprobe.features.invariant import change_of, learn_bases

LARGEST = 32
MISSING = ("mean", "mean, scaled", "zero")
"""How a module that an adapter does not have enters: with the mean features of the training
adapters, with these and the others multiplied by sqrt(known / read), or with zeros.
"""
Rows = np.ndarray


@dataclass(frozen=True)
class Block:
    """One module of all clients: which have it, and its projections (n, k, k) where they do."""

    has: np.ndarray
    product: np.ndarray
    gram: np.ndarray
    gram_of_b: np.ndarray


def blocks(
    adapters: Sequence[Adapter], learnt_from: Sequence[int], modules: Sequence[str]
) -> dict[str, Block]:
    """Every module's projections of all adapters, on bases learnt from some of them."""
    found = {}
    for module in modules:
        having = [adapters[row] for row in learnt_from if module in adapters[row]]
        left, right = (basis.astype(np.float64) for basis in learn_bases(module, having, LARGEST))
        has = np.array([module in adapter for adapter in adapters])
        shape = (len(adapters), left.shape[1])
        product = np.zeros((*shape, right.shape[1]), np.float32)
        gram, gram_of_b = (np.zeros((*shape, left.shape[1]), np.float32) for _ in range(2))
        for row in np.flatnonzero(has):
            change = change_of(adapters[row], module)
            projected = left.T @ change.left
            product[row] = projected @ (change.right @ right) / change.norm
            gram[row] = projected @ change.gram_right @ projected.T / change.norm**2
            gram_of_b[row] = projected @ projected.T / np.trace(change.gram_left)
        found[module] = Block(has, product, gram, gram_of_b)
    return found


def matrix(
    found: dict[str, Block], train: Rows, names: Sequence[str], k: int, missing: str = "mean"
) -> np.ndarray:
    """Feature vectors of all clients, (n, p) float32.

    Args:
        train: rows whose mean stands for a missing module.
        missing: one of `MISSING`.
    """
    parts, has = [], []
    for block in found.values():
        columns = np.concatenate([_flat(getattr(block, name), name, k) for name in names], axis=1)
        known = train[block.has[train]]
        if missing != "zero" and len(known):
            columns = columns - columns[known].mean(axis=0)
        parts.append(columns * block.has[:, None])
        has.append(block.has)
    rows = np.concatenate(parts, axis=1)
    if missing == "mean, scaled":
        rows = rows * np.sqrt(len(has) / np.maximum(np.sum(has, axis=0), 1))[:, None]
    return np.asarray(rows, np.float32)


def _flat(values: np.ndarray, name: str, k: int) -> np.ndarray:
    values = values[:, :k, :k]
    if name == "product":
        return values.reshape(len(values), -1)
    rows, columns = np.triu_indices(values.shape[1])
    return values[:, rows, columns] * np.where(rows == columns, 1.0, np.sqrt(2.0))


def of_b(adapters: Sequence[Adapter], first_layer: bool) -> np.ndarray:
    """B of all modules, or of the first layer's, as unit vectors: (n, p) float32."""
    vectors = []
    for adapter in adapters:
        factors = [
            np.asarray(adapter[module].B, np.float64).reshape(-1)
            for module in sorted(adapter)
            if ".layers.0." in module or not first_layer
        ]
        vector = np.concatenate(factors)
        vectors.append(vector / np.linalg.norm(vector))
    return np.array(vectors, np.float32)
