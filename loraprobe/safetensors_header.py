"""What the safetensors library does not check of a header: that no tensor is named twice.

The library (0.5 to 0.8) refuses a header that is longer than the file, byte ranges that overlap, leave a gap
or do not reach the end of the file, and unknown types. Of two entries with one name it keeps the last
without a word, and the format forbids them: two readers may see two different adapters in one file.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from .errors import AdapterFormatError
from .strict_json import quoted

MAX_HEADER_BYTES = 16 << 20
"""The library allows 100 MB, which take seconds to parse; 16 MiB name a hundred thousand tensors."""


def check_header(data: bytes | bytearray | memoryview | mmap, tensors: int | None = None) -> None:
    """Raise unless the header of a safetensors file, or of the body of a request, is whole and names every tensor once, in printable text.

    This does not replace the library's own checks: read the same bytes with it too, before or after.

    Args:
        data: the file from its first byte; nothing after the header is looked at.
        tensors: how many tensors the library found in it, if that is known: then nothing is parsed here as a rule.

    Raises:
        AdapterFormatError: cut short, longer than MAX_HEADER_BYTES, not a JSON object, or a name occurs twice or is not printable.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise AdapterFormatError(
            f"got a safetensors header of {length} bytes in {len(data)} bytes; expected it whole and at most {MAX_HEADER_BYTES} bytes. "
            "It is damaged or incomplete: fetch it again."
        )
    header = bytes(data[8 : 8 + length])
    if tensors is not None and _is_plain(header, tensors):
        return
    try:
        pairs = json.loads(header.decode("utf-8"), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"the safetensors header is not readable JSON ({error}). It is damaged: fetch it again.") from None
    if not isinstance(pairs, _Pairs):
        raise AdapterFormatError("the safetensors header is not a JSON object. It is damaged: fetch it again.")
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen or not name.isprintable():
            fault = "twice" if name in seen else "in characters that cannot be printed"
            raise AdapterFormatError(
                f"the safetensors header names the tensor {quoted(name, 200)} {fault}; expected every name once, in printable text. "
                "Two readers may see two adapters in it: do not use it."
            )
        seen.add(name)


def check_file_header(path: Path, tensors: int | None = None) -> None:
    """`check_header` of a file, of which only the header is read.

    Raises:
        AdapterFormatError: see `check_header`.
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        start = file.read(8)
        check_header(start + file.read(min(int.from_bytes(start, "little"), MAX_HEADER_BYTES)), tensors)


def _is_plain(header: bytes, tensors: int) -> bool:
    """Whether a header in which the library found that many tensors can neither repeat a name nor hide one in escapes.

    An entry is an object or a list, and holds two lists; a bracket that opens something cannot be escaped. So a second entry of one name
    shows as three brackets more, and brackets inside names or metadata only add to them.
    """
    if not header.isascii() or b"\\" in header or b"\x7f" in header:
        return False
    opened = np.count_nonzero((np.frombuffer(header, np.uint8) | 0x20) == ord("{"))  # "[" and "{" differ in that bit; bytes.count is slower
    return bool(opened < 1 + 3 * (tensors + 1))


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, in order; a plain list is a JSON array."""

    def __init__(self, pairs: Iterable[tuple[str, Any]]) -> None:
        super().__init__(pairs)
