"""Slices: they score as the whole adapter does, bit for bit, and whatever is not exactly one is
refused. Damage of every other kind is fuzz's (score-request).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from loraprobe import fit_probe
from loraprobe.adapters.adapter import KINDS, Adapter
from loraprobe.adapters.deltas import factor_delta, weight_delta
from loraprobe.adapters.safetensors import read_safetensors
from loraprobe.errors import (
    AdapterFormatError,
    BaseModelMismatch,
    KindMismatch,
    LayoutMismatch,
    LoraprobeError,
    NonFiniteError,
    RecipeError,
    UnsupportedAdapterError,
)
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.probe import Probe
from loraprobe.serve.slices import SLICE, WHOLE, read_slice, read_whole, save_slice, save_whole
from tests.helpers import make, probes
from tests.helpers.one_module import assert_same


def edited(data: bytes, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> bytes:
    """A safetensors file with its metadata and tensors changed in place."""
    file = read_safetensors(data)
    tensors = {name: torch.tensor(array) for name, array in file.tensors.items()}
    edit(file.metadata, tensors)
    made: bytes = safetensors.torch.save(tensors, file.metadata)
    return made


def delta(kind: str = "factor_delta", **options: Any) -> Adapter:
    """A labelled delta, or weights, of another client than any probe was fitted on."""
    if kind == "weight_delta":
        pairs = [probes.labelled_adapter(seed, kind="weights", **options) for seed in (501, 502)]
        return weight_delta(*pairs)
    return probes.labelled_adapter(500, malicious=True, signal=0.4, kind=kind, **options)


def probe_of(kind: str, recipe: FeatureRecipe) -> Probe:
    """A probe with this recipe, of adapters of this kind."""
    data = probes.labelled(16, 1, kind="weights" if kind == "weight_delta" else kind)
    adapters = data.adapters
    if kind == "weight_delta":
        first = probes.labelled_adapter(999, kind="weights")
        adapters = [weight_delta(adapter, first) for adapter in adapters]
    return fit_probe(adapters, data.labels, recipe=recipe, groups=data.groups)


# --- the theorem ---


@pytest.mark.parametrize("head", probes.HEAD_OPTIONS)
def test_a_slice_scores_as_the_whole_delta_bit_for_bit_with_every_head(head: str) -> None:
    probe = probes.tiny_probe(head, "paper")
    for adapter in probes.new_data().adapters[:6]:
        data = save_slice(probe.featurizer, adapter)
        assert probe([read_slice(data, probe.featurizer)]) == probe([adapter])
        assert len(data) < len(save_whole(adapter)) / 2
    assert len(set(probe(probes.new_data().adapters[:6]))) > 3  # the scores could differ


RECIPES = {
    "first layer's B": FeatureRecipe.paper(),
    "A of all layers": FeatureRecipe.all_a(),
    "both factors of v_proj": FeatureRecipe(modules=("v_proj",)),
    "canonical": FeatureRecipe(features=("canonical", "slices"), layers=(1,)),
    "spectra of B": FeatureRecipe(features=("spectra", "norms"), factors=("B",)),
}


# of no product
KINDS_AND_RECIPES = [
    (kind, name)
    for kind in KINDS
    for name in RECIPES
    if (kind, name) != ("factor_delta", "canonical")
]


@pytest.mark.parametrize(("kind", "name"), KINDS_AND_RECIPES)
def test_a_slice_scores_as_the_whole_adapter_whatever_the_recipe_and_kind(
    kind: str, name: str
) -> None:
    probe, adapter = probe_of(kind, RECIPES[name]), delta(kind)
    read = read_slice(save_slice(probe.featurizer, adapter), probe.featurizer)
    said = probe.verdicts([adapter], check_start=False)
    assert probe.verdicts([read], check_start=False) == said
    assert np.array_equal(probe.featurizer([read]), probe.featurizer([adapter]))
    assert read.base_model == probes.BASE


def test_what_is_not_in_a_slice_cannot_be_read_from_it() -> None:
    probe = probes.tiny_probe()
    read = read_slice(save_slice(probe.featurizer, delta()), probe.featurizer)
    assert sorted(read) == [make.module("q_proj"), make.module("v_proj")]  # the first layer only
    with pytest.raises(LayoutMismatch, match="not part of the slice"):
        _ = read[make.module("q_proj")].A


def test_half_precision_and_float64_lose_nothing() -> None:
    featurizer = Featurizer.fit(FeatureRecipe.paper(), [make.adapter(kind="factor_delta")])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        adapter = make.adapter(kind="factor_delta", dtype=dtype, seed=5)
        assert np.array_equal(
            featurizer([read_slice(save_slice(featurizer, adapter), featurizer)]),
            featurizer([adapter]),
        ), dtype


# --- whatever is not the slice ---

FIRST, SECOND = (
    f"base_model.model.{make.module(name)}.lora_B.weight" for name in ("q_proj", "v_proj")
)


Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
Q_PROJ = make.module("q_proj")


def renamed(old: str, new: str) -> Edit:
    return lambda m, t: t.update({FIRST.replace(old, new): t.pop(FIRST)})


def first(tensor: torch.Tensor) -> Edit:
    return lambda m, t: t.update({FIRST: tensor})


def says(**changes: Any) -> Edit:
    """Metadata with other fields; one of ... is left out."""

    def edit(metadata: dict[str, Any], _: Any) -> None:
        fields = {**json.loads(metadata["loraprobe"]), **changes}
        kept = {name: value for name, value in fields.items() if value is not ...}
        metadata["loraprobe"] = json.dumps(kept)

    return edit


def scaled(value: Any, module: str = Q_PROJ) -> Edit:
    """With another scaling of a module; None takes it away."""

    def edit(metadata: dict[str, Any], tensors: Any) -> None:
        scalings = {**json.loads(metadata["loraprobe"])["scalings"], module: value}
        kept = {name: one for name, one in scalings.items() if one is not None}
        says(scalings=kept)(metadata, tensors)

    return edit


# What is changed of a slice, what refuses it, and with which words.
Fmt, Lay = AdapterFormatError, LayoutMismatch
ONE_OFF = "1 missing and 1 unknown"
WRONG: dict[str, tuple[Edit, type[LoraprobeError], str]] = {
    "a tensor is missing": (lambda m, t: t.pop(FIRST), Lay, "1 missing and 0 unknown"),
    "a tensor too many": (lambda m, t: t.update(x=torch.ones(1, 1)), Lay, "0 missing and 1 unk"),
    "another layer": (renamed("layers.0", "layers.1"), Lay, ONE_OFF),
    "another shape": (first(torch.ones(11, 2)), Lay, "expected (10, 2)"),
    "a vector": (first(torch.ones(20)), Fmt, "expected a matrix"),
    "no numbers": (first(torch.ones(0, 2)), Fmt, "one rank r >= 1"),
    "integers": (first(torch.ones(10, 2, dtype=torch.int32)), Fmt, "got dtype I32"),
    "NaN": (lambda m, t: t[SECOND].fill_(float("nan")), NonFiniteError, "12 of 12 values"),
    "PEFT's own file": (lambda m, t: m.pop("loraprobe"), Fmt, "does not say it is a slice"),
    "metadata that are no JSON": (lambda m, t: m.update(loraprobe="{"), Fmt, "not readable JSON"),
    "a field twice": (
        lambda m, t: m.update(loraprobe='{"kind": 1, "kind": 1}'),
        Fmt,
        "occurs twice",
    ),
    "a whole adapter": (says(format=WHOLE), Fmt, "does not say it is a slice"),
    "another version": (says(version=2), Fmt, "'version': 2"),
    "another kind": (says(kind="weights"), KindMismatch, "got an adapter of kind 'weights'"),
    "an unknown kind": (says(kind="delta"), Fmt, "'kind': 'delta'"),
    "a base model that is a number": (says(base_model=1), Fmt, "'base_model': 1"),
    "an unknown field": (says(extra=1), Fmt, "'extra': 1"),
    "no base model": (says(base_model=...), Fmt, "got metadata"),
    "scalings in a list": (says(scalings=[1]), Fmt, "'scalings': [1]"),
    "a scaling is text": (scaled("2"), Fmt, "a finite scaling"),
    "a scaling is 0": (scaled(0), Fmt, "a finite scaling"),
    "a scaling is NaN": (scaled(float("nan")), Fmt, "not readable JSON"),
    "a scaling beyond any float": (scaled(10**400), Fmt, "a finite scaling"),
    "another scaling": (scaled(2.001), Lay, "got scaling 2.001"),
    "a scaling is missing": (scaled(None), Lay, "scalings: 1 missing"),
    "a scaling too many": (scaled(1.0, "more"), Lay, "scalings: 0 missing and 1 unknown"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_exactly_the_slice_is_refused(name: str) -> None:
    edit, error, message = WRONG[name]
    featurizer = probes.tiny_probe().featurizer
    good = save_slice(featurizer, delta())
    read_slice(edited(good, lambda m, t: None), featurizer)  # unchanged it is read
    with pytest.raises(error) as caught:
        read_slice(edited(good, edit), featurizer)
    assert message in str(caught.value)


def test_the_slice_of_another_probe_is_refused() -> None:
    wide, narrow = (
        probes.tiny_probe("linear", "all_b").featurizer,
        probes.tiny_probe("linear", "paper").featurizer,
    )
    with pytest.raises(LayoutMismatch, match="0 missing and 2 unknown"):
        read_slice(save_slice(wide, delta()), narrow)
    with pytest.raises(LayoutMismatch, match="2 missing and 0 unknown"):
        read_slice(save_slice(narrow, delta()), wide)
    with pytest.raises(RecipeError):
        read_slice(save_slice(narrow, delta()), probes.tiny_probe("linear", "spectral").featurizer)


# --- whole adapters ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_adapter_comes_back_as_it_was(kind: Any) -> None:
    # a scaling of its own
    sent = make.with_pairs(delta(kind), {"model.layers.7.q_proj": make.pair(scaling=0.125)})
    back = read_whole(save_whole(sent), kind)
    assert (back.kind, back.base_model) == (kind, probes.BASE)
    assert_same(back, sent)


def test_a_file_that_peft_wrote_is_read_with_what_is_said_beside_it() -> None:
    sent = delta("weights")
    back = read_whole(
        safetensors.torch.save(make.tensors(sent), {"format": "pt"}),
        "weights",
        alpha=4.0,
        base_model="org/said",
    )
    assert (back.base_model, back[make.module()].scaling) == ("org/said", 2.0)
    assert np.array_equal(back[make.module()].A, sent[make.module()].A)


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"kind": "factor_delta"}, KindMismatch, "says it is of kind 'weights'"),
        ({"kind": "weights", "alpha": 16.0}, AdapterFormatError, "leave alpha out"),
        (
            {"kind": "weights", "base_model": "org/other"},
            BaseModelMismatch,
            "says it is of base model 'org/base'",
        ),
    ],
)
def test_a_file_and_what_is_said_beside_it_must_agree(
    said: dict[str, Any], error: type[LoraprobeError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_whole(save_whole(delta("weights")), **said)


def test_what_is_not_a_whole_adapter_is_refused() -> None:
    good = save_whole(delta("weights"))
    plain = safetensors.torch.save(make.tensors(delta("weights")))
    with pytest.raises(AdapterFormatError, match="got a slice"):
        read_whole(save_slice(probes.tiny_probe().featurizer, delta()), "factor_delta")
    with pytest.raises(AdapterFormatError, match="pass alpha"):
        read_whole(plain, "weights")
    with pytest.raises(AdapterFormatError, match="expected a finite number other than 0"):
        read_whole(plain, "weights", alpha=0.0)
    with pytest.raises(LayoutMismatch, match="scalings: 1 missing"):
        read_whole(edited(good, scaled(None)), "weights")
    with pytest.raises(AdapterFormatError, match="only lora_A is there"):
        read_whole(edited(good, lambda m, t: t.pop(FIRST)), "weights")
    with pytest.raises(UnsupportedAdapterError, match="DoRA"):
        read_whole(
            edited(good, lambda m, t: t.update({"x.lora_magnitude_vector": torch.ones(1)})),
            "weights",
        )
    with pytest.raises(KindMismatch, match="needs the adapter that training started from"):
        save_whole(factor_delta(delta("weights"), None))


# --- what a slice says ---


def test_a_slice_says_what_it_is_and_is_the_same_bytes_every_time() -> None:
    featurizer = probes.tiny_probe().featurizer
    assert len({save_slice(featurizer, delta()) for _ in range(5)}) == 1
    [(entry, text)] = read_safetensors(save_slice(featurizer, delta())).metadata.items()
    scalings = {make.module("q_proj"): 2.0, make.module("v_proj"): 2.0}
    assert entry == "loraprobe"
    assert json.loads(text) == {
        "format": SLICE,
        "version": 1,
        "kind": "factor_delta",
        "scalings": scalings,
        "base_model": probes.BASE,
    }
