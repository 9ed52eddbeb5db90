"""LoRA adapters as values.

All adapted modules of a model (Adapter), their layout, and their deltas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterFormatError, KindMismatch, LayoutMismatch, NonFiniteError
from .pair import Factor, LazyTensor, LoRAPair, all_finite

Kind = Literal["weights", "factor_delta", "weight_delta"]
KINDS: tuple[str, ...] = get_args(Kind)

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d{1,9})(?:\.|$)")


class LazyPairs(Mapping[str, LoRAPair]):
    """Pairs that are made when they are asked for: a file's header can name hundreds of modules."""

    def __init__(self, modules: Collection[str], make: Callable[[str], LoRAPair]) -> None:
        self._made: dict[str, LoRAPair | None] = dict.fromkeys(sorted(modules))
        self._make = make

    def __getitem__(self, module: str) -> LoRAPair:
        pair = self._made[module]
        if pair is None:
            pair = self._made[module] = self._make(module)
        return pair

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __contains__(self, module: object) -> bool:
        return module in self._made


class Adapter(Mapping[str, LoRAPair]):
    """Module path -> LoRAPair, in sorted order; immutable.

    Args:
        pairs: the adapted modules, named as in the base model ("model.layers.0.self_attn.q_proj").
        kind: "weights" as trained, "factor_delta" (A_t - A_0, B_t - B_0) or "weight_delta"
            (the factors of s (B_t A_t - B_0 A_0)). See `factor_delta` and `weight_delta`.
        base_model: the Hub id or path of the base model, if it is known.
        ignored: what the file held that does not change the adapter and was left out.
        commit: the Hub commit it was loaded from, if it came from there; a delta has none.

    Raises:
        AdapterFormatError: there is no pair at all, or the kind is unknown.
    """

    __slots__ = ("_pairs", "base_model", "commit", "ignored", "kind")

    def __init__(
        self,
        pairs: Mapping[str, LoRAPair],
        *,
        kind: Kind = "weights",
        base_model: str | None = None,
        ignored: tuple[str, ...] = (),
        commit: str | None = None,
    ) -> None:
        if not pairs:
            raise AdapterFormatError(
                "got an adapter without a single LoRA module; expected at least one lora_A / lora_B"
                " pair"
            )
        if kind not in KINDS:
            raise AdapterFormatError(f"got kind {kind!r}; expected one of {', '.join(KINDS)}")
        self._pairs = (
            pairs
            if isinstance(pairs, LazyPairs)
            else {module: pairs[module] for module in sorted(pairs)}
        )
        self.kind: Kind = kind
        self.base_model = base_model
        self.ignored = ignored
        self.commit = commit

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        alpha: float,
        use_rslora: bool = False,
        alpha_pattern: Mapping[str, float] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        base_model: str | None = None,
        kind: Kind = "weights",
    ) -> Adapter:
        """Read PEFT key names; `peft.get_peft_model_state_dict(model)` works as it is.

        Raises:
            AdapterFormatError: a factor is missing, mis-shaped or not floating point, or the rank
                is not the one rank_pattern names.
            UnsupportedAdapterError: a key belongs to something other than plain LoRA.
        """
        from .peft_io import Scalings, pairs_from_tensors

        scalings = Scalings(
            alpha=alpha,
            use_rslora=use_rslora,
            alpha_pattern=alpha_pattern or {},
            rank_pattern=rank_pattern or {},
        )
        pairs, ignored = pairs_from_tensors(state_dict, scalings)
        return cls(dict(pairs), kind=kind, base_model=base_model, ignored=ignored)

    def state_dict(self) -> dict[str, Tensor]:
        """PEFT key names -> tensors: what `from_state_dict` and PEFT itself read."""
        tensors = {}
        for module, pair in self._pairs.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = pair.A.contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = pair.B.contiguous()
        return tensors

    def load(self) -> Adapter:
        """The same adapter with every tensor read into memory."""
        pairs = {
            module: LoRAPair(pair.A, pair.B, pair.scaling) for module, pair in self._pairs.items()
        }
        return Adapter(
            pairs,
            kind=self.kind,
            base_model=self.base_model,
            ignored=self.ignored,
            commit=self.commit,
        )

    def _replace(self, pairs: Mapping[str, LoRAPair], kind: Kind | None = None) -> Adapter:
        return Adapter(
            pairs, kind=kind or self.kind, base_model=self.base_model, ignored=self.ignored
        )

    def __getitem__(self, module: str) -> LoRAPair:
        return self._pairs[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, module: object) -> bool:
        return module in self._pairs

    __eq__ = object.__eq__  # a Mapping would compare tensors element by element
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        ranks = sorted({pair.rank for pair in self._pairs.values()})
        return (
            f"Adapter({len(self)} modules, kind={self.kind!r}, ranks={ranks},"
            f" base_model={self.base_model!r})"
        )


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
        """The layout of an adapter's factors, all modules unless some are named."""
        chosen = [module for module in adapter if modules is None or module in modules]
        slots = tuple(
            Slot(module, factor, adapter[module].shape_of(factor))
            for module in chosen
            for factor in factors
        )
        return cls(slots, {module: adapter[module].scaling for module in chosen}, adapter.kind)

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
                raise LayoutMismatch(
                    f"{slot.module}: got {slot.factor} of shape {shape}; expected {slot.shape}."
                    " Another base model or another LoRA rank: use a probe or base made for this"
                    " one."
                )
        for module, scaling in self.scalings.items():
            if abs(adapter[module].scaling - scaling) > 1e-6 * abs(scaling):
                raise LayoutMismatch(
                    f"{module}: got scaling {adapter[module].scaling:g} (alpha / r); expected"
                    f" {scaling:g}"
                )


def pack(adapter: Adapter, layout: Layout | None = None) -> tuple[Tensor, Layout]:
    """Flatten an adapter's factors into one vector: ((d,) float32, its layout).

    Raises:
        KindMismatch, LayoutMismatch: the adapter does not fit the given layout.
        NonFiniteError: a factor holds NaN or infinity.
    """
    if layout is None:
        layout = Layout.of(adapter)
    else:
        layout.check(adapter)
    return flattened(adapter, layout.slots), layout


def unpack(vector: Tensor, layout: Layout, *, base_model: str | None = None) -> Adapter:
    """The inverse of `pack`: a vector (d,) back into an adapter; the tensors are views of it.

    Raises:
        LayoutMismatch: the vector has another length, or the layout lacks one factor of a module.
    """
    if vector.shape != (layout.size,):
        raise LayoutMismatch(
            f"got a vector of shape {tuple(vector.shape)}; expected ({layout.size},) as in the"
            " layout"
        )
    factors: dict[str, dict[str, Tensor]] = {}
    for slot, part in zip(
        layout.slots, torch.split(vector, [slot.size for slot in layout.slots]), strict=True
    ):
        factors.setdefault(slot.module, {})[slot.factor] = part.view(slot.shape)
    halves = [module for module, found in factors.items() if set(found) != {"A", "B"}]
    if halves:
        raise LayoutMismatch(
            f"the layout holds only one factor of {halves[0]!r}; an adapter needs A and B of every"
            " module"
        )
    pairs = {
        module: LoRAPair(found["A"], found["B"], layout.scalings[module])
        for module, found in factors.items()
    }
    return Adapter(pairs, kind=layout.kind, base_model=base_model)


def factor_delta(after: Adapter, before: Adapter | None) -> Adapter:
    """The change of each factor, (A_t - A_0, B_t - B_0); not the factors of the weight change.

    With ``before=None`` training is taken to have started from the standard initialisation B_0 = 0,
    so that the change of B is B itself; A_0 is then unknown and reading an A raises KindMismatch.

    Raises:
        KindMismatch: one of them is a delta already.
        LayoutMismatch: modules, shapes, ranks or scalings differ.

    Source: arXiv:2601.07177, Sec. 3.
    """
    _expect_weights(after, before)
    if before is None:
        return after._replace(
            LazyPairs(after, lambda module: _since_zero(module, after[module])), "factor_delta"
        )
    _same_modules(after, before)
    Layout.of(before).check(after)
    return after._replace(
        {
            module: LoRAPair(
                _minus(pair, before[module], "A"), _minus(pair, before[module], "B"), pair.scaling
            )
            for module, pair in after.items()
        },
        "factor_delta",
    )


def weight_delta(after: Adapter, before: Adapter) -> Adapter:
    """The exact change of every adapted weight, s_t B_t A_t - s_0 B_0 A_0, in factored form.

    It is [s_t B_t, -s_0 B_0] @ [A_t; A_0], of rank at most r_t + r_0; the ranks may differ. The
    product of factor deltas is something else altogether.

    Raises:
        KindMismatch: one of them is a delta already.
        LayoutMismatch: modules or weight shapes differ.
    """
    _expect_weights(after, before)
    _same_modules(after, before)
    pairs = {}
    for module, new in after.items():
        old = before[module]
        if new.shape != old.shape:
            raise LayoutMismatch(
                f"{module}: got a weight of shape {new.shape}; expected {old.shape} as before. Use"
                " adapters of one base model."
            )
        pairs[module] = LoRAPair(_stacked(new, old, "A"), _stacked(new, old, "B"), new.scaling)
    return after._replace(pairs, "weight_delta")


def add_delta(before: Adapter, delta: Adapter) -> Adapter:
    """The inverse of `factor_delta`: before's factors plus their change, of kind "weights".

    Raises:
        KindMismatch: before is not of kind "weights", or delta not a factor delta.
        LayoutMismatch: modules, shapes or scalings differ.
    """
    _expect_weights(before)
    _same_modules(delta, before)
    layout = Layout.of(before)
    Layout(layout.slots, layout.scalings, "factor_delta").check(delta)
    return before._replace(
        {
            module: LoRAPair(pair.A + delta[module].A, pair.B + delta[module].B, pair.scaling)
            for module, pair in before.items()
        }
    )


def layer_of(module: str) -> int | None:
    """The index of the transformer layer a module belongs to, None if it is in none.

    >>> layer_of("model.layers.12.self_attn.q_proj"), layer_of("lm_head")
    (12, None)
    """
    found = _LAYER.search(module)
    return int(found.group(1)) if found else None


def flattened(adapter: Adapter, slots: Sequence[Slot]) -> Tensor:
    """The factors that slots name, flattened and concatenated in that order: (d,) float32.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.
    """
    parts = [adapter[slot.module].factor(slot.factor).reshape(-1).numpy() for slot in slots]
    vector = torch.from_numpy(np.concatenate(parts)).float()
    if not all_finite(vector):
        for slot in slots:
            finite(adapter, slot.module, slot.factor)  # raises, and says where
    return vector


def finite(adapter: Adapter, module: str, factor: Factor) -> Tensor:
    """One factor, read and checked.

    Raises:
        NonFiniteError: it holds NaN or infinity, or a number that is infinite in float32.
    """
    tensor = adapter[module].factor(factor)
    good = torch.isfinite(tensor.float())
    if not good.all():
        raise NonFiniteError(
            f"{module}, lora_{factor}: {int((~good).sum())} of {tensor.numel()} values are NaN or"
            " infinite; expected finite float32 numbers. Training diverged or the file is damaged:"
            " do not use this adapter."
        )
    return tensor


def _minus(after: LoRAPair, before: LoRAPair, factor: Factor) -> LazyTensor:
    return LazyTensor(after.shape_of(factor), lambda: after.factor(factor) - before.factor(factor))


def _stacked(after: LoRAPair, before: LoRAPair, factor: Factor) -> LazyTensor:
    rank = after.rank + before.rank
    if factor == "A":
        return LazyTensor((rank, after.shape[1]), lambda: torch.cat([after.A, before.A]))
    ratio = before.scaling / after.scaling
    return LazyTensor(
        (after.shape[0], rank), lambda: torch.cat([after.B, -ratio * before.B], dim=1)
    )


def _since_zero(module: str, pair: LoRAPair) -> LoRAPair:
    """The factor delta of a pair that started from B = 0 and an A that nobody knows."""

    def refuse() -> Tensor:
        raise KindMismatch(
            f"{module}: the delta of lora_A needs the adapter that training started from, and none"
            " was given. Use factor_delta(after, before), or a probe that reads lora_B only."
        )

    return LoRAPair(LazyTensor(pair.shape_of("A"), refuse), pair.lazy("B"), pair.scaling)


def _expect_weights(*adapters: Adapter | None) -> None:
    for adapter in adapters:
        if adapter is not None and adapter.kind != "weights":
            raise KindMismatch(
                f"got an adapter of kind {adapter.kind!r}; a delta is taken of two adapters of kind"
                " 'weights'"
            )


def _same_modules(after: Adapter, before: Adapter) -> None:
    different = sorted(set(after) ^ set(before))
    if different:
        raise LayoutMismatch(
            f"{len(different)} modules are in one adapter only, first {different[0]!r}; expected"
            " the same modules before and after training"
        )


def _kind_advice(expected: str) -> str:
    if expected == "weights":
        return ""
    return f" Take {expected}(after, before) with the adapter that training started from."
