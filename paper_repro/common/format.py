"""How tables are written: rows of results chosen, Markdown, means with their spread, names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import binomtest

from zoo.markers import filled
from zoo.markers import markdown as markdown

Row = dict[str, Any]


def where(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """The rows in which every field has this value; a missing field counts as None."""
    return [row for row in rows if all(row.get(name) == fields[name] for name in fields)]


def distinct(rows: Iterable[Row], name: str) -> list[Any]:
    """The values of a field, each once, in their order."""
    return list(dict.fromkeys(row[name] for row in rows))


def spread(values: Sequence[float], scale: float = 100) -> str:
    """Mean ± standard deviation; one value has no deviation, none is a dash."""
    if not values:
        return "-"
    digits = 1 if scale == 100 else 3
    deviation = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{deviation}"


def area(row: Row) -> str:
    """AUROC with its interval."""
    low, high = row["auroc_ci"]
    return f"{row['auroc']:.2f} [{low:.2f}, {high:.2f}]"


def attack_name(malicious: int, share: float) -> str:
    """What a table calls an attack."""
    return f"{malicious} of 10, {share:.0%} poison" if malicious else "0 of 10"


def share_of(count: int, n: int) -> str:
    """A rate with its Clopper-Pearson interval."""
    found = binomtest(count, n).proportion_ci(method="exact")
    return f"{count / n:.0%} [{found.low:.0%}, {found.high:.0%}]"


def page_with(page: Path, tables: Mapping[str, str]) -> str:
    """The page's text with every table between its markers made anew."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = filled(text, name, table, "paper_repro.tables")
    return text
