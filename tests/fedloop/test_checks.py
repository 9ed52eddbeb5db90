"""What counts as a number, and options of a dataclass by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fedloop.checks import check_fields, integer, is_integer, is_number, named, number, one_of
from fedloop.errors import ConfigError


@dataclass(frozen=True)
class Pump:
    size: int
    speed: float = 1.0
    mode: str = "soft"

    def __post_init__(self) -> None:
        speed = number(above=0, at_most=2)
        check_fields(self, {"size": integer(1), "speed": speed, "mode": one_of(("soft", "hard"))})


KINDS: dict[str, type[Pump]] = {"pump": Pump}


@pytest.mark.parametrize("value", [True, None, "1", 1.0, math.nan, [1], np.float64(1)])
def test_what_is_no_integer(value: Any) -> None:
    assert not is_integer(value)
    assert is_integer(np.int64(3), 3)
    assert not is_integer(2, 3)


@pytest.mark.parametrize("value", [True, None, "1", math.nan, math.inf, 10**400, 1j])
def test_what_is_no_number(value: Any) -> None:
    assert not is_number(value)
    assert is_number(np.float32(0.5))
    assert is_number(-3)


def test_options_by_name_are_plain_and_checked() -> None:
    made = named("device", "pump", KINDS, {"size": np.int64(2), "speed": np.array(0.5)})
    assert made == Pump(2, 0.5)
    assert type(made.size) is int


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("pomp", {}, "got device 'pomp'; expected one of pump"),
        (["pump"], {}, "got device"),
        ("pump", {}, "device 'pump' needs the option size"),
        ("pump", {"size": 1, "pace": 2}, "no option 'pace'; expected any of size, speed, mode"),
        ("pump", {"size": 0}, "Pump.size: got 0; expected a whole number of at least 1"),
        ("pump", {"size": 1, "speed": 3}, "expected a finite number above 0 and at most 2"),
        ("pump", {"size": 1, "mode": ["soft"]}, "expected one of soft, hard"),
        ("pump", {"size": 1, "mode": True}, "expected one of soft, hard"),
    ],
)
def test_what_is_not_valid_is_named(name: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        named("device", name, KINDS, values)
