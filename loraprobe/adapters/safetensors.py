"""What the safetensors library does not check of a header: that nothing is named twice.

The library (0.5 to 0.8) refuses a header that is longer than the file, byte ranges that overlap,
leave a gap or do not reach the end of the file, and unknown types. Of two entries with one name it
keeps the last
without a word, and the format forbids them: two readers may see two different adapters in one file.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from collections.abc import Mapping
from mmap import mmap
from pathlib import Path

import numpy as np

from ..errors import AdapterFormatError
from .strict_json import quoted, read_json

MAX_HEADER_BYTES = 16 << 20
"""The library allows 100 MB, which take seconds to parse.

16 MiB name a hundred thousand tensors.
"""


def check_header(
    data: bytes | bytearray | memoryview | mmap,
    tensors: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Raise unless the header of a safetensors file, or of the body of a request, is whole and
    unambiguous and its names are printable.

    This does not replace the library's own checks: read the same bytes with it too, before or
    after.

    Args:
        data: the file from its first byte; nothing after the header is looked at.
        tensors: how many tensors the library found in it, if that is known: then a usual header is
            not parsed here.
        metadata: what the library found under __metadata__, along with `tensors`.

    Raises:
        AdapterFormatError: cut short, longer than MAX_HEADER_BYTES, not a JSON object, a key twice,
            or a name that is not printable.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise AdapterFormatError(
            f"got a safetensors header of {length} bytes in {len(data)} bytes; expected it whole"
            f" and at most {MAX_HEADER_BYTES} bytes. It is damaged or incomplete: fetch it again."
        )
    header = bytes(data[8 : 8 + length])
    if tensors is not None and _is_usual(header, tensors, metadata):
        return
    try:
        entries = read_json(header)
    except ValueError as error:
        raise AdapterFormatError(
            f"the safetensors header is not unambiguous JSON ({error}); two readers may see two"
            " adapters in it. Do not use it."
        ) from None
    if not isinstance(entries, dict):
        raise AdapterFormatError(
            "the safetensors header is not a JSON object. It is damaged: fetch it again."
        )
    for name in entries:
        if not name.isprintable():
            raise AdapterFormatError(
                f"the safetensors header names the tensor {quoted(name, 200)}; expected printable"
                " text. Do not use it."
            )


def check_file_header(
    path: Path, tensors: int | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """`check_header` of a file, of which only the header is read.

    Raises:
        AdapterFormatError: see `check_header`.
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        start = file.read(8)
        check_header(
            start + file.read(min(int.from_bytes(start, "little"), MAX_HEADER_BYTES)),
            tensors,
            metadata,
        )


def _is_usual(header: bytes, tensors: int, metadata: Mapping[str, str] | None) -> bool:
    """Whether a header holds nothing but what the library found in it, each thing once, in the
    usual form; told by counting alone.

    Without escapes, quotes stand at the ends of strings only. An entry that the library takes is an
    object with two lists and five strings, or a list with two more and two strings. So with as many
    braces as there are entries that are objects, no entry is a list; with two lists for each entry
    there is no further entry; and then a key twice, or one more, would show as two quotes more.
    """
    if not header.isascii() or b"\\" in header or b"\x7f" in header:
        return False
    marks = np.frombuffer(header, np.uint8)  # bytes.count is slower where there is much to count
    found = 0 if metadata is None else 1
    strings = 5 * tensors + found + 2 * len(metadata or ())
    counts = (("{", 1 + tensors + found), ("[", 2 * tensors), ('"', 2 * strings))
    return all(np.count_nonzero(marks == ord(mark)) == expected for mark, expected in counts)
