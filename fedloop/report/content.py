"""What a page consists of: plain texts and numbers, which the template escapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from loraprobe.errors import require

from .drawing import plain

LONGEST = 600  # characters of one text that a client may have chosen


@dataclass(frozen=True)
class Paragraph:
    """Words: "note" is small, "lead" opens the page, "banner" is not to be missed."""

    kind: ClassVar[str] = "paragraph"
    words: str
    style: str = "note"


@dataclass(frozen=True)
class Table:
    """A table that scrolls where it is long.

    Attributes:
        columns: a letter a column: "l" and "r" for left- and right-aligned, "n" for left-aligned on
            one line, "h" for a heading of its row.
        head: the columns' names; none for no head.
        dots: colours, one a row, of a dot before the first cell.
    """

    kind: ClassVar[str] = "table"
    columns: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    dots: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A figure below its title and what to know about it; `svg` is put in as it is."""

    kind: ClassVar[str] = "figure"
    title: str
    note: str
    svg: str = field(repr=False)


Block = Paragraph | Table | Figure
Section = tuple[str, Iterable[Block]]


def cut(value: str, longest: int) -> str:
    """The text, or its beginning and how much is missing."""
    more = len(value) - longest
    return value if more <= 0 else f"{value[:longest]} ... ({more} more characters)"


def number(value: float) -> str:
    """Three decimals; a dash for NaN, which stands for a number that there is not."""
    return f"{value:.3f}" if math.isfinite(value) else "–"


def percent(share: float) -> str:
    """A share with one decimal, or two digits below one per cent; a dash for NaN."""
    if not math.isfinite(share):
        return "–"
    return f"{100 * share:.{'1f' if share >= 0.01 else '2g'}}\u00a0%"


def render(configuration: str, **parts: Any) -> str:
    """The page of these parts; page.html.j2 has their names.

    Args:
        configuration: shown in full, however long.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    require("jinja2", "figures", "the report of a run")
    import jinja2
    from markupsafe import escape

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedloop", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        configuration=escape(configuration), **parts
    )


def _shown(value: Any) -> Any:
    """Every text of the page, so that nothing that writes one can forget to clean it."""
    if hasattr(value, "__html__") or not isinstance(value, str):
        return value
    return "\n".join(plain(line) for line in cut(value, LONGEST).split("\n"))
