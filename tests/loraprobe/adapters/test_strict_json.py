"""The strict reader takes what every reader understands alike, and the quoted text is fit for a
terminal.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraprobe.adapters.strict_json import MAX_NESTING, read_json
from loraprobe.errors import quoted

TEXT = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)


@given(VALUES, st.booleans())
@settings(max_examples=150, deadline=None)
def test_plain_json_is_what_python_reads(value: Any, ascii_only: bool) -> None:
    found = read_json(json.dumps(value, ensure_ascii=ascii_only).encode())
    assert found == value
    assert json.dumps(found) == json.dumps(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' occurs twice"),
        ('[{"b": {"\\u0061": 1, "a": 2}}]', "the key 'a' occurs twice"),
        ("NaN", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("1e400", "1e400 is not a finite number"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"\\uDFFF": 1}', "surrogates not allowed"),
        ("[" * (MAX_NESTING + 1) + "]" * (MAX_NESTING + 1), "nested more than 32"),
        ('{"a":' * (MAX_NESTING + 1) + "1" + "}" * (MAX_NESTING + 1), "nested more than 32"),
        ("[" * 200_000 + "]" * 200_000, "nested more than 32"),
        ("9" * 5000, "4300 digits"),
        ("\ufeff{}", "BOM"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
        ("01", "Extra data"),
        ("'a'", "Expecting value"),
        ('"a\nb"', "control character"),
    ],
    ids=repr,
)
def test_what_readers_disagree_about_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        read_json(text.encode("utf-8", "surrogatepass"))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be", "utf-8-sig"])
def test_only_utf_8_is_read(encoding: str) -> None:
    data = '{"a": 1}'.encode(encoding)
    assert json.loads(data) == {"a": 1}  # Python guesses
    with pytest.raises(ValueError, match=r"utf-8|line 1|BOM"):
        read_json(data)
    with pytest.raises(ValueError, match="utf-8"):
        read_json(b'"\xff"')


def test_as_deep_as_allowed_and_a_pair_of_surrogates_are_read() -> None:
    assert read_json(b"[" * MAX_NESTING + b"]" * MAX_NESTING)
    assert read_json(b"[" + b"[]," * 10_000 + b"[]]")  # wide is not deep
    assert read_json(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_numbers_that_are_not_finite_are_read_if_that_is_asked_for() -> None:
    assert str(read_json(b"[NaN, Infinity, 1e400]", finite=False)) == "[nan, inf, inf]"
    with pytest.raises(ValueError, match="twice"):
        read_json(b'{"a": NaN, "a": 1}', finite=False)


@given(st.text(), st.integers(1, 80))
@settings(max_examples=200, deadline=None)
def test_quoted_text_can_be_printed_anywhere_and_is_short(text: str, limit: int) -> None:
    shown = quoted(text, limit)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert len(shown) <= 10 * limit + 3
    if text.isprintable() and len(text) <= limit:
        assert shown == text
