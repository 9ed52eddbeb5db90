"""Records are one line of JSON, and lines that are none are refused."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest

from fedloop.defense.types import RoundRecord
from fedloop.errors import StateError

FULL = RoundRecord(
    round=3,
    scores={"c0": (0.1, 1 / 3), "c1": ()},
    factors={"c0": 0.5, "c1": 0.0},
    weights={"c0": 1.0, "c1": 0.0},
    reasons={"c1": 'missing: "ü"\n'},
    num_examples={"c0": 7},
    status={"c0": "benign"},
    skipped=True,
    losses={"c0": 1e-300},
    seconds={"train": 0.25},
    bytes={"update": 2**40},
    metrics={"refusal_rule": 0.125},
    note="skipped: nobody",
)


def test_a_record_is_one_line_and_comes_back() -> None:
    line = FULL.to_json()
    assert "\n" not in line
    assert RoundRecord.from_json(line) == FULL
    assert RoundRecord.from_json(RoundRecord(1, {}, {}, {}).to_json()) == RoundRecord(1, {}, {}, {})
    assert RoundRecord.from_json(line).scores["c0"] == (0.1, 1 / 3)
    assert RoundRecord.from_json(line.replace("0.125", "0.25")) != FULL  # negative control
    assert json.loads(line).keys() == {field.name for field in fields(RoundRecord)}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "[]",
        "3",
        "{}",
        '{"scores": 3}',
        '{"scores": {}}',
        '{"scores": {"c": 3}}',
        FULL.to_json()[:-1],
    ],
)
def test_what_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(StateError, match="not a round record"):
        RoundRecord.from_json(line)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(StateError, match="label"):
        RoundRecord.from_json(json.dumps({**json.loads(FULL.to_json()), "label": 1}))


def test_what_json_cannot_hold_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        RoundRecord(1, {"c": (math.nan,)}, {}, {}).to_json()
