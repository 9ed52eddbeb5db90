"""The header check: the quick way says what the slow definition says, and nothing is named twice."""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from loraprobe.errors import AdapterFormatError
from loraprobe.safetensors_header import MAX_HEADER_BYTES, check_file_header, check_header

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def file_of(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


def written(pairs: list[tuple[str, Any]], metadata: Any, as_list: list[bool]) -> bytes:
    """A file whose header has these entries in this order, names repeated or not; a repeated one names the bytes of the last."""
    last = {name: number for number, (name, _) in enumerate(pairs)}
    kept = {name: 4 * place for place, name in enumerate(last)}
    parts = [] if metadata is None else [f'"__metadata__": {json.dumps(metadata)}']
    for (name, extra), listed in zip(pairs, as_list, strict=True):
        fields = {"dtype": "F32", "shape": [1], "data_offsets": [kept[name], kept[name] + 4], **extra}
        parts.append(f"{json.dumps(name)}: {json.dumps(list(fields.values())[:3] if listed else fields)}")
    return file_of("{" + ", ".join(parts) + "}", bytes(4 * len(kept)))


NAMES = st.sampled_from(["a", "b", "a.b", "x{[", "q\\", '"', "é", "layers.0"])
EXTRAS = st.sampled_from([{}, {"note": 1}, {"note": "{"}, {"note": [[]]}])
METADATA = st.none() | st.dictionaries(st.text('a{[\\"é', max_size=3), st.text('a{[]}\\"', max_size=4), max_size=2)


@given(pairs=st.lists(st.tuples(NAMES, EXTRAS), min_size=1, max_size=6), metadata=METADATA, as_list=st.lists(st.booleans(), min_size=6, max_size=6))
@settings(max_examples=400, deadline=None)
def test_what_the_library_found_is_believed_exactly_if_no_name_occurs_twice(pairs: Any, metadata: Any, as_list: list[bool]) -> None:
    data = written(pairs, metadata, as_list[: len(pairs)])
    found = safetensors.torch.load(data)
    names = [name for name, _ in pairs]
    assert set(found) == set(names)  # the library accepts it, twice or not
    for tensors in (None, len(found)):  # with and without the short cut
        if len(names) == len(set(names)):
            check_header(data, tensors)
        else:
            with pytest.raises(AdapterFormatError, match="twice"):
                check_header(data, tensors)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes in 0 bytes"),
        (bytes(7), "in 7 bytes; expected it whole"),
        (struct.pack("<Q", 3) + b"{}", "3 bytes in 10 bytes"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "18446744073709551615 bytes"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + bytes(MAX_HEADER_BYTES + 1), "at most 16777216"),
        (file_of("[]"), "not a JSON object"),
        (file_of("3"), "not a JSON object"),
        (file_of("{"), "not readable JSON"),
        (file_of("[" * 100_000), "not readable JSON"),
        (struct.pack("<Q", 3) + b'"\xff"', "not readable JSON"),
        (file_of(json.dumps({"a\x1b[2J": ENTRY}), bytes(4)), r"a\\x1b\[2J in characters that cannot be printed"),
        (file_of(json.dumps({"a\x7f": ENTRY}, ensure_ascii=False), bytes(4)), "cannot be printed"),
        (file_of(json.dumps({"\u202e": ENTRY}, ensure_ascii=False), bytes(4)), "cannot be printed"),
        (file_of('{"a": 1, "\\u0061": 2}'), "names the tensor a twice"),
    ],
)
def test_a_header_that_is_no_header_is_refused(data: bytes, says: str) -> None:
    for tensors in (None, 1):
        if tensors is None or "JSON" not in says:  # what the library has read is JSON
            with pytest.raises(AdapterFormatError, match=says) as caught:
                check_header(data, tensors)
            assert str(caught.value).isprintable()


HOW = {
    "bytes": lambda path, mapped: check_header(path.read_bytes()),
    "bytearray": lambda path, mapped: check_header(bytearray(path.read_bytes())),
    "memoryview": lambda path, mapped: check_header(memoryview(path.read_bytes())),
    "map": lambda path, mapped: check_header(mapped),
    "map, count known": lambda path, mapped: check_header(mapped, 1),
    "file": lambda path, mapped: check_file_header(path),
    "file, count known": lambda path, mapped: check_file_header(path, 1),
}


@pytest.mark.parametrize("how", HOW)
def test_files_bodies_and_maps_are_checked_alike(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for entries in (1, 2):
        path.write_bytes(file_of("{" + ", ".join([f'"a": {json.dumps(ENTRY)}'] * entries) + "}", bytes(4)))
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            if entries == 1:
                HOW[how](path, mapped)
            else:
                with pytest.raises(AdapterFormatError, match="names the tensor a twice"):
                    HOW[how](path, mapped)


def test_the_library_refuses_a_count_that_the_short_cut_would_miss() -> None:
    """The short cut counts brackets: every entry needs three, which only holds while the library takes no entry with fewer."""
    for entry in (
        '{"dtype": "F32", "shape": [1]}',
        '{"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}',
        "[]",
        "null",
        '"F32"',
        '["F32", [1], 0, 4]',
    ):
        with pytest.raises(SafetensorError):
            safetensors.torch.load(file_of(f'{{"a": {entry}}}', bytes(4)))


def test_opening_reads_the_header_and_not_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(2)})[:-8])
    check_file_header(path, 1)  # the numbers are gone, which is the library's to see
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")
