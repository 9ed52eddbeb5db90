"""The shape contract between adapters, features and aggregation, and adapters as vectors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import KindMismatch, LayoutMismatch, quoted, require
from .adapter import FACTORS, KINDS, Adapter, Kind, expect_adapter, finite
from .pair import Array, Factor, LoRAPair, all_finite, as_array
from .strict_json import is_finite_number

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d{1,9})(?:\.|$)")


@dataclass(frozen=True)
class Slot:
    """One matrix of a layout: which module, which factor, which shape."""

    module: str
    factor: Factor
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Layout:
    """The only shape contract: which matrices, in which order, of which kind of adapter.

    Attributes:
        slots: the matrices, in the order in which they are packed.
        scalings: module -> scaling, for every module of the slots.
        kind: the kind of the adapters it was taken from.
    """

    slots: tuple[Slot, ...]
    scalings: Mapping[str, float]
    kind: Kind

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        modules: Collection[str] | None = None,
        factors: tuple[Factor, ...] = ("A", "B"),
    ) -> Layout:
        """The layout of an adapter's factors, all modules unless some are named.

        Raises:
            AdapterFormatError: it is no adapter.
            LayoutMismatch: the adapter lacks a named module, no module is named, one text stands
                for the names, or a factor is none or named twice.
        """
        expect_adapter(adapter)
        known = set(adapter)
        chosen = known if modules is None else set(() if isinstance(modules, str) else modules)
        if not chosen or not chosen <= known:
            lacking = modules if isinstance(modules, str) else sorted(map(str, chosen - known))
            raise LayoutMismatch(
                f"modules: got {quoted(lacking)}; expected names of the adapter's modules, such as"
                f" {quoted([next(iter(adapter), '')])}"
            )
        if not factors or not set(factors) <= set(FACTORS) or len(set(factors)) != len(factors):
            raise LayoutMismatch(f"factors: got {quoted(factors)}; expected 'A', 'B' or both")
        names = [module for module in adapter if module in chosen]
        slots = tuple(
            Slot(module, factor, adapter[module].shape_of(factor))
            for module in names
            for factor in factors
        )
        return cls(slots, {module: adapter[module].scaling for module in names}, adapter.kind)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what `from_dict` reads."""
        return {
            "kind": self.kind,
            "slots": [[slot.module, slot.factor, list(slot.shape)] for slot in self.slots],
            "scalings": dict(self.scalings),
        }

    @classmethod
    def from_dict(cls, values: Any) -> Layout:
        """The inverse of `to_dict`; the values may be a stranger's.

        Raises:
            LayoutMismatch: a field is missing, unknown or of another form.
        """
        fields = {"kind", "slots", "scalings"}
        if not isinstance(values, dict) or set(values) != fields:
            shown = sorted(map(str, values)) if isinstance(values, dict) else values
            raise LayoutMismatch(f"layout: got {quoted(shown)}; expected {sorted(fields)}")
        if values["kind"] not in KINDS:
            raise LayoutMismatch(
                f"layout: got kind {quoted(values['kind'])}; expected one of {', '.join(KINDS)}"
            )
        scalings = values["scalings"]
        if not isinstance(scalings, dict) or not all(map(is_finite_number, scalings.values())):
            raise LayoutMismatch(
                f"layout: got scalings {quoted(scalings)}; expected a finite number a module"
            )
        rows = values["slots"]
        if not isinstance(rows, list) or not rows:
            raise LayoutMismatch(f"layout: got slots {quoted(rows)}; expected at least one matrix")
        plain = {module: float(scaling) for module, scaling in scalings.items()}
        return cls(tuple(_slot(row) for row in rows), plain, values["kind"])

    @property
    def size(self) -> int:
        """How many numbers a packed adapter has."""
        return sum(slot.size for slot in self.slots)

    def check(self, adapter: Adapter) -> None:
        """Raise unless the adapter has every matrix of this layout, in its shape, kind and scaling.

        Raises:
            KindMismatch: weights where a delta is expected, or another kind of delta.
            LayoutMismatch: a module is missing, or a shape or scaling differs.
        """
        expect_adapter(adapter)
        if adapter.kind != self.kind:
            raise KindMismatch(
                f"got an adapter of kind {adapter.kind!r}; expected"
                f" {self.kind!r}.{_kind_advice(self.kind)}"
            )
        missing = [module for module in self.scalings if module not in adapter]
        if missing:
            raise LayoutMismatch(
                f"the adapter lacks {len(missing)} of {len(self.scalings)} modules, first"
                f" {missing[0]!r}; it has {len(adapter)}, first {next(iter(adapter))!r}. Use an"
                " adapter of the same base model and target modules."
            )
        for slot in self.slots:
            shape = adapter[slot.module].shape_of(slot.factor)
            if shape != slot.shape:
                wide = 1 if slot.factor == "A" else 0  # the axis that the base model gives
                advice = (
                    "Another base model: use a probe or base made for this one."
                    if shape[wide] != slot.shape[wide]
                    else "Another LoRA rank: a probe of the recipe invariant scores any."
                )
                raise LayoutMismatch(
                    f"{slot.module}: got {slot.factor} of shape {shape}; expected {slot.shape}."
                    f" {advice}"
                )
        for module, scaling in self.scalings.items():
            if abs(adapter[module].scaling - scaling) > 1e-6 * abs(scaling):
                raise LayoutMismatch(
                    f"{module}: got scaling {adapter[module].scaling:g} (alpha / r); expected"
                    f" {scaling:g}"
                )


def pack(adapter: Adapter, layout: Layout | None = None) -> tuple[Tensor, Layout]:
    """Flatten an adapter's factors into one vector: (a torch tensor (d,) float32, its layout).

    Raises:
        KindMismatch, LayoutMismatch: the adapter does not fit the given layout.
        NonFiniteError: a factor holds NaN or infinity.
    """
    if layout is None:
        layout = Layout.of(adapter)
    else:
        layout.check(adapter)
    require("torch", "fed", "A packed vector")
    import torch

    return torch.from_numpy(flattened(adapter, layout.slots)), layout


def unpack(vector: Tensor | Array, layout: Layout, *, base_model: str | None = None) -> Adapter:
    """The inverse of `pack`: a vector (d,) back into an adapter, whose factors are views of it.

    Raises:
        LayoutMismatch: the vector has another length, or the layout lacks one factor of a module.
    """
    if tuple(vector.shape) != (layout.size,):
        raise LayoutMismatch(
            f"got a vector of shape {tuple(vector.shape)}; expected ({layout.size},) as in the"
            " layout"
        )
    factors: dict[str, dict[str, Array]] = {}
    for slot, matrix in split(as_array(vector), layout.slots):
        factors.setdefault(slot.module, {})[slot.factor] = matrix
    halves = [module for module, by_factor in factors.items() if set(by_factor) != {"A", "B"}]
    if halves:
        raise LayoutMismatch(
            f"the layout holds only one factor of {halves[0]!r}; an adapter needs A and B of every"
            " module"
        )
    pairs = {
        module: LoRAPair(by_factor["A"], by_factor["B"], layout.scalings[module])
        for module, by_factor in factors.items()
    }
    return Adapter(pairs, kind=layout.kind, base_model=base_model)


def split(vector: Array, slots: Sequence[Slot]) -> Iterator[tuple[Slot, Array]]:
    """The matrices of a packed vector (d,), as views of it."""
    start = 0
    for slot in slots:
        yield slot, vector[start : start + slot.size].reshape(slot.shape)
        start += slot.size


def layer_of(module: str) -> int | None:
    """The index of the transformer layer a module belongs to, None if it is in none.

    >>> layer_of("model.layers.12.self_attn.q_proj"), layer_of("lm_head")
    (12, None)
    """
    match = _LAYER.search(module)
    return int(match.group(1)) if match else None


def flattened(adapter: Adapter, slots: Sequence[Slot]) -> Array:
    """The factors that slots name, flattened and concatenated in that order: (d,) float32.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.
    """
    parts = [adapter[slot.module].factor(slot.factor).reshape(-1) for slot in slots]
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which is refused
        vector = np.concatenate(parts).astype(np.float32, copy=False)
    if not all_finite(vector):
        for slot in slots:
            finite(adapter, slot.module, slot.factor)  # raises, and says where
    return vector


def _slot(row: Any) -> Slot:
    match row:
        case [str(module), "A" | "B" as factor, [rows, columns]] if all(
            type(size) is int and 0 < size < 2**31 for size in (rows, columns)
        ):
            return Slot(module, factor, (rows, columns))
    raise LayoutMismatch(
        f"layout: got the slot {quoted(row)}; expected [module, 'A' or 'B', [rows, columns]]"
    )


def _kind_advice(expected: str) -> str:
    if expected == "weights":
        return ""
    return f" Take {expected}(after, before) with the adapter that training started from."
