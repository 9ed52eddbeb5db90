"""What can be computed from an adapter, as pure functions: slices, canonical forms, spectra, norms.

The matrices that spectra and norms are taken of depend on the kind of adapter. Weights and weight
deltas have one matrix per module, the product scaling * B @ A. A factor delta has two, the changes
of A and of B: their product is the change of nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..adapters.adapter import Adapter, finite
from ..adapters.layout import Slot, flattened
from ..adapters.pair import Array, Factor, triangular_factors
from ..errors import KindMismatch, NonFiniteError

Matrix = tuple[str, str]  # (module, "A" | "B" | "BA")
NORMS = ("log_frobenius", "log_spectral", "log_nuclear", "stable_rank", "effective_rank")
_LARGEST = {kind: float(np.finfo(kind).max) for kind in "fd"}
_TINY = 1e-12  # below this a norm counts as zero (arXiv:2601.07177, official code)


def slices(adapter: Adapter, slots: Sequence[Slot]) -> Array:
    """The factors named by slots, flattened and concatenated in that order: (p,) float32.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.

    Source: arXiv:2601.07177, Sec. 3 (there: the B factors of the first layer).
    """
    return flattened(adapter, slots)


def canonical(adapter: Adapter, slots: Sequence[Slot]) -> Array:
    """Like `slices`, of the factors in their canonical gauge (`LoRAPair.canonical`).

    Two adapters with the same product B @ A have the same canonical factors, however they were
    factorised (for distinct singular values).

    Raises:
        KindMismatch: a factor delta has no product that a gauge could leave unchanged.
        NonFiniteError: a factor holds NaN or infinity.
    """
    if adapter.kind == "factor_delta":
        raise KindMismatch(
            "got an adapter of kind 'factor_delta'; the canonical form is one of a product B @ A:"
            " use weight_delta(after, before)"
        )
    gauged = {}
    for module in dict.fromkeys(slot.module for slot in slots):
        finite(adapter, module, "A"), finite(adapter, module, "B")
        gauged[module] = adapter[module].canonical()
    return np.concatenate(
        [_padded(gauged[slot.module].factor(slot.factor), slot.shape).reshape(-1) for slot in slots]
    )


def spectra(
    adapter: Adapter, modules: Sequence[str], factors: Sequence[Factor]
) -> dict[Matrix, Array]:
    """Singular values of every matrix of the modules, descending: (min(r, ...),) float64 each.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.
    """
    read = [
        (module, factor)
        for module in modules
        for factor in (factors if adapter.kind == "factor_delta" else ("B", "A"))
    ]
    matrices = [
        adapter[module].factor(factor) if factor == "B" else adapter[module].factor(factor).T
        for module, factor in read
    ]
    try:
        triangular = triangular_factors(matrices)
    except NonFiniteError:
        for module, factor in read:
            finite(adapter, module, factor)  # raises, and says where
        raise
    if adapter.kind == "factor_delta":
        return _batched_svdvals(dict(zip(read, triangular, strict=True)))
    pairs = zip(modules, triangular[::2], triangular[1::2], strict=True)
    return _batched_svdvals(
        {(module, "BA"): adapter[module].scaling * right @ left.T for module, right, left in pairs}
    )


def norms(values: Array) -> Array:
    """`NORMS` of a matrix with these singular values: (5,) float64.

    Natural logarithms of the Frobenius, spectral and nuclear norm (floored at 1e-12); stable rank
    ||M||_F^2 / ||M||_2^2; effective rank exp(entropy of s / sum s) (Roy & Vetterli, EUSIPCO 2007).
    A zero matrix has stable and effective rank 0.
    """
    frobenius = math.sqrt(np.square(values).sum())
    largest = float(values.max())
    total = float(values.sum())
    ranks = [0.0, 0.0]
    if largest >= _TINY:
        share = values[values > 0] / total
        ranks = [(frobenius / largest) ** 2, math.exp(-(share * np.log(share)).sum())]
    logs = [math.log(max(size, _TINY)) for size in (frobenius, largest, total)]
    return np.array([*logs, *ranks])


def pooled(rows: dict[Matrix, Array]) -> Array:
    """Mean and standard deviation over layers, per module name and matrix: independent of depth.

    Args:
        rows: (module, matrix) -> (k,), of one k.

    Returns:
        (names * matrices * 2 * k,), ordered by module name ("q_proj"), matrix, mean before
        deviation.
    """
    groups: dict[Matrix, list[Array]] = {}
    for (module, matrix), row in rows.items():
        groups.setdefault((leaf_name(module), matrix), []).append(row)
    parts = []
    for key in sorted(groups):
        stacked = np.stack(groups[key])
        parts += [stacked.mean(axis=0), stacked.std(axis=0)]
    return np.concatenate(parts)


def l2_normalised(vector: Array) -> Array:
    """The vector divided by its L2 norm; one with a norm below 1e-12 is left as it is.

    Source: arXiv:2601.07177, official code.
    """
    return unit_vector(vector)[0]


def unit_vector(numbers: Array) -> tuple[Array, float]:
    """What `l2_normalised` returns, (p,) of the same type, and the norm it was divided by.

    Of float32 numbers, whose squares neither overflow nor vanish in float64, the norm is finite if
    and only if all of them are, and zero if and only if all of them are.
    """
    length = math.sqrt(np.einsum("p,p->", numbers, numbers, dtype=np.float64))
    if length < _TINY or not math.isfinite(length):
        return numbers, length
    if length > _LARGEST[numbers.dtype.char]:
        # As float32 it is infinite, every quotient zero: the vector of an adapter without a change.
        return (numbers / np.float64(length)).astype(numbers.dtype), length
    return numbers / numbers.dtype.type(length), length


def leaf_name(module: str) -> str:
    """The last part of a module path.

    >>> leaf_name("model.layers.0.self_attn.q_proj")
    'q_proj'
    """
    return module.rpartition(".")[2]


def _padded(matrix: Array, shape: tuple[int, int]) -> Array:
    """With zero rows or columns behind: a product thinner than its rank has fewer components."""
    rows, columns = matrix.shape
    return np.pad(matrix, ((0, shape[0] - rows), (0, shape[1] - columns)))


def _batched_svdvals(cores: dict[Matrix, Array]) -> dict[Matrix, Array]:
    """One call per shape instead of one per matrix: the r x r problems are tiny."""
    by_shape: dict[tuple[int, ...], list[Matrix]] = {}
    for key, core in cores.items():
        by_shape.setdefault(tuple(core.shape), []).append(key)
    values: dict[Matrix, Array] = {}
    for keys in by_shape.values():
        stacked = np.stack([cores[key] for key in keys])
        values.update(zip(keys, np.linalg.svd(stacked, compute_uv=False), strict=True))
    return {key: values[key] for key in cores}


SLOT_FEATURES: dict[str, Callable[[Adapter, Sequence[Slot]], Array]] = {
    "slices": slices,
    "canonical": canonical,
}
SPECTRAL_FEATURES = ("spectra", "norms")
FEATURES = (*SLOT_FEATURES, *SPECTRAL_FEATURES)
