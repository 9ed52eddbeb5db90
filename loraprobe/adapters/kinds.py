"""An adapter as what a probe scores: its weights, or the change since training started."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from .adapter import KINDS, Adapter
from .deltas import check_is_change, factor_delta, weight_delta
from .load import load_adapter

FRESH = "fresh"
"""Instead of the adapter that training started from: its B was zero."""


def as_kind(
    adapter: Adapter, kind: str, before: str | Path | Adapter | None, alpha: float | None = None
) -> Adapter:
    """The adapter itself, or where a delta is wanted, less the one that training started from.

    Args:
        kind: "weights", "factor_delta" or "weight_delta".
        before: the adapter that training started from, or its path or Hub id; FRESH for B = 0.
        alpha: lora_alpha of `before`, where that is a file without a configuration.

    Raises:
        DataError: an unknown kind, or a delta without a start.
        LoraprobeError: see load_adapter, factor_delta and weight_delta.
    """
    if kind not in KINDS:
        raise DataError(f"got kind {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "weights":
        check_is_change(adapter)
        return adapter
    if before is None:
        raise DataError(
            f"the probe scores a {kind}: pass --base with the adapter that training started from,"
            f" or --base {FRESH} if its B was zero"
        )
    if before == FRESH:
        if kind == "weight_delta":
            raise DataError(
                f"the probe scores a weight_delta: pass --base with an adapter, not {FRESH!r}"
            )
        return factor_delta(adapter, None)
    start = before if isinstance(before, Adapter) else load_adapter(before, alpha=alpha)
    return factor_delta(adapter, start) if kind == "factor_delta" else weight_delta(adapter, start)
