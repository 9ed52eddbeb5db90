"""An adapter, or just the tensors of it that a probe reads, as the bytes of one safetensors file.

Tensors have PEFT's names. One entry of the metadata, "loraprobe", says what PEFT leaves to
adapter_config.json, as JSON: the kind of adapter, the scaling of every module and, if known, the
base model. A *slice* holds only what one probe reads: for the paper's recipe B of the first layer's
q_proj and v_proj, 160 KB of an adapter of 13.6 MB (Llama-3.1-8B, r = 8). It scores as the whole
adapter does, bit for bit.

What a slice cannot show is the rest of the adapter. A Featurizer refuses an adapter that changes
modules which the training adapters did not, because they would go unscored; of a slice only its
sender knows (`save_slice` looks). Where the sender is not trusted with that, score the whole
adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import safetensors.numpy

from ..adapters.adapter import KINDS, Adapter, Kind, finite
from ..adapters.config import Scalings
from ..adapters.pair import Array, Factor, LazyTensor, LoRAPair, all_finite
from ..adapters.peft import pairs_from_tensors
from ..adapters.safetensors import TensorFile, read_safetensors
from ..adapters.strict_json import is_finite_number, read_json
from ..errors import (
    AdapterFormatError,
    BaseModelMismatch,
    KindMismatch,
    LayoutMismatch,
    RecipeError,
    quoted,
)
from ..featurizer import Featurizer

SLICE, WHOLE = "slice", "adapter"
VERSION = 1
"""Goes up by one whenever a file written by the new code would be misread, or not be read, by the
old code.
"""

_ENTRY = "loraprobe"
_MAX_REMEMBERED = 1 << 14
_FIELDS = {"format", "version", "kind", "scalings", "base_model"}


def save_slice(featurizer: Featurizer, adapter: Adapter) -> bytes:
    """The tensors of an adapter that `featurizer` reads, as a safetensors file.

    Raises:
        KindMismatch, LayoutMismatch: the adapter does not fit the featurizer.
        RecipeError: see `slice_factors`.
    """
    factors = slice_factors(featurizer)
    featurizer.check(adapter)
    return encode(
        adapter,
        [(module, factor) for module in featurizer.layout.scalings for factor in factors],
        SLICE,
    )


def save_whole(adapter: Adapter) -> bytes:
    """An adapter of any kind as a file that `read_whole` reads without being told anything.

    Raises:
        KindMismatch: a factor delta since "fresh", of which nobody knows the change of A.
    """
    return encode(adapter, [(module, factor) for module in adapter for factor in ("A", "B")], WHOLE)


def slice_factors(featurizer: Featurizer) -> tuple[Factor, ...]:
    """Which factors of the modules in `featurizer.layout` a probe reads.

    The change of each factor by itself, or both for their product.

    Raises:
        RecipeError: the recipe reads every layer of whatever adapter it is given, so that a part of
            an adapter could not be told from a smaller one.
    """
    recipe, kind = featurizer.recipe, featurizer.layout.kind
    if recipe.any_modules:
        raise RecipeError(
            "got a recipe that reads whatever modules an adapter has: there is no slice of it. Send"
            " the whole adapter"
        )
    if kind == "factor_delta":
        return recipe.factors
    # Whether a weight delta is zero can only be seen of the product (see Probe.verdicts).
    return (
        ("A", "B")
        if kind == "weight_delta" or set(recipe.features) != {"slices"}
        else recipe.factors
    )


def tensor_name(module: str, factor: Factor) -> str:
    """PEFT's name of one factor."""
    return f"base_model.model.{module}.lora_{factor}.weight"


def encode(adapter: Adapter, factors: Iterable[tuple[str, Factor]], form: str) -> bytes:
    """Some factors of an adapter and what is to be known of it; `form` is SLICE or WHOLE."""
    tensors = {}
    scalings = {}
    for module, factor in factors:
        array = adapter[module].factor(factor)
        tensors[tensor_name(module, factor)] = np.ascontiguousarray(array)
        scalings[module] = adapter[module].scaling
    statement = {
        "format": form,
        "version": VERSION,
        "kind": adapter.kind,
        "scalings": scalings,
        "base_model": adapter.base_model,
    }
    data: bytes = safetensors.numpy.save(tensors, {_ENTRY: json.dumps(statement)})
    return data


@dataclass(frozen=True)
class Stated:
    """What a file says of the adapter in it."""

    form: str
    kind: Kind
    scalings: Mapping[str, float]
    base_model: str | None


def stated(file: TensorFile) -> Stated | None:
    """What a file says of itself; None for one that this library did not write.

    Raises:
        AdapterFormatError: it is of another version, or says something that is not valid.
    """
    text = file.metadata.get(_ENTRY)
    if text is None:
        return None
    return _stated_before(text) if len(text) <= _MAX_REMEMBERED else _stated(text)


def _stated(text: str) -> Stated:
    try:
        statement = read_json(text.encode())
    except ValueError as error:
        raise AdapterFormatError(
            f"got metadata that are not readable JSON: {quoted(str(error), 200)}"
        ) from None
    match statement:
        case {
            "format": "slice" | "adapter" as form,
            "version": 1,
            "kind": str(kind),
            "scalings": dict(scalings),
            "base_model": str() | None as base,
        }:
            if (
                set(statement) == _FIELDS
                and type(statement["version"]) is int
                and kind in KINDS
                and all(map(is_finite_number, scalings.values()))
                and 0 not in scalings.values()
            ):
                return Stated(
                    form,
                    cast(Kind, kind),
                    MappingProxyType({module: float(value) for module, value in scalings.items()}),
                    base,
                )
    raise AdapterFormatError(
        f"got metadata {quoted(str(statement), 300)}; expected {', '.join(sorted(_FIELDS))}: format"
        f" {SLICE!r} or {WHOLE!r}, version {VERSION}, one of the kinds {', '.join(KINDS)}, and a"
        " finite scaling other than 0 of every module"
    )


_stated_before = lru_cache(maxsize=64)(_stated)  # slices for one probe mostly say the same


def read_slice(data: bytes | TensorFile, featurizer: Featurizer) -> Adapter:
    """The inverse of `save_slice`: an adapter of which nothing but the slice can be read.

    Names must be exactly those that `featurizer` reads, none missing and none more; shapes,
    scalings and kind those of its layout; numbers finite. The base model is for the probe to
    compare.

    Raises:
        AdapterFormatError: not a slice of this version, or its metadata or types are not valid.
        LayoutMismatch, KindMismatch: it is not the slice that this featurizer reads.
        NonFiniteError: it holds NaN or infinity.
        RecipeError: see `slice_factors`.
    """
    file = read_safetensors(data) if isinstance(data, bytes) else data
    statement = stated(file)
    factors = slice_factors(featurizer)
    if statement is None or statement.form != SLICE:
        raise AdapterFormatError(
            "got a safetensors file that does not say it is a slice; expected one of save_slice"
        )
    modules = featurizer.layout.scalings
    expected = {tensor_name(module, factor) for module in modules for factor in factors}
    _same_names("tensors", file.tensors.keys(), expected, "exactly what the probe reads")
    _same_names(
        "scalings",
        statement.scalings.keys(),
        modules.keys(),
        "one of every module that the probe reads",
    )
    halves = {
        module: {
            factor: _float_matrix(file.tensors, tensor_name(module, factor)) for factor in factors
        }
        for module in modules
    }
    pairs = {
        module: _pair(module, factors_of, statement.scalings[module])
        for module, factors_of in halves.items()
    }
    adapter = Adapter(pairs, kind=statement.kind, base_model=statement.base_model)
    featurizer.check(adapter)
    for module in modules:
        for factor in factors:
            if not all_finite(adapter[module].factor(factor)):
                finite(adapter, module, factor)  # raises, and says what it found
    return adapter


def read_whole(
    data: bytes | TensorFile,
    kind: Kind,
    *,
    alpha: float | None = None,
    base_model: str | None = None,
) -> Adapter:
    """A whole adapter from what `save_whole` or PEFT wrote.

    Args:
        kind: what the adapter is said to be; the file must say the same, if it does.
        alpha: PEFT's lora_alpha, for a file of PEFT's, which does not hold it.
        base_model: the base model, likewise.

    Raises:
        AdapterFormatError, UnsupportedAdapterError: as `load_adapter`; alpha is missing, or given
            although the file says it.
        KindMismatch, BaseModelMismatch: the file says something else.
    """
    file = read_safetensors(data) if isinstance(data, bytes) else data
    statement = stated(file)
    if statement is None:
        if alpha is None:
            raise AdapterFormatError(
                "the file does not say how B @ A is scaled: pass alpha (lora_alpha in PEFT's"
                " adapter_config.json)"
            )
        pairs, ignored = pairs_from_tensors(file.tensors, Scalings(alpha))
        whole = Adapter(pairs, kind=kind, base_model=base_model, ignored=ignored)
        whole.check_finite()  # also of what no probe reads
        return whole
    if statement.form != WHOLE:
        raise AdapterFormatError("got a slice; expected a whole adapter")
    if statement.kind != kind:
        raise KindMismatch(
            f"got an adapter that says it is of kind {statement.kind!r}; expected {kind!r}, as was"
            " said beside it"
        )
    if alpha is not None:
        raise AdapterFormatError(
            f"got alpha {alpha:g} for a file that holds the scaling of every module; leave"
            " alpha out"
        )
    if base_model not in (None, statement.base_model):
        raise BaseModelMismatch(
            "got an adapter that says it is of base model"
            f" {quoted(repr(statement.base_model), 200)}; expected {base_model!r}, as was said"
            " beside it"
        )
    pairs, ignored = pairs_from_tensors(file.tensors, Scalings(1.0))
    _same_names("scalings", statement.scalings.keys(), pairs.keys(), "one of every module")
    scaled = {
        module: LoRAPair(pair.lazy("A"), pair.lazy("B"), statement.scalings[module])
        for module, pair in pairs.items()
    }
    whole = Adapter(scaled, kind=kind, base_model=statement.base_model, ignored=ignored)
    whole.check_finite()
    return whole


def _float_matrix(tensors: Mapping[str, Array], name: str) -> Array:
    tensor = tensors[name]
    if tensor.ndim != 2:
        raise AdapterFormatError(f"{name}: got shape {tensor.shape}; expected a matrix")
    return tensor


def _pair(module: str, halves: Mapping[Factor, Array], scaling: float) -> LoRAPair:
    """A pair of which one factor may be absent.

    Of the right rank, with one row or column that nobody can read.
    """

    def refuse() -> Any:
        raise LayoutMismatch(f"{module}: this factor is not part of the slice")

    a = halves.get("A")
    b = halves.get("B")
    if a is None and b is not None:
        return LoRAPair(LazyTensor((b.shape[1], 1), refuse), b, scaling)
    if b is None and a is not None:
        return LoRAPair(a, LazyTensor((1, a.shape[0]), refuse), scaling)
    return LoRAPair(cast(Array, a), cast(Array, b), scaling)


def _same_names(what: str, got: Iterable[str], expected: Iterable[str], why: str) -> None:
    missing = set(expected) - set(got)
    unknown = set(got) - set(expected)
    if missing or unknown:
        examples = [f"lacks {min(missing)!r}"] if missing else []
        examples += [f"has {quoted(repr(min(unknown)), 200)}"] if unknown else []
        raise LayoutMismatch(
            f"{what}: {len(missing)} missing and {len(unknown)} unknown; it"
            f" {' and '.join(examples)}. Expected {why}"
        )
