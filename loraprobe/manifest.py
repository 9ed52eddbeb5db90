"""A manifest names labelled adapters: a CSV with the columns path, label, and optionally group, source.

path is relative to the manifest's own folder; label is 0, 1, benign or malicious; group (a client,
a run) is what must not be split between training and testing; source is for tables and figures.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .adapter import KINDS, Adapter, factor_delta, weight_delta
from .errors import DataError, LoraprobeError
from .peft_io import load_adapter

_LABELS = {"0": 0, "1": 1, "benign": 0, "malicious": 1}
FRESH = "fresh"  # instead of a base adapter: training started from B = 0


@dataclass(frozen=True)
class Row:
    """One labelled adapter; group and source default to its own path and its label."""

    path: Path
    label: int
    group: str
    source: str


def read_manifest(path: Path) -> list[Row]:
    """Read a manifest.

    Raises:
        DataError: the file or a column is missing, or a row has a label or path that is not valid.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark in front
            reader = csv.DictReader(file)
            columns, records = set(reader.fieldnames or ()), [(reader.line_num, record) for record in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the manifest {path}: {error}") from None
    if not {"path", "label"} <= columns:
        raise DataError(f"{path} has the columns {sorted(columns)}; expected path and label, and optionally group and source")
    if not records:
        raise DataError(f"{path} names no adapter; expected at least one row")
    rows = []
    for number, record in records:
        if None in record:
            raise DataError(f"{path}, line {number}: got more values than columns; put a path with a comma in quotes")
        label = _LABELS.get((record["label"] or "").strip().lower())
        if label is None or not record["path"]:
            raise DataError(
                f"{path}, line {number}: got path {record['path']!r}, label {record['label']!r}; expected a path and one of {', '.join(_LABELS)}"
            )
        adapter = path.parent / record["path"]
        rows.append(Row(adapter, label, record.get("group") or record["path"], record.get("source") or ("benign", "malicious")[label]))
    return rows


def read_for(kind: str, source: str | Path | Adapter, base: str | Path | Adapter | None, alpha: float | None = None) -> Adapter:
    """Load an adapter and, where a delta is wanted, subtract the one training started from.

    Args:
        kind: "weights", "factor_delta" or "weight_delta".
        source: a path or Hub id, or an adapter that is loaded already.
        base: the adapter that training started from, or its path; "fresh" for B = 0.

    Raises:
        LoraprobeError: see load_adapter, factor_delta and weight_delta; also a delta without a base.
    """
    if kind not in KINDS:
        raise DataError(f"got kind {kind!r}; expected one of {', '.join(KINDS)}")
    adapter = source if isinstance(source, Adapter) else load_adapter(source, alpha=alpha)
    if kind == "weights":
        return adapter
    if base is None:
        raise DataError(f"the probe scores a {kind}: pass --base with the adapter that training started from, or --base {FRESH} if its B was zero")
    if base == FRESH:
        if kind == "weight_delta":
            raise DataError(f"the probe scores a weight_delta: pass --base with an adapter, not {FRESH!r}")
        return factor_delta(adapter, None)
    before = base if isinstance(base, Adapter) else load_adapter(base, alpha=alpha)
    return factor_delta(adapter, before) if kind == "factor_delta" else weight_delta(adapter, before)


def read_labelled(rows: Iterable[Row], kind: str, base: str | Path | None) -> list[Adapter]:
    """The adapters of a manifest, with the failing path added to any error."""
    before = load_adapter(base) if base is not None and base != FRESH else base
    adapters = []
    for row in rows:
        try:
            adapters.append(read_for(kind, row.path, before))
        except LoraprobeError as error:
            raise type(error)(f"{row.path}: {error}") from None
    return adapters
