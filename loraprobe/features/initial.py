"""Which initial adapter a probe of factors belongs to, and whether an adapter started from it.

After a few steps B is about -G A_0^T (G the gradient of the loss with respect to the weight), so a
probe that reads B or A knows one A_0. Another one, or the same function written with rotated
factors (R A, B R^T), scores as anything. What tells them apart is A itself, which training moves
little: over all read modules, cos(A, A_0) is at least 0.94 for the zoo's adapters, at most
0.3 for random rotations (0.4 of one layer) and about 0 for other initial adapters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..errors import KindMismatch, LayoutMismatch, StartMismatch

ALIGNED = 0.5
"""Least cosine of A and A_0: training that moves A by 1.7 times its own norm still passes."""

_Factors = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class InitialAdapter:
    """A_0 of the modules that a probe reads.

    Attributes:
        factors: module -> (r, d_in) float16.
    """

    factors: Mapping[str, NDArray[np.float16]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InitialAdapter) and same_arrays(self.factors, other.factors)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def learn(cls, adapters: Sequence[Adapter], modules: Collection[str]) -> InitialAdapter | None:
        """The one that all adapters started from; None where they do not say, or differ.

        Of training that started from an adapter which is not known ("fresh"), or whose result
        alone is known, A itself stands for A_0.
        """
        mean: _Factors = {}
        for adapter in adapters:
            start = _starts(adapter, modules)
            if start is None or (mean and not _fits(start, mean)):
                return None
            for module, factor in start.items():
                mean[module] = mean.get(module, np.zeros_like(factor)) + factor / len(adapters)
        learnt = {module: factor.astype(np.float16) for module, factor in mean.items()}
        wide = {module: factor.astype(np.float64) for module, factor in learnt.items()}
        for adapter in adapters:
            start = _starts(adapter, modules)
            if start is None or not _fits(start, wide) or _cosine(start, wide) < ALIGNED:
                return None
        return cls(learnt)

    def check(self, adapter: Adapter) -> bool:
        """Whether the adapter is known to have started here; False where that cannot be told.

        Of a change since an adapter whose B was not zero (a later round of a federation) the
        client's own part of it is checked as well: A must still be close to the A it was given.

        Raises:
            StartMismatch: its A is that of another initial adapter, or of rotated factors.
        """
        modules = self.factors.keys()
        try:
            after, start = _after(adapter, modules), _starts(adapter, modules)
        except (KindMismatch, LayoutMismatch):  # a slice, or the like, that holds no A
            return False
        if after is None or start is None:
            return False
        expected = {module: factor.astype(np.float64) for module, factor in self.factors.items()}
        if _has_been_trained(adapter, modules):
            _expect(after, start, "the adapter that it was trained from")
            return _fits(start, expected) and _cosine(start, expected) >= ALIGNED
        _expect(start, expected, "the initial adapter of the probe's training")
        _expect(after, expected, "the initial adapter of the probe's training")
        return True


def check_own_start(adapter: Adapter) -> None:
    """Raise where the A of a factor delta has turned away from the A that it was taken of.

    No training does that; another adapter's start, or rotated factors, do. A delta that does not
    know what it was taken of cannot be told.

    Raises:
        StartMismatch: it has.
    """
    origin = adapter.origin
    if adapter.kind != "factor_delta" or origin is None or origin.trained:
        return
    modules = adapter.keys()
    try:
        after, start = _after(adapter, modules), _starts(adapter, modules)
    except (KindMismatch, LayoutMismatch):  # a slice, or the like, that holds no A
        return
    if after is not None and start is not None:
        _expect(after, start, "the adapter that it was trained from")


def same_arrays(arrays: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two collections of arrays have the same names and numbers."""
    names = arrays.keys() == others.keys()
    return names and all(np.array_equal(arrays[name], others[name]) for name in arrays)


def _after(adapter: Adapter, modules: Collection[str]) -> _Factors | None:
    """A of the modules after training, where it can be known."""
    origin = adapter.origin
    if adapter.kind == "factor_delta" and origin is None:
        return None
    if origin is not None and origin.trained:
        return _a_of(origin.adapter, modules)
    factors = _a_of(adapter, modules)
    if origin is None:
        return factors
    before = _a_of(origin.adapter, modules)
    return {module: factor + before[module] for module, factor in factors.items()}


def _starts(adapter: Adapter, modules: Collection[str]) -> _Factors | None:
    """A of the modules before training, or what stands for it, where that can be known."""
    origin = adapter.origin
    if origin is None:
        return None if adapter.kind == "factor_delta" else _a_of(adapter, modules)
    return _a_of(origin.adapter, modules)


def _a_of(adapter: Adapter, modules: Collection[str]) -> _Factors:
    return {module: np.asarray(adapter[module].A, np.float64) for module in modules}


def _has_been_trained(adapter: Adapter, modules: Collection[str]) -> bool:
    """Whether the change is one since an adapter whose B is not zero."""
    origin = adapter.origin
    if origin is None or origin.trained:
        return False
    return any(np.asarray(origin.adapter[module].B).any() for module in modules)


def _fits(factors: _Factors, others: _Factors) -> bool:
    return all(factors[module].shape == other.shape for module, other in others.items())


def _cosine(factors: _Factors, others: _Factors) -> float:
    """Of all modules' numbers as one vector; 0 where one of them is zero."""
    product = sum(float(np.vdot(factors[module], other)) for module, other in others.items())
    sizes = [
        math.sqrt(sum(float(np.vdot(part, part)) for part in whole.values()))
        for whole in (factors, others)
    ]
    return product / (sizes[0] * sizes[1]) if all(sizes) else 0.0


def _expect(factors: _Factors, expected: _Factors, what: str) -> None:
    if not _fits(factors, expected):
        raise StartMismatch(
            f"lora_A has other shapes than that of {what}. Use a probe of the recipe invariant."
        )
    cosine = _cosine(factors, expected)
    if not cosine >= ALIGNED:
        raise StartMismatch(
            f"lora_A points elsewhere than that of {what}: got a cosine of {cosine:.2f}; expected"
            f" at least {ALIGNED}. The probe reads factors, which mean something else in another"
            " initial adapter or after a rotation: use a probe of the recipe invariant."
        )
