"""The fields of a config.json that nobody has checked yet, each of the type that is expected."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from ..adapters.strict_json import is_finite_number
from ..calibration import Calibration
from ..errors import ProbeFormatError, quoted

Read = TypeVar("Read")


def optional(read: Callable[[Any, str], Read], value: Any, where: str) -> Read | None:
    """What `read` makes of a value; None where it is null."""
    return None if value is None else read(value, where)


def object_of(value: Any, where: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise ProbeFormatError(f"{where}: got {quoted(value)}; expected a JSON object")
    return value


def fields_of(value: Any, fields: Collection[str], where: str | Path) -> dict[str, Any]:
    """A JSON object with exactly these fields."""
    values = object_of(value, str(where))
    if set(values) != set(fields):
        missing = sorted(set(fields) - set(values))
        unknown = sorted(set(values) - set(fields))
        raise ProbeFormatError(
            f"{where}: missing fields {quoted(missing)}, unknown fields {quoted(unknown)}; expected"
            " those of this format version"
        )
    return values


def text_of(value: Any, where: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ProbeFormatError(f"{where}: got {quoted(value)}; expected text")
    return value


def count_of(value: Any, where: str) -> int:
    """A whole number of at least 0."""
    if type(value) is not int or value < 0:  # True is an int to isinstance
        raise ProbeFormatError(
            f"{where}: got {quoted(value)}; expected a whole number, not negative"
        )
    return value


def number_of(value: Any, where: str) -> float:
    """A finite number."""
    if not is_finite_number(value):
        raise ProbeFormatError(f"{where}: got {quoted(value)}; expected a finite number")
    return float(value)


def calibration_of(value: Any, where: str) -> Calibration:
    """A calibration, after all of its fields were checked."""
    values = fields_of(value, Calibration.__dataclass_fields__, where)
    knots = {}
    for name in ("inputs", "outputs"):
        if not isinstance(values[name], list):
            raise ProbeFormatError(
                f"{where}.{name}: got {quoted(values[name])}; expected a list of numbers"
            )
        knots[name] = tuple(number_of(number, f"{where}.{name}") for number in values[name])
    return Calibration(
        values["method"],
        knots["inputs"],
        knots["outputs"],
        text_of(values["unit"], f"{where}.unit"),
        count_of(values["rows"], f"{where}.rows"),
        count_of(values["groups"], f"{where}.groups"),
    )
