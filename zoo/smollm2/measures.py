"""Numbers of one fold: those of `fedloop probe-kit`."""

from __future__ import annotations

from fedloop.kit.measures import (
    BUDGET,
    LARGEST_BUDGET,
    SHARES,
    Features,
    Row,
    cell,
    counts,
    cut_at,
    cut_of,
    flagged_by_kind,
    held_out_scores,
    one_head,
    scores_of,
    summary,
)

__all__ = [
    "BUDGET",
    "LARGEST_BUDGET",
    "SHARES",
    "Features",
    "Row",
    "cell",
    "counts",
    "cut_at",
    "cut_of",
    "flagged_by_kind",
    "held_out_scores",
    "one_head",
    "scores_of",
    "summary",
]
