"""Safetensors without torch: what the library reads, and nothing that two readers read two ways."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraprobe.adapters.safetensors import (
    SafetensorsFile,
    header_of,
    read_safetensors,
)
from loraprobe.errors import AdapterFormatError
from loraprobe.limits import TENSOR_HEADER

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
Pairs = list[tuple[str, Any]]


def file_of(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


def written(entries: Pairs, metadata: Pairs | None) -> bytes:
    """A file whose header has these entries in this order, names repeated or not.

    A repeated one names the bytes of the last.
    """
    kept = {name: 4 * place for place, name in enumerate(dict(entries))}
    parts = []
    if metadata is not None:
        texts = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in metadata)
        parts.append('"__metadata__": {' + ", ".join(texts) + "}")
    for name, extra in entries:
        offsets = [kept[name], kept[name] + 4]
        parts.append(
            f"{json.dumps(name)}: {json.dumps({**ENTRY, 'data_offsets': offsets, **extra})}"
        )
    return file_of("{" + ", ".join(parts) + "}", bytes(4 * len(kept)))


def repeats(pairs: Pairs | None) -> bool:
    return pairs is not None and len(dict(pairs)) < len(pairs)


NAMES = st.sampled_from(["a", "b", "a.b", "x{[", "q\\", '"', "é", "layers.0"])
EXTRAS = st.sampled_from([{}, {}, {}, {"note": 1}, {"note": "{"}, {"note": [[]]}])
METADATA = st.none() | st.lists(
    st.tuples(st.text('ab{[\\"é', max_size=2), st.text('a{[]}\\"', max_size=4)), max_size=3
)


@given(st.lists(st.tuples(NAMES, EXTRAS), min_size=1, max_size=6), METADATA)
@settings(max_examples=200, deadline=None)
def test_a_header_is_believed_if_and_only_if_nothing_occurs_twice(
    entries: Pairs, metadata: Pairs | None
) -> None:
    data = written(entries, metadata)
    # the library takes it, twice too
    assert set(safetensors.torch.load(data)) == set(dict(entries))
    if repeats(entries) or repeats(metadata):
        with pytest.raises(AdapterFormatError, match="occurs twice"):
            header_of(data)
    else:
        assert header_of(data).keys() - {"__metadata__"} == set(dict(entries))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "got what is empty"),
        (bytes(7), "got 7 bytes"),
        (struct.pack("<Q", 3) + b"{}", "got 10 bytes that announce a header of 3 bytes"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "18446744073709551615 bytes"),
        (struct.pack("<Q", TENSOR_HEADER + 1) + bytes(TENSOR_HEADER + 1), "at most 16777216"),
        (file_of("[]"), "a JSON list; expected an object"),
        (file_of("3"), "a JSON int"),
        (file_of("{"), "not unambiguous JSON"),
        (file_of("[" * 100_000), "not unambiguous JSON"),
        (struct.pack("<Q", 3) + b'"\xff"', "not unambiguous JSON"),
        (
            file_of(json.dumps({"a\x1b[2J": ENTRY}), bytes(4)),
            r"named a\\x1b\[2J; expected printable",
        ),
        (file_of(json.dumps({"a\x7f": ENTRY}, ensure_ascii=False), bytes(4)), "expected printable"),
        (file_of(json.dumps({"\u202e": ENTRY}, ensure_ascii=False)), "expected printable"),
        (file_of('{"a": {}, "\\u0061": {}}'), "the key 'a' occurs twice"),
        (file_of('{"a": ["F32", [1], [0, 4]]}', bytes(4)), "entry a that is a JSON list"),
    ],
)
def test_a_header_that_is_no_header_is_refused_from_bytes_and_from_a_file(
    data: bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    for read in (header_of, read_safetensors, lambda _: SafetensorsFile(path)):
        with pytest.raises(AdapterFormatError, match=says) as caught:
            read(data)
        assert str(caught.value).isprintable()


def refused(data: bytes, path: Path) -> None:
    """Refused from bytes and from a file, in few words."""
    path.write_bytes(data)
    for read in (lambda: read_safetensors(data), lambda: SafetensorsFile(path)["a"].load()):
        with pytest.raises(AdapterFormatError) as caught:
            read()
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, 3),  # an offset beyond the end
        ({}, 5),  # bytes after the end
        ({"data_offsets": [4, 8]}, 8),  # a gap
        ({"data_offsets": [-4, 0]}, 4),
        ({"data_offsets": [4, 0]}, 4),
        ({"shape": [2]}, 4),  # not the size of the bytes
        ({"shape": [-1]}, 4),
        ({"shape": [0, 2**32, 2**32, 2**32], "data_offsets": [0, 0]}, 0),  # it overflows
        ({"dtype": "F128"}, 4),  # of the future
        ({"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}, 3),  # PyTorch lacks it
    ],
)
def test_an_entry_that_is_not_its_bytes_is_refused(
    fields: dict[str, Any], size: int, tmp_path: Path
) -> None:
    assert len(read_safetensors(file_of(json.dumps({"a": ENTRY}), bytes(4))).tensors) == 1
    header = json.dumps({"a": {**ENTRY, **fields}})
    refused(file_of(header, bytes(size)), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        '{"a": ' + "1" * 1_000_000 + "}",
        '{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"__metadata__": {"a": 1}}',
        json.dumps({"a": ENTRY, "b": ENTRY}),  # overlapping
        "{" + ",".join(f'"{number}":1' for number in range(150_000)) + ',"149999":1}',
    ],
    ids=["a long integer", "half a pair", "a number in metadata", "overlap", "twice among many"],
)
def test_a_header_that_no_reader_takes_alike_is_refused(header: str, tmp_path: Path) -> None:
    refused(file_of(header, bytes(4)), tmp_path / "a.safetensors")


def test_metadata_of_null_is_none() -> None:
    header = b'{"__metadata__":null}'  # as MLX writes it
    assert read_safetensors(len(header).to_bytes(8, "little") + header) == ({}, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_numbers_are_those_that_torch_reads_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every pattern of half precision: subnormal numbers, infinities and NaN too."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    short = torch.randn(2**16, dtype=dtype) if dtype.itemsize > 2 else bits.view(dtype)
    tensors = {"a": short.reshape(2**8, 2**8), "b": torch.randn(3, 5).to(dtype)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"note": "x"})
    lazy = SafetensorsFile(tmp_path / "a.safetensors")
    loaded = read_safetensors((tmp_path / "a.safetensors").read_bytes())
    assert loaded.metadata == {"note": "x"}
    for name, tensor in tensors.items():
        wide = tensor.to(torch.float64 if dtype == torch.float64 else torch.float32).numpy()
        for got in (lazy[name].load(), loaded.tensors[name]):
            assert (got.dtype, got.shape) == (wide.dtype, wide.shape)
            np.testing.assert_array_equal(got, wide)
            np.testing.assert_array_equal(np.signbit(got), np.signbit(wide))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_other_types_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2, 2).to(dtype)}, tmp_path / "a.safetensors")
    for read in (
        lambda: SafetensorsFile(tmp_path / "a.safetensors")["a"],
        lambda: read_safetensors((tmp_path / "a.safetensors").read_bytes()),
    ):
        with pytest.raises(AdapterFormatError, match=r"a: got dtype [BFI]\w+; expected F32, F16"):
            read()
