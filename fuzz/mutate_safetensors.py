"""Edits of a safetensors file that keep its frame.

The header is changed and its length written anew, or the numbers are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .mutate_bytes import Mutation, set_bytes
from .mutate_json import EDITS, NUMBERS, TEXTS, dumps, raw

Header = dict[str, Any]

DTYPES = "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F4 F6_E2M3 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64 X32".split()
_RENAMED = (
    "A",
    "B",
    "lora_A",
    "lora_B",
    "default",
    "q_proj",
    "v_proj",
    "layers.0",
    "layers.1",
    "base_model.model.",
    ".weight",
)


def offsets(header: Header, body: bytes, rng: np.random.Generator) -> tuple[Header, bytes]:
    """The byte range of a tensor moved, turned round, made another's, or put outside the file."""
    one, other = _two(header, rng)
    start, stop = header[one]["data_offsets"]
    step = int(rng.choice((-4, -1, 1, 2, 4, 8, 1000)))
    ranges = (
        [start + step, stop + step],
        [start, stop + step],
        [stop, start],
        header[other]["data_offsets"],
        [0, len(body)],
        [start, 2**63],
        [2**64 - 4, 2**64],
        [-4, stop],
        [start],
        [start, stop, stop],
        [float(start), stop],
        [len(body), len(body)],
        [2**40, 2**40 + stop - start],
        None,
    )
    return _with(header, one, data_offsets=ranges[rng.integers(len(ranges))]), body


def types(header: Header, body: bytes, rng: np.random.Generator) -> tuple[Header, bytes]:
    """Another type, sometimes with a shape that makes the bytes fit again."""
    one, _ = _two(header, rng)
    dtype = DTYPES[rng.integers(len(DTYPES))]
    rows, columns = (header[one]["shape"] + [1, 1])[:2]
    shape = (
        [rows, columns],
        [rows, columns * 2],
        [rows, max(1, columns // 2)],
        [rows * 4, columns],
        [2 * rows, 2 * columns],
    )[rng.integers(5)]
    return (
        _with(
            header, one, dtype=dtype, shape=shape if rng.random() < 0.6 else header[one]["shape"]
        ),
        body,
    )


def shapes(header: Header, body: bytes, rng: np.random.Generator) -> tuple[Header, bytes]:
    """Another shape of the same or of another number of elements, sizes that overflow, more or
    fewer dimensions.
    """
    one, _ = _two(header, rng)
    shape = list(header[one]["shape"])
    size = int(np.prod(shape, dtype=object))
    others: tuple[Any, ...] = (
        shape[::-1],
        [size],
        [1, size],
        [size, 1],
        [1, *shape],
        [*shape, 1],
        [],
        [0, size],
        [2**32, 2**32],
        [2**63, 2],
        [2**64, 1],
        [-1, *shape[1:]],
        [size, 0],
        [1] * 40 + [size],
        [1.5, size],
        [str(size)],
        None,
        {},
        [raw("9" * 400)],
    )
    return _with(header, one, shape=others[rng.integers(len(others))]), body


def names(header: Header, body: bytes, rng: np.random.Generator) -> tuple[Header, bytes]:
    """A tensor called otherwise, two exchanged, or one entry under the name of another (the key
    occurs twice).
    """
    one, other = _two(header, rng)
    old, new = _RENAMED[rng.integers(len(_RENAMED))], _RENAMED[rng.integers(len(_RENAMED))]
    free = TEXTS[rng.integers(len(TEXTS))]
    renamed = (
        one.replace(old, new),
        one + ".x",
        one[1:],
        one.upper(),
        str(free),
        one.replace("weight", "default.weight"),
        one.replace("a", "\u0430"),
    )
    choice = rng.random()
    if choice < 0.4:
        mapping = {one: renamed[rng.integers(len(renamed))]}
    elif choice < 0.7:
        mapping = {one: other, other: one}
    else:
        mapping = {one: "@twice:" + other}
    return {mapping.get(name, name): entry for name, entry in header.items()}, body


def entries(header: Header, body: bytes, rng: np.random.Generator) -> tuple[Header, bytes]:
    """An entry left out with or without its bytes, added, given a field more, written as a list,
    or hidden behind its double.
    """
    one, other = _two(header, rng)
    entry = header[one]
    start, stop = entry["data_offsets"]
    choice = int(rng.integers(7))
    if choice == 0:
        return {name: item for name, item in header.items() if name != one}, body
    if choice == 1:  # without its bytes: a smaller file, whole in itself
        moved = {name: item for name, item in header.items() if name != one}
        for name, item in moved.items():
            if "data_offsets" in item and item["data_offsets"][0] >= stop:
                moved[name] = {
                    **item,
                    "data_offsets": [number - (stop - start) for number in item["data_offsets"]],
                }
        return moved, body[:start] + body[stop:]
    if choice == 2:
        return {
            **header,
            one.replace("layers.1", "layers.7"): {
                **entry,
                "data_offsets": [len(body), len(body) + stop - start],
            },
        }, body + body[start:stop]
    if choice == 3:
        return _with(header, one, extra=NUMBERS[rng.integers(len(NUMBERS))]), body
    if choice == 4:
        return {**header, one: [entry["dtype"], entry["shape"], entry["data_offsets"]]}, body
    if choice == 5:
        return {
            "@twice:" + one: {"dtype": "F32", "shape": [2**40], "data_offsets": [7, 3]},
            **header,
        }, body
    return {raw(json.dumps(one).replace("a", "\\u0061")): header[other], **header}, body


def metadata(header: Header, body: bytes, rng: np.random.Generator) -> tuple[Header, bytes]:
    """__metadata__ of every kind."""
    kinds: tuple[Any, ...] = (
        {},
        {"format": "pt"},
        {"a": "{[" * 50},
        {"a": "\\u005b\\"},
        {"a": 1},
        None,
        [],
        "x",
        {"@twice:a": "1", "a": "2"},
        {"a": "\x1b[31m"},
        {"a": "x" * 100_000},
    )
    return {"__metadata__": kinds[rng.integers(len(kinds))], **header}, body


def numbers(header: Header, body: bytes, rng: np.random.Generator) -> tuple[Header, bytes]:
    """The numbers themselves: NaN, infinities, zeros, large ones, noise."""
    one, _ = _two(header, rng)
    start, stop = header[one]["data_offsets"]
    words = (
        b"\0\0\xc0\x7f",
        b"\0\0\x80\x7f",
        b"\0\0\x80\xff",
        b"\0\0\0\0",
        b"\xff\xff\x7f\x7f",
        b"\1\0\0\0",
        b"\xff\xff\xff\xff",
        rng.bytes(4),
    )
    word = words[rng.integers(len(words))]
    if rng.random() < 0.3:
        return header, body[:start] + (word * (stop - start))[: stop - start] + body[stop:]
    at = start + 4 * int(rng.integers(max(1, (stop - start) // 4)))
    return header, (body[:at] + word + body[at + 4 :])[: len(body)]


def tree(header: Header, body: bytes, rng: np.random.Generator) -> tuple[Header, bytes]:
    """Any edit of the header as a JSON document."""
    edits = list(EDITS.values())
    return edits[rng.integers(len(edits))](header, rng), body


def size(header: Header, body: bytes, rng: np.random.Generator) -> tuple[Header, bytes]:
    """Fewer or more bytes of numbers than the header names."""
    cut = int(rng.integers(1, 64))
    return header, body[:-cut] if rng.random() < 0.5 else body + rng.bytes(cut)


Edit = Callable[[Header, bytes, np.random.Generator], tuple[Header, bytes]]
EDITED: dict[str, Edit] = {
    "header offsets": offsets,
    "header types": types,
    "header shapes": shapes,
    "header names": names,
    "header entries": entries,
    "header metadata": metadata,
    "header as JSON": tree,
    "numbers": numbers,
    "size": size,
}


def framed(edit: Edit) -> Mutation:
    """The mutation of a file that this edit is.

    A file without a readable header is damaged as bytes instead.
    """

    def mutation(data: bytes, rng: np.random.Generator) -> bytes:
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            new, body = edit(header, data[8 + int.from_bytes(data[:8], "little") :], rng)
            text = dumps(new)
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
        ):  # of a second edit, of what the first one left
            return set_bytes(data, rng) if data else data
        return struct.pack("<Q", len(text)) + text + body

    return mutation


def length(data: bytes, rng: np.random.Generator) -> bytes:
    """The length of the header: a little off, beyond the file, beyond any file."""
    old = int.from_bytes(data[:8], "little")
    new = (
        old + int(rng.integers(-9, 10)),
        0,
        1,
        2**16,
        len(data),
        len(data) - 8,
        10**8,
        10**8 + 1,
        2**32,
        2**53,
        2**63 - 1,
        2**64 - 1,
    )[rng.integers(12)]
    return struct.pack("<Q", max(0, new)) + data[8:]


def padding(data: bytes, rng: np.random.Generator) -> bytes:
    """Spaces or zeros around the header, which is as long as it says."""
    n = int.from_bytes(data[:8], "little")
    pad = (b" ", b"\n", b"\0", b" " * 1000, b"\xef\xbb\xbf")[rng.integers(5)]
    text = pad + data[8 : 8 + n] if rng.random() < 0.5 else data[8 : 8 + n] + pad
    return struct.pack("<Q", len(text)) + text + data[8 + n :]


MUTATIONS: dict[str, Mutation] = {
    **{name: framed(edit) for name, edit in EDITED.items()},
    "header length": length,
    "header padding": padding,
}


def _two(header: Header, rng: np.random.Generator) -> tuple[str, str]:
    """Two different tensors, if there are two."""
    found = [
        name
        for name, entry in header.items()
        if isinstance(entry, dict) and "data_offsets" in entry
    ]
    order = rng.permutation(len(found))
    return found[order[0]], found[order[-1]]


def _with(header: Header, name: str, **fields: Any) -> Header:
    return {**header, name: {**header[name], **fields}}
