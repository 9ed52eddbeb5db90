"""Slices that the service knows again by their header.

The same verdicts, bit for bit, and the same refusals, as if it had never seen one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from loraprobe import fit_probe
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import (
    AdapterFormatError,
    BaseModelMismatch,
    DataError,
    KindMismatch,
    LayoutMismatch,
    LoraprobeError,
    NonFiniteError,
)
from loraprobe.featurizer import FeatureRecipe
from loraprobe.probe import Probe
from loraprobe.serve import Settings, header_cache
from loraprobe.serve.header_cache import HeaderCache
from loraprobe.serve.scoring import Question, Scorer
from loraprobe.serve.slices import save_slice
from tests.helpers import probes, serving

DELTA = Question(("paper",), "factor_delta")


def paper() -> Probe:
    return probes.tiny_probe("linear", "paper")


def delta(seed: int) -> Adapter:
    return serving.delta(seed, malicious=seed % 2 == 0)


def body(seed: int = 0, probe: Probe | None = None) -> bytes:
    return save_slice((probe or paper()).featurizer, delta(seed))


def scorer(**options: Any) -> Scorer:
    return Scorer(Settings({"paper": paper()}, **options))


class Read(Exception):
    """A body was read, not known."""


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after whose call reading a body fails the test."""

    def read(data: bytes) -> Any:
        raise Read

    return lambda: monkeypatch.setattr("loraprobe.serve.scoring.read_safetensors", read)


# --- known and unknown give the same ---


@pytest.mark.parametrize("head", probes.HEAD_OPTIONS)
@pytest.mark.parametrize("recipe", ["paper", "all_b"])
def test_a_known_slice_has_the_score_of_the_whole_delta_bit_for_bit(
    head: str, recipe: str, unread: Callable[[], None]
) -> None:
    probe = probes.tiny_probe(head, recipe)
    service, scores = Scorer(Settings({"paper": probe})), set()
    service(body(0, probe), DELTA)
    unread()
    for seed in range(8):
        [result], spectra = service(body(seed, probe), DELTA)
        [verdict] = probe.verdicts([delta(seed)])
        assert (result.score, result.verdict, result.reason, spectra) == (
            verdict.score,
            verdict.label,
            verdict.reason,
            None,
        )
        scores.add(result.score)
    assert len(scores) > 1  # the scores could differ, although some heads are sure of all of these


@pytest.mark.parametrize("shift", range(8))
def test_numbers_that_lie_between_the_words_of_memory_score_alike(
    shift: int, unread: Callable[[], None]
) -> None:
    """A header may be of any length.

    Padded with spaces, the numbers begin at every remainder of 8.
    """
    data, service = body(), scorer()
    length = int.from_bytes(data[:8], "little")
    padded = (
        struct.pack("<Q", length + shift) + data[8 : 8 + length] + b" " * shift + data[8 + length :]
    )
    expected, first = scorer()(data, DELTA), service(padded, DELTA)
    unread()
    assert service(padded, DELTA) == first == expected


def test_a_blank_slice_is_inconclusive_and_its_smallest_change_is_not(
    unread: Callable[[], None],
) -> None:
    service, good = scorer(), body()
    header = 8 + int.from_bytes(good[:8], "little")
    service(good, DELTA)
    unread()
    [blank], _ = service(good[:header] + bytes(len(good) - header), DELTA)
    assert (blank.verdict, blank.reason) == (
        "inconclusive",
        "nothing that the probe reads has changed",
    )
    # 1e-45, the smallest float32
    [least], _ = service(good[:header] + b"\1" + bytes(len(good) - header - 1), DELTA)
    assert least.reason != blank.reason


def test_the_largest_numbers_there_are_score_as_they_do_in_the_library(
    unread: Callable[[], None],
) -> None:
    service, huge = scorer(), torch.finfo(torch.float32).max
    service(body(), DELTA)
    pairs = {
        name: LoRAPair(pair.A, np.full_like(pair.B, huge), pair.scaling)
        for name, pair in serving.delta().items()
    }
    adapter = Adapter(pairs, kind="factor_delta", base_model=probes.BASE)
    data = save_slice(paper().featurizer, adapter)
    unread()
    assert service(data, DELTA)[0][0].score == paper()([adapter])[0]


# --- what is refused is refused in the same words ---


def with_last(number: float) -> bytes:
    return body()[:-4] + struct.pack("<f", number)


def header_length() -> int:
    return 8 + int.from_bytes(body()[:8], "little")


def body_with(old: str, new: str) -> bytes:
    """The slice with something of its header exchanged for as much."""
    assert old.encode() in body()
    return body().replace(old.encode(), new.encode(), 1 if "F32" in old else -1)


HOSTILE: dict[str, tuple[bytes, Question, type[LoraprobeError]]] = {
    "NaN": (with_last(float("nan")), DELTA, NonFiniteError),
    "minus infinity": (with_last(float("-inf")), DELTA, NonFiniteError),
    "a number short": (body()[:-4], DELTA, AdapterFormatError),
    "a byte short": (body()[:-1], DELTA, AdapterFormatError),
    "a number more": (body() + bytes(4), DELTA, AdapterFormatError),
    "the header alone": (body()[: header_length()], DELTA, AdapterFormatError),
    "another kind": (body(), Question(("paper",), "weights"), KindMismatch),
    "alpha beside it": (body(), replace(DELTA, alpha=4.0), DataError),
    "a base model beside it": (body(), replace(DELTA, base_model=probes.BASE), DataError),
    "another base model": (body_with(probes.BASE, "x" * 8), DELTA, BaseModelMismatch),
    "another scaling": (body_with('q_proj\\": 2.0', 'q_proj\\": 3.0'), DELTA, LayoutMismatch),
    "another name": (body_with("q_proj.lora_B", "x_proj.lora_B"), DELTA, LayoutMismatch),
    "a type of the same width": (body_with('"F32"', '"I32"'), DELTA, AdapterFormatError),
    "another shape of the same size": (body_with("[10,2]", "[2,10]"), DELTA, LayoutMismatch),
    "a length beyond the file": (b"\xff" * 8 + body()[8:], DELTA, AdapterFormatError),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_service_that_knows_the_header_refuses_as_one_that_does_not(name: str) -> None:
    data, question, error = HOSTILE[name]
    assert (data, question) != (body(), DELTA)  # the damage was done
    fresh, used = scorer(), scorer()
    for seed in range(3):
        used(body(seed), DELTA)
    said = []
    for service in (fresh, used, used):
        with pytest.raises(error) as caught:
            service(data, question)
        said.append(str(caught.value))
    assert said[0] == said[1] == said[2]
    assert used(body(1), DELTA) == scorer()(body(1), DELTA)  # and is none the worse for it


# --- what is known ---


def swapped() -> bytes:
    """The slice with its two tensors in the other order."""
    start = header_length()
    header = json.loads(body()[8:start])
    [first, second] = [name for name in header if name != "__metadata__"]
    middle, end = header[first]["data_offsets"][1], header[second]["data_offsets"][1]
    header[first]["data_offsets"] = [end - middle, end]
    header[second]["data_offsets"] = [0, end - middle]
    text = json.dumps(header).encode()
    numbers = body()[start:]
    return struct.pack("<Q", len(text)) + text + numbers[middle:] + numbers[:middle]


def halved() -> bytes:
    """The slice in half precision."""
    header = json.loads(body()[8 : header_length()])
    tensors = {name: tensor.half() for name, tensor in safetensors.torch.load(body()).items()}
    data: bytes = safetensors.torch.save(tensors, header["__metadata__"])
    return data


@pytest.mark.parametrize("data", [swapped, halved])
def test_slices_that_hold_the_numbers_in_another_way_are_read_every_time(
    data: Callable[[], bytes], unread: Callable[[], None]
) -> None:
    service = scorer()
    first = service(data(), DELTA)
    assert service(data(), DELTA) == first
    assert (first == scorer()(body(), DELTA)) == (data is swapped)
    unread()
    with pytest.raises(Read):
        service(data(), DELTA)


@pytest.mark.parametrize(
    "recipe",
    [
        FeatureRecipe(layers="first", factors=("B",), normalize="none"),
        FeatureRecipe(features=("spectra", "norms"), factors=("B",)),
        FeatureRecipe(features=("slices", "norms"), factors=("B",)),
    ],
)
def test_probes_whose_features_are_something_else_know_none(recipe: FeatureRecipe) -> None:
    data = probes.labelled(16, 1)
    probe = fit_probe(data.adapters, data.labels, recipe=recipe, groups=data.groups)
    slices = HeaderCache(probe)
    slices.remember(body(0, probe), None)
    assert slices.verdict(body(0, probe), "factor_delta") is None


def test_what_is_remembered_is_bounded(
    monkeypatch: pytest.MonkeyPatch, unread: Callable[[], None]
) -> None:
    monkeypatch.setattr(header_cache, "MAX_KNOWN", 3)
    service, good = scorer(), body()
    length = int.from_bytes(good[:8], "little")
    many = [
        struct.pack("<Q", length + pad) + good[8 : 8 + length] + b" " * pad + good[8 + length :]
        for pad in range(0, 40, 8)
    ]
    for data in many:
        service(data, DELTA)
    unread()
    for data in many[-3:]:
        service(data, DELTA)
    with pytest.raises(Read):
        service(many[0], DELTA)
    monkeypatch.setattr(header_cache, "MAX_HEADER_BYTES", length)
    with pytest.raises(Read):
        service(many[-1], DELTA)
