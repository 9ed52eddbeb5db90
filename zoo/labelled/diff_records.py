"""What a record says beside what was measured again, value by value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Comparison:
    """Lines for people: one a difference.

    Two numbers agree if they differ by no more than `tolerance`, of their size where that is above
    1.
    """

    tolerance: float = 0.0
    lines: list[str] = field(default_factory=list)
    compared: int = 0
    largest: float = 0.0
    """The largest difference of two numbers, of their size where that is above 1, whether
    tolerated or not.
    """

    def add(self, where: str, said: Any, found: Any) -> None:
        """Compare two JSON-ready values, and everything in them."""
        if isinstance(said, Mapping) and isinstance(found, Mapping):
            self.same(f"{where}: the fields", sorted(said), sorted(found))
            for name in sorted(said.keys() & found.keys()):
                self.add(f"{where}.{name}", said[name], found[name])
        elif isinstance(said, list | tuple) and isinstance(found, list | tuple):
            self.same(f"{where}: the length", len(said), len(found))
            for number, (one, other) in enumerate(zip(said, found, strict=False)):
                self.add(f"{where}[{number}]", one, other)
        elif _is_number(said) and _is_number(found):
            self.compared += 1
            difference = abs(said - found) / max(1.0, abs(said))
            self.largest = max(self.largest, difference)
            if not difference <= self.tolerance:
                self.differs(where, said, found)
        else:
            self.same(where, said, found)

    def same(self, where: str, said: Any, found: Any) -> None:
        """Compare two values that must be equal."""
        self.compared += 1
        if said != found or isinstance(said, bool) != isinstance(found, bool):  # True == 1
            self.differs(where, said, found)

    def differs(self, where: str, said: Any, found: Any) -> None:
        """Note a difference."""
        self.lines.append(f"{where}: the record says {short(said)}; measured was {short(found)}")

    def join(self, other: Comparison) -> None:
        """Take over what another comparison found."""
        self.lines += other.lines
        self.compared += other.compared
        self.largest = max(self.largest, other.largest)

    def outcome(self) -> str:
        """One line for people."""
        differences = f"{len(self.lines)} differences" if self.lines else "all agree"
        return (
            f"{self.compared} values compared, {differences}, largest difference of two numbers"
            f" {self.largest:.1g}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def short(value: Any) -> str:
    """A value on one line that is not too long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-60:]}"
