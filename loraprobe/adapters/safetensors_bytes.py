"""Tensors and metadata of a safetensors file that a stranger sent as bytes.

The safetensors library checks that the byte ranges are whole and do not overlap. It does not mind
an entry that occurs twice (the last one counts, so that two readers may see two adapters), and
parses a header of up to 100 MB; both are refused here before the library sees anything.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import AdapterFormatError
from .strict_json import quoted, read_json

MAX_HEADER_BYTES = 2 << 20
"""About 13,000 tensors. A header is parsed while nothing else runs.

2 MiB take at most a tenth of a second.
"""

_MAX_REMEMBERED = 1 << 14
_ADVICE = "It is damaged, incomplete or no safetensors file."


class TensorFile(NamedTuple):
    """What a safetensors file holds.

    Name -> tensor (a copy), and the text entries of its metadata.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_safetensors(data: bytes) -> TensorFile:
    """Read a whole safetensors file from memory.

    Raises:
        AdapterFormatError: cut short, not safetensors, an entry occurs twice, a header above
            `MAX_HEADER_BYTES`, or a type that PyTorch does not have.
    """
    header = header_of(data)
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise AdapterFormatError(
            f"got bytes that are not a readable safetensors file ({quoted(str(error), 200)})."
            f" {_ADVICE}"
        ) from None
    except (
        KeyError,
        RuntimeError,
    ) as error:  # a type that PyTorch lacks; a shape whose product overflows
        raise AdapterFormatError(
            f"got a tensor that PyTorch cannot hold ({quoted(str(error), 200)}); expected F32, F16,"
            " BF16 or F64 matrices"
        ) from None
    return TensorFile(tensors, dict(header.get("__metadata__", {})))


def header_of(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file as what its JSON says.

    Nobody has checked the byte ranges in it.

    Raises:
        AdapterFormatError: cut short, above `MAX_HEADER_BYTES`, an entry occurs twice, or it is not
            readable.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise AdapterFormatError(
            f"got {len(data)} bytes that announce a header of {length} bytes. {_ADVICE}"
        )
    if length > MAX_HEADER_BYTES:
        raise AdapterFormatError(
            f"got a safetensors header of {length} bytes; expected at most {MAX_HEADER_BYTES}"
        )
    text = data[8 : 8 + length]
    return _parsed_before(text) if length <= _MAX_REMEMBERED else _parsed(text)


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        header = read_json(text)
    except ValueError as error:
        raise AdapterFormatError(
            f"got a safetensors header that is not readable JSON ({quoted(str(error), 200)})."
            f" {_ADVICE}"
        ) from None
    if not isinstance(header, dict):
        raise AdapterFormatError(
            f"got a safetensors header that is a JSON {type(header).__name__}; expected an object."
            f" {_ADVICE}"
        )
    unprintable = next((name for name in header if not name.isprintable()), None)
    if unprintable is not None:
        raise AdapterFormatError(
            f"got a tensor named {quoted(unprintable)}; expected printable names. {_ADVICE}"
        )
    return header


_parsed_before = lru_cache(maxsize=64)(
    _parsed
)  # slices for one probe have the same header, again and again
