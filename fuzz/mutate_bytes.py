"""Damage that knows nothing of the format: what disks, transfers and the usual fuzzers do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Mutation = Callable[[bytes, np.random.Generator], bytes]

_WORDS = (
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\x7f",
    b'"',
    b"{",
    b"}",
    b",",
)


def flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four bits flipped."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        out[_at(out, rng)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def set_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four bytes set to others, or a word of trouble written over them."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, word = (
            _at(out, rng),
            _WORDS[rng.integers(len(_WORDS))] if rng.random() < 0.5 else rng.bytes(1),
        )
        out[at : at + len(word)] = word
    return bytes(out[: len(data)])


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    """The beginning only."""
    return data[: _at(data, rng)]


def extend(data: bytes, rng: np.random.Generator) -> bytes:
    """More bytes at the end: zeros, noise, or the file once more."""
    more = (bytes(int(rng.integers(1, 64))), rng.bytes(int(rng.integers(1, 64))), data, b" \n")
    return data + more[rng.integers(len(more))]


def delete(data: bytes, rng: np.random.Generator) -> bytes:
    """A chunk cut out."""
    start, stop = _chunk(data, rng)
    return data[:start] + data[stop:]


def duplicate(data: bytes, rng: np.random.Generator) -> bytes:
    """A chunk there twice in a row."""
    start, stop = _chunk(data, rng)
    return data[:stop] + data[start:]


def splice(data: bytes, rng: np.random.Generator) -> bytes:
    """A chunk copied over another place, or inserted there."""
    start, stop = _chunk(data, rng)
    at = _at(data, rng)
    return data[:at] + data[start:stop] + data[at + (stop - start) * int(rng.integers(2)) :]


def swap(data: bytes, rng: np.random.Generator) -> bytes:
    """Two neighbouring chunks exchanged."""
    start, stop = _chunk(data, rng)
    middle = int(rng.integers(start, stop + 1))
    return data[:start] + data[middle:stop] + data[start:middle] + data[stop:]


MUTATIONS: dict[str, Mutation] = {
    "flip bits": flip_bits,
    "set bytes": set_bytes,
    "truncate": truncate,
    "extend": extend,
    "delete chunk": delete,
    "duplicate chunk": duplicate,
    "splice": splice,
    "swap chunks": swap,
}


def _at(data: bytes | bytearray, rng: np.random.Generator) -> int:
    return int(rng.integers(max(1, len(data))))


def _chunk(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    """Half of the chunks are a few bytes, half of them up to all of it."""
    start = _at(data, rng)
    length = int(rng.integers(1, 17 if rng.random() < 0.5 else max(2, len(data))))
    return start, min(len(data), start + length)
