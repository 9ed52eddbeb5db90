"""The tensors of an adapter: names, types and shapes.

Safetensors files that are damaged or lie about themselves.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraprobe.adapters import files, load
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import load_adapter
from loraprobe.errors import AdapterFormatError, UnsupportedAdapterError
from tests.helpers import make
from tests.helpers.one_module import A_KEY, B_KEY, Q, assert_same, read, tiny

# --- names and dtypes


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("infix", ["", ".default", ".client_7"])
def test_names_with_and_without_prefix_and_adapter_name_mean_the_same(
    prefix: str, infix: str
) -> None:
    renamed = {
        prefix + key.removeprefix("base_model.model.").replace(".weight", f"{infix}.weight"): value
        for key, value in make.tensors().items()
    }
    assert set(renamed) != set(make.tensors()) or (prefix and not infix)
    assert_same(Adapter.from_state_dict(renamed, alpha=8), make.adapter())


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in tiny().items()}


@pytest.mark.parametrize(
    ("state_dict", "error", "says"),
    [
        ({}, AdapterFormatError, "without a single LoRA module"),
        (
            {A_KEY: tiny()[A_KEY]},
            AdapterFormatError,
            rf"^{Q}: only lora_A is there; expected lora_A and lora_B",
        ),
        ({B_KEY: tiny()[B_KEY]}, AdapterFormatError, rf"^{Q}: only lora_B is there"),
        (
            tiny() | renamed("base_model.model.", ""),
            AdapterFormatError,
            rf"^{Q}: lora_A occurs twice",
        ),
        (
            renamed(".weight", ".one.weight")
            | {
                k.replace("layers.0", "layers.1"): v
                for k, v in renamed(".weight", ".two.weight").items()
            },
            AdapterFormatError,
            "got 2 adapters in one state dict .'one', 'two'.; expected one",
        ),
        (
            {**tiny(), A_KEY: torch.zeros(3, 12)},
            AdapterFormatError,
            rf"^{Q}: got A of shape \(3, 12\) and B of shape \(10, 4\)",
        ),
        ({**tiny(), A_KEY: torch.zeros(4)}, AdapterFormatError, rf"^{Q}: got A of shape \(4,\)"),
        (
            {**tiny(), A_KEY: torch.zeros(4, 12, dtype=torch.int8)},
            AdapterFormatError,
            rf"^{Q}, lora_A: got dtype int8; expected float32",
        ),
        (
            {**tiny(), A_KEY: torch.zeros(4, 12, dtype=torch.complex64)},
            AdapterFormatError,
            "got dtype complex64",
        ),
        (
            {A_KEY: torch.zeros(4, 3, 3, 3), B_KEY: torch.zeros(8, 4, 1, 1)},
            UnsupportedAdapterError,
            r"\(4, 3, 3, 3\): this adapts a convolution",
        ),
        (
            {**tiny(), f"{Q}.lora_magnitude_vector": torch.zeros(10)},
            UnsupportedAdapterError,
            "this is DoRA",
        ),
        (
            {**tiny(), f"{Q}.lora_magnitude_vector.default.weight": torch.zeros(10)},
            UnsupportedAdapterError,
            "this is DoRA",
        ),
        (
            {**tiny(), "model.embed_tokens.lora_embedding_A": torch.zeros(4, 9)},
            UnsupportedAdapterError,
            "adapts an embedding",
        ),
        (
            {**tiny(), "base_model.model.lm_head.weight": torch.zeros(9, 4)},
            UnsupportedAdapterError,
            r"lm_head\.weight: .*modules_to_save",
        ),
        (
            {**tiny(), f"base_model.model.{Q}.bias": torch.zeros(10)},
            UnsupportedAdapterError,
            "a bias or a base weight",
        ),
        (
            {**tiny(), f"{Q}.lora_B.bias": torch.zeros(10)},
            UnsupportedAdapterError,
            "this is a LoRA bias",
        ),
        (
            {**tiny(), f"{'x' * 500}.lora_A.weight": torch.zeros(4, 12)},
            AdapterFormatError,
            r"named 'x+\.\.\.; expected a name of at most 500",
        ),
        (
            {**tiny(), f"{Q}.lora_C.weight": torch.zeros(10, 4)},
            UnsupportedAdapterError,
            "no tensor of plain LoRA",
        ),
        (
            {**tiny(), f"{Q}.lora_A.a.b.weight": torch.zeros(4, 12)},
            UnsupportedAdapterError,
            "no tensor of plain LoRA",
        ),
        (
            {**tiny(), "lora_A.weight": torch.zeros(4, 12)},
            UnsupportedAdapterError,
            "not a LoRA factor",
        ),
    ],
)
def test_a_state_dict_that_is_not_one_plain_adapter_is_refused(
    state_dict: Mapping[str, Tensor], error: type[AdapterFormatError], says: str
) -> None:
    assert_same(Adapter.from_state_dict(tiny(), alpha=8), Adapter({Q: make.pair()}))  # the control
    with pytest.raises(error, match=says) as caught:
        Adapter.from_state_dict(state_dict, alpha=8)
    assert type(caught.value) is error


def test_a_buffer_that_follows_from_the_base_is_left_out_and_reported() -> None:
    key = "base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"
    adapter = Adapter.from_state_dict({**tiny(), key: torch.ones(4)}, alpha=8)
    assert list(adapter) == [Q]
    assert adapter.ignored == (key,)
    assert Adapter.from_state_dict(tiny(), alpha=8).ignored == ()


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 0, 0.0, True, "8", None, [8], 10**400])
def test_an_alpha_that_is_no_number_to_scale_with_is_refused(alpha: Any) -> None:
    with pytest.raises(AdapterFormatError, match="expected a finite number other than 0"):
        Adapter.from_state_dict(tiny(), alpha=alpha)
    with pytest.raises(AdapterFormatError, match="expected a finite number other than 0"):
        Adapter.from_state_dict(tiny(), alpha=8, alpha_pattern={"nowhere": alpha})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_as_float32_of_the_same_value(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    stored = {key: value.to(dtype) for key, value in tiny().items()}
    save_file(stored, tmp_path / "a.safetensors")
    pair = load_adapter(tmp_path / "a.safetensors", alpha=8)[Q]
    assert pair.A.dtype == pair.B.dtype == np.float32
    assert torch.equal(torch.from_numpy(pair.A), stored[A_KEY].float())
    assert not np.array_equal(pair.A, make.pair().A)  # the control: something was rounded


# --- damaged and hostile files


def test_a_truncated_safetensors_is_refused_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tiny(), path)
    whole = path.read_bytes()
    for length in {*range(20), *range(20, len(whole), 7), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterFormatError, match=r"damaged, incomplete|is empty"):
            load_adapter(path, alpha=8)
    path.write_bytes(whole)
    assert list(load_adapter(path, alpha=8)) == [Q]  # the control


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = '{"dtype": "F32", "shape": [2, 2], "data_offsets": [%d, %d]}'


def raw(text: str, data: bytes) -> bytes:
    """A file with this text for its header."""
    return struct.pack("<Q", len(text)) + text.encode() + data


def entry(
    dtype: str = "F32", shape: tuple[int, ...] = (2, 2), offsets: tuple[int, int] = (0, 16)
) -> dict[str, Any]:
    """A header whose B is right and whose A may not be."""
    return {
        A_KEY: {"dtype": dtype, "shape": shape, "data_offsets": offsets},
        B_KEY: {"dtype": "F32", "shape": (2, 2), "data_offsets": (16, 32)},
    }


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        safetensors({})[:8],
        safetensors(entry(), bytes(32)).replace(B_KEY.encode(), A_KEY.encode()),
        raw(f'{{"{A_KEY}": {ENTRY % (16, 32)}, {json.dumps(entry())[1:]}', bytes(32)),
        raw(
            f'{json.dumps(entry())[:-1]}, "{A_KEY.replace("l", chr(92) + "u006c")}":'
            f" {ENTRY % (0, 16)}}}",
            bytes(32),
        ),
        safetensors(
            {**entry(), "base_model.model.\x7f" + Q + ".lora_A.weight": entry()[A_KEY]}, bytes(32)
        ),
        b"",
        bytes(7),
        safetensors(entry(offsets=(0, 2**40)), bytes(32)),
        safetensors(entry(shape=(2**31, 2**31)), bytes(32)),
        safetensors(entry(shape=(-1, 2)), bytes(32)),
        safetensors(entry(offsets=(16, 0)), bytes(32)),
        safetensors(entry(offsets=(16, 32)), bytes(32)),
        safetensors(entry(), bytes(33)),
        safetensors(entry("I8", (4, 4)), bytes(32)),
        safetensors(entry("F8_E4M3", (4, 4)), bytes(32)),
        safetensors(entry("I32"), bytes(32)),
        safetensors(entry("X32"), bytes(32)),
        b"PK\x03\x04",
    ],
)
def test_a_safetensors_file_that_lies_about_itself_is_refused(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterFormatError, match=r"a\.safetensors"):
        read(path, alpha=8)


def test_the_handmade_safetensors_above_are_wrong_only_where_they_are_meant_to_be(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors(entry(), bytes(32)))
    assert read(tmp_path / "a.safetensors", alpha=8)[Q].A.tolist() == [[0, 0], [0, 0]]


def test_an_oversized_file_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tiny(), tmp_path / "a.safetensors")
    monkeypatch.setattr(files, "MAX_WEIGHT_BYTES", 100)
    monkeypatch.setattr(load, "SafetensorsFile", None)
    with pytest.raises(AdapterFormatError, match="expected at most 100 for an adapter"):
        load_adapter(tmp_path / "a.safetensors", alpha=8)


def test_the_library_still_checks_what_is_left_to_it(tmp_path: Path) -> None:
    """Overlaps, gaps, bytes that no tensor names and headers beyond the file are safetensors' to
    refuse; were that to end, it would be seen here.
    """
    for content in (
        safetensors({"a": entry()[A_KEY], "b": entry()[A_KEY]}, bytes(16)),
        safetensors(
            {"a": entry()[A_KEY], "b": {**entry()[B_KEY], "data_offsets": (20, 36)}}, bytes(36)
        ),
        safetensors({"a": {**entry()[A_KEY], "data_offsets": (4, 20)}}, bytes(20)),
        safetensors({"a": entry()[A_KEY]}, bytes(17)),
        struct.pack("<Q", 100) + b"{}",
    ):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(SafetensorError):
            safe_open(tmp_path / "a.safetensors", "pt")


def test_a_name_that_safetensors_reads_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        raw(
            f'{{"{A_KEY}": {ENTRY % (16, 32)}, {json.dumps(entry())[1:]}',
            bytes(16) + bytes(range(16)),
        )
    )
    assert (
        len(safe_open(path, "pt").keys()) == 2
    )  # the library keeps the last entry of a name and says nothing
    with pytest.raises(
        AdapterFormatError, match=rf"a\.safetensors: .*the key '{A_KEY[:30]}.*occurs twice"
    ):
        load_adapter(path, alpha=8)


def test_metadata_with_brackets_and_escapes_is_no_name_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        tiny(),
        path,
        {"format": "pt", "config": json.dumps({"a": [[{}]], "b": "\\"}), "note": "Ärger"},
    )
    assert list(read(path, alpha=8)) == [Q]
