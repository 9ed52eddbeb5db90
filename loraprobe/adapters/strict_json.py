"""JSON from a stranger, read strictly.

Python's reader guesses the encoding, keeps the last of two equal keys, takes NaN for a number, and
returns text that no file can be written with (half of a surrogate pair) and objects nested so
deeply that nothing else can walk them. Each of these lets a file say one thing to this reader and
another to the next.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from typing import Any

from ..errors import quoted

MAX_NESTING = 32


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number, no bool, that float64 can hold."""
    # The comparison is exact also for integers that no float can hold.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and bool(abs(value) <= sys.float_info.max)


def read_json(data: bytes, *, finite: bool = True) -> Any:
    """Parse a document: UTF-8 without a mark, each key once, at most MAX_NESTING levels, text that
    can be encoded again.

    Args:
        finite: refuse NaN, infinities and numbers beyond float64.

    Raises:
        ValueError: saying what is wrong with it.
    """
    text = data.decode("utf-8")
    checks: dict[str, Any] = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=_unique, **checks)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_NESTING} levels deep") from None
    if data.count(b"[") + data.count(b"{") > MAX_NESTING and _deeper_than(MAX_NESTING, value):
        raise ValueError(f"it is nested more than {MAX_NESTING} levels deep")
    if (
        "\\ud" in text or "\\uD" in text
    ):  # an escaped surrogate, of which only a pair is a character
        json.dumps(value, ensure_ascii=False).encode()  # raises UnicodeEncodeError, a ValueError
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quoted(repr(twice))} occurs twice in one object")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _deeper_than(levels: int, value: Any) -> bool:
    """Whether lists and objects are nested more deeply.

    Level by level, since a recursion could be too deep itself.
    """
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    return bool(level)
