"""The change between two adapters, of their factors or of the weights they add up to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import BaseModelMismatch, DataError, KindMismatch, LayoutMismatch
from .adapter import Adapter, LazyPairs, Origin, expect_adapter
from .layout import Layout
from .pair import Array, Factor, LazyTensor, LoRAPair


def factor_delta(after: Adapter, before: Adapter | None) -> Adapter:
    """The change of each factor, (A_t - A_0, B_t - B_0); not the factors of the weight change.

    With ``before=None`` training is taken to have started from the standard initialisation B_0 = 0,
    so that the change of B is B itself; A_0 is then unknown and reading an A raises KindMismatch.

    Raises:
        KindMismatch: one of them is a delta already, or there is no `before` and B did not start
            at zero.
        BaseModelMismatch: the two do not fit and name different base models.
        LayoutMismatch: modules, shapes, ranks or scalings differ.

    Source: arXiv:2601.07177, Sec. 3.
    """
    _expect_weights(after, *(() if before is None else (before,)))
    if before is None:
        if not after.zero_start:
            raise KindMismatch(
                "B did not start at zero (init_lora_weights in adapter_config.json), so that B is"
                " not its own change; pass the start: the adapter as it was before training"
            )
        return after.with_pairs(
            LazyPairs(after, lambda module: _since_zero(module, after[module])),
            "factor_delta",
            Origin(after, trained=True),
        )
    try:
        _same_modules(after, before)
        Layout.of(before).check(after)
    except LayoutMismatch:
        _same_base(after, before)
        raise
    return after.with_pairs(
        {
            module: LoRAPair(
                _minus(pair, before[module], "A"), _minus(pair, before[module], "B"), pair.scaling
            )
            for module, pair in after.items()
        },
        "factor_delta",
        Origin(before),
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
    return after.with_pairs(pairs, "weight_delta")


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
    return before.with_pairs(
        {
            module: LoRAPair(pair.A + delta[module].A, pair.B + delta[module].B, pair.scaling)
            for module, pair in before.items()
        }
    )


def _minus(after: LoRAPair, before: LoRAPair, factor: Factor) -> LazyTensor:
    return LazyTensor(after.shape_of(factor), lambda: after.factor(factor) - before.factor(factor))


def _stacked(after: LoRAPair, before: LoRAPair, factor: Factor) -> LazyTensor:
    rank = after.rank + before.rank
    if factor == "A":
        return LazyTensor((rank, after.shape[1]), lambda: np.concatenate([after.A, before.A]))
    ratio = before.scaling / after.scaling
    return LazyTensor(
        (after.shape[0], rank), lambda: np.concatenate([after.B, -ratio * before.B], axis=1)
    )


def _since_zero(module: str, pair: LoRAPair) -> LoRAPair:
    """The factor delta of a pair that started from B = 0 and an A that nobody knows."""

    def refuse() -> Array:
        raise KindMismatch(
            f"{module}: the delta of lora_A needs the adapter that training started from, and none"
            " was given. Give it (factor_delta(after, before); --base), or use a probe that reads"
            " lora_B only."
        )

    return LoRAPair(LazyTensor(pair.shape_of("A"), refuse), pair.lazy("B"), pair.scaling)


def _expect_weights(*adapters: Adapter) -> None:
    for adapter in adapters:
        expect_adapter(adapter)
        if adapter.kind != "weights":
            raise KindMismatch(
                f"got an adapter of kind {adapter.kind!r}; a delta is taken of two adapters of kind"
                " 'weights'"
            )


def _same_base(after: Adapter, before: Adapter) -> None:
    """Of two adapters that do not fit: why, where they say so themselves."""
    names = after.base_model, before.base_model
    if None not in names and names[0] != names[1]:
        raise BaseModelMismatch(
            f"got an adapter of base model {after.base_model!r} and a start of"
            f" {before.base_model!r}; expected two adapters of one base model"
        )


def _same_modules(after: Adapter, before: Adapter) -> None:
    absent = sorted(set(before) - set(after))
    added = sorted(set(after) - set(before))
    if absent and after.selects is not None and all(map(after.selects, absent)):
        raise LayoutMismatch(incomplete(absent))
    if absent or added:
        raise LayoutMismatch(
            f"the adapter lacks {len(absent)} modules of the one that training started from and has"
            f" {len(added)} more, first {(absent or added)[0]!r}; expected the same modules before"
            " and after training"
        )


def check_is_change(adapter: Adapter) -> None:
    """Raise where B A of weights is known not to be the change of the published base model.

    Raises:
        DataError: the initialisation changed the base as well (PiSSA, OLoRA, ...).
    """
    if adapter.kind == "weights" and adapter.moves_base:
        raise DataError(
            "the initialisation took part of the base's weights away (init_lora_weights in"
            " adapter_config.json), so that B @ A is not the change of the published base. Save it"
            " with PEFT's path_initial_model_for_weight_conversion (twice the rank) for a probe of"
            " the recipe invariant; or compare it with the adapter as it was before training"
            " (weight_delta; --base)"
        )


def incomplete(absent: Sequence[str]) -> str:
    """What is said of a file that lacks modules which its configuration selects."""
    return (
        f"adapter_config.json selects {len(absent)} modules that the file does not hold, first"
        f" {absent[0]!r}: it is incomplete. Save it anew"
    )
