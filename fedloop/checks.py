"""What a value has to be: checks of numbers, and of the fields of frozen dataclasses of options."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

from .errors import ConfigError, FedloopError, OptionError

Options = TypeVar("Options")


@dataclass(frozen=True)
class Validity:
    """Which values of a field are valid.

    Attributes:
        holds: value -> whether it is.
        expected: the same in words, for a message.
    """

    holds: Callable[[Any], bool]
    expected: str


def is_integer(value: Any, low: int | None = None) -> bool:
    """Whether a value is an integer, not a bool, of at least `low`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        return False
    return low is None or int(value) >= low


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, not a bool."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def is_share(value: Any) -> bool:
    """Whether a value is a number in [0, 1], not a bool."""
    return is_number(value) and 0 <= value <= 1


def integer(low: int) -> Validity:
    """An integer of at least `low`."""
    return Validity(lambda value: is_integer(value, low), f"a whole number of at least {low}")


def number(
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Validity:
    """A finite number within these bounds."""
    bounds = {"above": above, "of at least": at_least, "at most": at_most, "below": below}
    stated = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]

    def holds(value: Any) -> bool:
        return (
            is_number(value)
            and (above is None or value > above)
            and (at_least is None or value >= at_least)
            and (at_most is None or value <= at_most)
            and (below is None or value < below)
        )

    return Validity(holds, " ".join(["a finite number", " and ".join(stated)]).strip())


def one_of(valid: Collection[Any]) -> Validity:
    """One of these values, of the same type."""
    return Validity(
        lambda value: any(type(value) is type(choice) and value == choice for choice in valid),
        f"one of {', '.join(map(str, valid))}",
    )


def boolean() -> Validity:
    """A bool."""
    return Validity(lambda value: isinstance(value, bool), "true or false")


def or_none(validity: Validity) -> Validity:
    """None, or what is valid anyhow."""
    return Validity(
        lambda value: value is None or validity.holds(value), f"None or {validity.expected}"
    )


def check_fields(
    owner: Any, valid: Mapping[str, Validity], error: type[FedloopError] = ConfigError
) -> None:
    """Check every field of a dataclass.

    Raises:
        ConfigError: (or `error`) a value is not valid; the message names the field.
    """
    for field in fields(owner):
        got = getattr(owner, field.name)
        if not valid[field.name].holds(got):
            raise error(
                f"{type(owner).__name__}.{field.name}: got {got!r}; expected"
                f" {valid[field.name].expected}"
            )


class Checked:
    """A frozen dataclass of options whose fields are checked when it is made, by `valid`.

    Raises:
        OptionError: a value is not valid.
    """

    valid: ClassVar[Mapping[str, Validity]]

    def __post_init__(self) -> None:
        check_fields(self, self.valid, OptionError)


def checked_options(name: str, options: Any) -> dict[str, Any]:
    """Options that a caller gives as a dict, {} for None.

    Raises:
        ConfigError: they are no mapping with text for keys.
    """
    options = {} if options is None else options
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ConfigError(f"{name}: got {options!r}; expected a dict of option name -> value")
    return dict(options)


def check_names(
    what: str,
    names: Iterable[str],
    valid: Sequence[str],
    error: type[FedloopError] = ConfigError,
) -> None:
    """Raise where a name is none of the valid ones; the message begins with `what`."""
    if unknown := sorted(set(names) - set(valid)):
        raise error(
            f"{what} {', '.join(map(repr, unknown))}; expected any of {', '.join(valid) or 'none'}"
        )


def named(
    what: str,
    name: Any,
    kinds: Mapping[str, type[Options]],
    values: Mapping[str, Any],
    error: type[FedloopError] = ConfigError,
) -> Options:
    """The dataclass of this name with these fields, NumPy's numbers among them made Python's.

    Args:
        what: what is named, for messages.
        kinds: name -> its dataclass.
        values: field -> value; the others have their defaults.

    Raises:
        ConfigError: (or `error`) no such name or field, a field missing, or a value not valid.
    """
    if not isinstance(name, str) or name not in kinds:
        raise error(f"got {what} {name!r}; expected one of {', '.join(kinds)}")
    options = fields(kinds[name])  # type: ignore[arg-type]  # each is a dataclass
    valid = [option.name for option in options]
    check_names(f"{what} {name!r} has no option", values, valid, error)
    required = [option.name for option in options if option.default is MISSING]
    missing = [field for field in required if field not in values]
    if missing:
        raise error(f"{what} {name!r} needs the option {', '.join(missing)}")
    return kinds[name](**{field: plain(value) for field, value in values.items()})


def plain(value: Any) -> Any:
    """NumPy's numbers, and arrays and tensors without a dimension, as Python's; anything else as it
    is.
    """
    if isinstance(value, str | bytes) or getattr(value, "ndim", None) != 0:
        return value
    try:
        return value.item()
    except (AttributeError, RuntimeError):  # a tensor without data
        return value


def whole(value: Any) -> Any:
    """A whole number of any type, 40.0 among them, as an int; anything else as it is."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral | float):
        return value
    return int(value) if isinstance(value, Integral) or value.is_integer() else value
