"""How tables are written: Markdown, means with their spread, names of cells."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = rows
    return (
        "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)])
        + "\n"
    )


def spread(values: Sequence[float], scale: float = 100) -> str:
    """Mean ± standard deviation; one value has no deviation, none is a dash."""
    if not values:
        return "-"
    digits = 1 if scale == 100 else 3
    deviation = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{deviation}"


def attack_name(malicious: int, share: float) -> str:
    """What a table calls an attack."""
    return f"{malicious} of 10, {share:.0%} poison" if malicious else "0 of 10"
