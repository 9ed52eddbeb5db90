"""The numbers of a report: of every module of every adapter, and between adapters.

Products B A are never built: inner products between adapters come from small Gram matrices,
<B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T)), and principal angles from orthonormal bases of B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.layout import layer_of
from ..errors import DataError
from ..features import leaf_name

if TYPE_CHECKING:
    from ..scan.facts import Reference

LIMIT = 6.0  # deviations from a median, beyond which an adapter is named
_BAND = 32  # adapters
SHOWN_VALUES = 16  # singular values a module: what tells a spectrum's shape


@dataclass(frozen=True)
class ModuleFacts:
    """One module of one adapter.

    Attributes:
        layer: its number in the model, -1 without one.
        leaf: the last part of its name.
        norm: Frobenius norm of BA with its scaling.
        stable_rank: (Frobenius / spectral norm)², 0 where BA is zero.
        values: the leading singular values, descending, at most 16.
    """

    module: str
    layer: int
    leaf: str
    norm: float
    stable_rank: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Analysis:
    """Everything that a report shows.

    Attributes:
        names: of the n adapters.
        modules: name -> its modules, in the order of the layers.
        cosine: (n, n): between products, over all modules.
        overlap: (n, n): mean over shared modules of the mean squared cosine of the principal angles
            between the column spaces of the products; 1 for the same space, about r / d_out by
            chance.
        coordinates: method -> (n, 2), of three or more adapters.
        outliers: name -> why it is one.
        verdicts: name -> "malicious", "benign" or "inconclusive", where a probe was given.
        scores: name -> P(malicious), likewise.
        behind: how many of the names, at the end, are the reference cohort's.
        usual: what is usual among adapters of the base, of a cohort that is not here itself.
    """

    names: tuple[str, ...]
    modules: Mapping[str, tuple[ModuleFacts, ...]]
    cosine: np.ndarray
    overlap: np.ndarray
    coordinates: Mapping[str, np.ndarray] = field(default_factory=dict)
    outliers: Mapping[str, str] = field(default_factory=dict)
    verdicts: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    behind: int = 0
    usual: Reference | None = None


def analyse(
    adapters: Mapping[str, Adapter],
    *,
    verdicts: Mapping[str, str] | None = None,
    scores: Mapping[str, float] | None = None,
    behind: int = 0,
    usual: Reference | None = None,
    seed: int = 0,
) -> Analysis:
    """Measure adapters.

    Args:
        adapters: name -> adapter, the reference cohort last.
        behind: how many of them are the reference cohort's.
        usual: of a cohort of the same base model, that outliers are told from too.
        seed: of UMAP.

    Raises:
        DataError: there is none.
        NonFiniteError: a factor holds NaN or infinity.
    """
    if not adapters:
        raise DataError("got no adapter; expected at least one path or Hub id")
    names = tuple(adapters)
    modules = {name: _modules(adapter) for name, adapter in adapters.items()}
    inner, overlap = _between(list(adapters.values()))
    lengths = np.sqrt(np.maximum(np.diag(inner), 0.0))
    scale = np.outer(lengths, lengths)
    cosine = np.divide(inner, scale, out=np.zeros_like(inner), where=scale > 0)
    cosine = np.clip(cosine, -1.0, 1.0)
    outliers = _outliers(names, modules, cosine, behind)
    if usual is not None:
        for name in names[: len(names) - behind]:
            if apart := _unusual(adapters[name], usual):
                outliers[name] = "; ".join(filter(None, [outliers.get(name), apart]))
    return Analysis(
        names,
        modules,
        cosine,
        overlap,
        _coordinates(cosine, seed),
        outliers,
        dict(verdicts or {}),
        dict(scores or {}),
        behind,
        usual,
    )


def _unusual(adapter: Adapter, usual: Reference) -> str:
    """What of an adapter is out of line with a cohort of the same base; "" where nothing is."""
    from ..scan.facts import Facts

    if adapter.base_model != usual.base_model:
        return ""
    apart = usual.outliers(Facts.of(adapter), LIMIT)
    return "; ".join(
        f"{what} {value:+.1f} deviations from {usual.size} adapters of the base"
        for what, value in apart.items()
    )


def _modules(adapter: Adapter) -> tuple[ModuleFacts, ...]:
    rows = []
    for module, pair in adapter.items():
        values = np.asarray(pair.svdvals(), dtype=np.float64)
        square = float(np.square(values).sum())
        top = float(values.max(initial=0.0))
        layer = layer_of(module)
        rows.append(
            ModuleFacts(
                module,
                -1 if layer is None else layer,
                leaf_name(module),
                square**0.5,
                square / top**2 if top > 0 else 0.0,
                tuple(values[:SHOWN_VALUES].tolist()),
            )
        )
    return tuple(sorted(rows, key=lambda row: (row.layer, row.module)))


def _between(adapters: Sequence[Adapter]) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of the products (n, n), and mean overlap of their column spaces (n, n)."""
    count = len(adapters)
    inner = np.zeros((count, count))
    overlap = np.zeros((count, count))
    shared = np.zeros((count, count))
    shapes = [{(module, pair.shape) for module, pair in adapter.items()} for adapter in adapters]
    for module, shape in sorted(set().union(*shapes)):  # of another base, it is another module
        owners = [index for index, own in enumerate(shapes) if (module, shape) in own]
        pairs = [adapters[index][module] for index in owners]
        ranks = [pair.rank for pair in pairs]
        factors = [np.asarray(pair.B, np.float32) for pair in pairs]  # read once
        scalings = [pair.scaling for pair in pairs]
        left = np.hstack([b * s for b, s in zip(factors, scalings, strict=True)])
        right = np.vstack([np.asarray(pair.A, np.float32) for pair in pairs])
        bases = np.hstack([_basis(factor) for factor in factors])
        place = np.ix_(owners, owners)
        smaller = np.minimum.outer(ranks, ranks)
        inner[place] += _blocks(ranks, partial(_inner, left, right))
        overlap[place] += _blocks(ranks, partial(_overlap, bases)) / smaller
        shared[place] += 1
    return inner, np.divide(overlap, shared, out=np.zeros_like(overlap), where=shared > 0)


def _basis(matrix: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns, as many as they are; zero columns where they vanish."""
    u, values, _ = np.linalg.svd(np.asarray(matrix, np.float32), full_matrices=False)
    spans = values > 1e-6 * values.max(initial=0.0)
    return np.asarray(u * spans)


def _inner(left: np.ndarray, right: np.ndarray, rows: slice) -> np.ndarray:
    return np.asarray(np.multiply(left[:, rows].T @ left, right[rows] @ right.T))


def _overlap(bases: np.ndarray, rows: slice) -> np.ndarray:
    return np.asarray(np.square(bases[:, rows].T @ bases))


def _blocks(ranks: Sequence[int], rows_of: Callable[[slice], np.ndarray]) -> np.ndarray:
    """Sums over the blocks of a matrix whose rows and columns are grouped alike: (n, n).

    Of hundreds of adapters the matrix has tens of millions of numbers: it is made in bands.
    """
    ends = np.cumsum(ranks, dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    bands = []
    for first in range(0, len(ranks), _BAND):
        last = min(first + _BAND, len(ranks))
        band = rows_of(slice(int(starts[first]), int(ends[last - 1])))
        sums = np.add.reduceat(band, starts, axis=1, dtype=np.float64)
        bands.append(np.add.reduceat(sums, starts[first:last] - starts[first], axis=0))
    return np.concatenate(bands)


def _coordinates(cosine: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """PCA of the normalised products, from their cosines alone, and UMAP by 1 - cosine."""
    count = len(cosine)
    if count < 3:
        return {}
    centre = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(centre @ cosine @ centre)
    axes = vectors[:, [-1, -2]] * np.sqrt(np.maximum(values[[-1, -2]], 0.0))
    coordinates = {"PCA": axes}
    if count >= 15:
        from ..study.embed import umap_of_distances

        coordinates["UMAP"] = umap_of_distances(1 - cosine, seed)
    return coordinates


def _outliers(
    names: Sequence[str],
    modules: Mapping[str, Sequence[ModuleFacts]],
    cosine: np.ndarray,
    behind: int,
) -> dict[str, str]:
    """Adapters far from the median of all: more than `LIMIT` deviations (1.4826 MAD)."""
    if len(names) < 8:
        return {}
    measures: dict[str, Callable[[int], float]] = {
        "norm": lambda row: math.log(norm_of(modules[names[row]]) + 1e-12),
        "stable rank": lambda row: _mean([facts.stable_rank for facts in modules[names[row]]]),
        "mean cosine to the others": lambda row: _mean(np.delete(cosine[row], row)),
    }
    reasons: dict[str, list[str]] = {}
    for what, measure in measures.items():
        values = np.array([measure(row) for row in range(len(names))], dtype=np.float64)
        apart = values - np.median(values)
        spread = max(1.4826 * float(np.median(np.abs(apart))), 1e-9)
        for row in np.flatnonzero(np.abs(apart) > LIMIT * spread).tolist():
            if row < len(names) - behind:
                text = f"{what} {apart[row] / spread:+.1f} deviations from the median"
                reasons.setdefault(names[row], []).append(text)
    return {name: "; ".join(texts) for name, texts in reasons.items()}


def norm_of(modules: Sequence[ModuleFacts]) -> float:
    """The Frobenius norm of all of their BA as one vector."""
    return math.sqrt(sum(facts.norm**2 for facts in modules))


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values))
