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

from loraprobe.adapters import safetensors as safetensors_header
from loraprobe.adapters.safetensors import MAX_HEADER_BYTES, check_file_header, check_header
from loraprobe.errors import AdapterFormatError

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def file_of(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


Pairs = list[tuple[str, Any]]


def written(entries: Pairs, metadata: Pairs | None, as_list: list[bool]) -> bytes:
    """A file whose header has these entries in this order, names repeated or not.

    A repeated one names the bytes of the last.
    """
    kept = {name: 4 * place for place, name in enumerate(dict(entries))}
    parts = (
        []
        if metadata is None
        else [
            '"__metadata__": {'
            + ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in metadata)
            + "}"
        ]
    )
    for (name, extra), listed in zip(entries, as_list, strict=False):
        fields = {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": [kept[name], kept[name] + 4],
            **extra,
        }
        parts.append(
            f"{json.dumps(name)}: {json.dumps(list(fields.values())[:3] if listed else fields)}"
        )
    return file_of("{" + ", ".join(parts) + "}", bytes(4 * len(kept)))


def repeats(pairs: Pairs | None) -> bool:
    return pairs is not None and len(dict(pairs)) < len(pairs)


NAMES = st.sampled_from(["a", "b", "a.b", "x{[", "q\\", '"', "é", "layers.0"])
EXTRAS = st.sampled_from([{}, {}, {}, {"note": 1}, {"note": "{"}, {"note": [[]]}])
METADATA = st.none() | st.lists(
    st.tuples(st.text('ab{[\\"é', max_size=2), st.text('a{[]}\\"', max_size=4)), max_size=3
)
LISTED = st.just([False] * 6) | st.lists(st.booleans(), min_size=6, max_size=6)


@given(
    entries=st.lists(st.tuples(NAMES, EXTRAS), min_size=1, max_size=6),
    metadata=METADATA,
    as_list=LISTED,
)
@settings(max_examples=500, deadline=None)
def test_a_header_is_believed_if_and_only_if_nothing_occurs_twice(
    entries: Pairs, metadata: Pairs | None, as_list: list[bool]
) -> None:
    data = written(entries, metadata, as_list)
    found = safetensors.torch.load(data)
    assert set(found) == set(dict(entries))  # the library accepts it, twice or not
    for counts in (
        (),
        (len(found), None if metadata is None else dict(metadata)),
    ):  # without and with the short cut
        if repeats(entries) or repeats(metadata):
            with pytest.raises(AdapterFormatError, match="occurs twice"):
                check_header(data, *counts)
        else:
            check_header(data, *counts)


def test_the_usual_header_is_not_parsed_and_any_other_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "read_json", None)
    tensors = {"a": torch.zeros(2), "b": torch.ones(3)}
    check_header(safetensors.torch.save(tensors), 2, None)
    check_header(safetensors.torch.save(tensors, {"format": "pt"}), 2, {"format": "pt"})
    for data, metadata in (
        (safetensors.torch.save(tensors, {"x": "[]"}), {"x": "[]"}),
        (safetensors.torch.save(tensors), {}),
        (file_of("{}"), None),
    ):
        with pytest.raises(TypeError):
            check_header(data, 2, metadata)


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
        (file_of("{"), "not unambiguous JSON"),
        (file_of("[" * 100_000), "not unambiguous JSON"),
        (struct.pack("<Q", 3) + b'"\xff"', "not unambiguous JSON"),
        (
            file_of(json.dumps({"a\x1b[2J": ENTRY}), bytes(4)),
            r"names the tensor a\\x1b\[2J; expected printable text",
        ),
        (file_of(json.dumps({"a\x7f": ENTRY}, ensure_ascii=False), bytes(4)), "expected printable"),
        (
            file_of(json.dumps({"\u202e": ENTRY}, ensure_ascii=False), bytes(4)),
            "expected printable",
        ),
        (file_of('{"a": 1, "\\u0061": 2}'), "the key 'a' occurs twice"),
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
        path.write_bytes(
            file_of("{" + ", ".join([f'"a": {json.dumps(ENTRY)}'] * entries) + "}", bytes(4))
        )
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            if entries == 1:
                HOW[how](path, mapped)
            else:
                with pytest.raises(AdapterFormatError, match="the key 'a' occurs twice"):
                    HOW[how](path, mapped)


def test_the_library_takes_no_entry_that_the_short_cut_would_not_count() -> None:
    """It counts braces, brackets and quotes.

    An entry is an object with two lists and five strings, or a list with two more.
    """
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
