"""Safetensors from a stranger, as files and as bytes, read without torch.

The safetensors library refuses a header that is longer than the file, byte ranges that overlap,
leave a gap or do not reach the end of the file, and unknown types. Of two entries with one name it
keeps the last without a word, and it reads an entry that is a list; the format forbids both, and
two readers may see two different adapters in one file. So the header is read strictly here first.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from ..errors import AdapterFormatError, UnsupportedAdapterError, quoted
from ..limits import TENSOR_HEADER  # the library allows 100 MB, which take seconds to parse
from .formats import START, what_is
from .pair import Array, LazyTensor
from .peft import tool_of
from .strict_json import read_json

_MAX_REMEMBERED = 1 << 14
_ADVICE = "It is damaged, incomplete or no safetensors file: fetch it again."
# bfloat16 is the upper half of a float32, which NumPy has no type for.
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


class TensorFile(NamedTuple):
    """What a safetensors file holds.

    Attributes:
        tensors: name -> array of float32 or float64, and of other types as they are.
        metadata: its text entries.
    """

    tensors: dict[str, Array]
    metadata: dict[str, str]


class SafetensorsFile(Mapping[str, LazyTensor]):
    """The tensors of one .safetensors file: names, types and shapes now, numbers when asked for.

    The file is opened anew for every tensor, and has to be the one that was checked: its identity,
    size and time of change are compared.

    Raises:
        AdapterFormatError: it is not a whole, unambiguous safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb", buffering=0) as file:
                self._identity = _identity(file.fileno())
                start = file.read(8)
                length = int.from_bytes(start, "little")
                header = file.read(min(length, TENSOR_HEADER))
            self._entries = header_of(start + header, self._identity[2])
            with safe_open(path, framework="numpy"):
                pass  # it checks byte ranges, shapes and types
        except (SafetensorError, OSError) as error:
            reason = quoted(str(error), 200)
            raise AdapterFormatError(
                f"{path} is not a readable safetensors file ({reason}). {_ADVICE}"
            ) from None
        except AdapterFormatError as error:
            raise AdapterFormatError(f"{path}: {error}") from None
        self._entries.pop("__metadata__", None)
        self._start = 8 + length

    def __getitem__(self, name: str) -> LazyTensor:
        entry = self._entries[name]
        if entry["dtype"] not in _STORED:
            raise AdapterFormatError(
                f"{self._path}, {quoted(name, 200)}: got dtype {entry['dtype']}; expected F32, F16,"
                " BF16 or F64"
            )
        return LazyTensor(tuple(entry["shape"]), partial(self._read, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _read(self, name: str) -> Array:
        entry = self._entries[name]
        start, _ = entry["data_offsets"]
        count = math.prod(entry["shape"])
        numbers: Array = np.empty(count, _STORED[entry["dtype"]])
        try:
            with self._path.open("rb") as file:
                file.seek(self._start + start)
                read = file.readinto(numbers.data)
                unchanged = _identity(file.fileno()) == self._identity
        except OSError as error:
            raise AdapterFormatError(f"{self._path} cannot be read any more ({error})") from None
        if not unchanged or read != numbers.nbytes:
            raise AdapterFormatError(
                f"{self._path} was written to after its header was checked; load the adapter anew"
            )
        return _shaped(name, _floats(numbers, entry["dtype"]), entry["shape"])


def read_safetensors(data: bytes) -> TensorFile:
    """Read a whole safetensors file from memory.

    Raises:
        AdapterFormatError: cut short, not safetensors, an entry occurs twice, a header above
            `TENSOR_HEADER`, or a type that is no number of IEEE 754 or bfloat16.
        UnsupportedAdapterError: a tensor of such a type has a name of another tool.
    """
    header = header_of(data)
    try:
        tensors = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise AdapterFormatError(
            f"got bytes that are not a readable safetensors file ({quoted(str(error), 200)})."
            f" {_ADVICE}"
        ) from None
    arrays = {}
    for name, view in tensors:
        if view["dtype"] not in _STORED:
            if (tool := tool_of(name)) is not None:  # kohya's alpha is an integer, say
                raise UnsupportedAdapterError(f"{quoted(name, 200)}: {tool}")
            raise AdapterFormatError(
                f"{quoted(name, 200)}: got dtype {view['dtype']}; expected F32, F16, BF16 or F64"
            )
        numbers = _floats(np.frombuffer(view["data"], _STORED[view["dtype"]]), view["dtype"])
        arrays[name] = _shaped(name, numbers, view["shape"])
    return TensorFile(arrays, dict(header.get("__metadata__", {})))


def header_of(data: bytes | memoryview, size: int | None = None) -> dict[str, Any]:
    """The header of a safetensors file as its JSON says, each entry once and printable.

    Nobody has checked the byte ranges in it: read the same bytes with the library too.

    Args:
        data: the file from its first byte; nothing after the header is looked at.
        size: bytes of the whole file, where `data` is only its start.

    Raises:
        AdapterFormatError: cut short, longer than TENSOR_HEADER, an entry twice, or one that is
            not an object, or a name that cannot be printed.
    """
    length = int.from_bytes(data[:8], "little")
    whole = len(data) if size is None else size
    if what := what_is(bytes(data[:START])):
        raise AdapterFormatError(f"got what is {what}")
    if len(data) < 8 or length > whole - 8:
        raise AdapterFormatError(
            f"got {whole} bytes that announce a header of {length} bytes. {_ADVICE}"
        )
    if length > TENSOR_HEADER:
        raise AdapterFormatError(
            f"got a safetensors header of {length} bytes; expected at most {TENSOR_HEADER}"
        )
    text = bytes(data[8 : 8 + length])
    return dict(_parsed_before(text) if length <= _MAX_REMEMBERED else _parsed(text))


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        header = read_json(text)
    except ValueError as error:
        raise AdapterFormatError(
            f"got a safetensors header that is not unambiguous JSON ({quoted(str(error), 200)})."
            f" {_ADVICE}"
        ) from None
    if not isinstance(header, dict):
        raise AdapterFormatError(
            f"got a safetensors header that is a JSON {type(header).__name__}; expected an object."
            f" {_ADVICE}"
        )
    if header.get("__metadata__", {}) is None:
        del header["__metadata__"]  # so MLX writes that there is none, and the library reads it
    for name, entry in header.items():
        if not name.isprintable():
            raise AdapterFormatError(
                f"got a tensor named {quoted(name, 200)}; expected printable names. {_ADVICE}"
            )
        if not isinstance(entry, dict):
            raise AdapterFormatError(
                f"got an entry {quoted(name, 200)} that is a JSON {type(entry).__name__}; expected"
                f" an object. {_ADVICE}"
            )
    return header


# Slices for one probe have the same header, again and again.
_parsed_before = lru_cache(maxsize=64)(_parsed)


def _floats(numbers: Array, dtype: str) -> Array:
    """Stored numbers (n,) as float32, or float64 where they are that wide."""
    if dtype == "BF16":
        wide = numbers.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return numbers.astype(
        np.float32 if dtype == "F16" else numbers.dtype.newbyteorder("="), copy=False
    )


def _shaped(name: str, numbers: Array, shape: list[int]) -> Array:
    try:
        return numbers.reshape(shape)
    except ValueError:  # empty, and yet more than memory can address in one direction
        raise AdapterFormatError(
            f"{quoted(name, 200)}: got shape {quoted(str(shape))}; expected a matrix"
        ) from None


def _identity(file: int) -> tuple[int, int, int, int]:
    """Device, number, size and time of change of an open file."""
    status = os.fstat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
