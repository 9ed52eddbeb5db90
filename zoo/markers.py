"""Tables that programs write into pages, between two markers."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(rows: Sequence[str | Sequence[object]]) -> str:
    """A table; the first row is its head. A row is its cells, or a text with them between bars."""
    head, *body = [row if isinstance(row, str) else " | ".join(map(str, row)) for row in rows]
    rule = " | ".join(["---"] * (head.count(" | ") + 1))
    return "".join(f"| {row} |\n" for row in (head, rule, *body))


def table(rows: Sequence[str | Sequence[object]]) -> str:
    """Such a table without the end of its last line."""
    return markdown(rows).rstrip("\n")


def filled(text: str, name: str, table: str, module: str) -> str:
    """The text with what stands between a table's two markers replaced.

    Args:
        text: of the page; module: the one that writes the table, which its markers name.

    Raises:
        ValueError: the text does not hold both markers, once each.
    """
    start = f"<!-- {name}: written by python -m {module} -->\n"
    end = f"<!-- end of {name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(
            f"expected one pair of markers {start.strip()} and {end}; found {text.count(start)} and"
            f" {text.count(end)}"
        )
    before, _, rest = text.partition(start)
    return f"{before}{start}{table}\n{end}{rest.partition(end)[2]}"
