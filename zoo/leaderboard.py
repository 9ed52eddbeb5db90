"""A benchmark of detectors of malicious adapters, on the labelled adapters of this repository.

    python -m zoo.leaderboard                                # what is on it, and every row
    python -m zoo.leaderboard my_package.detector:Detector   # yours, without installing anything
    python -m zoo.leaderboard --write                        # measures our rows again

A detector is any class without arguments, or function that makes one, with `score(adapter)`: a
number, higher is more malicious. If it also has `fit(adapters, labels)` (1 is malicious), it is
fitted on the training part of every split; without, the same split's test part is scored alone.
An adapter is a loraprobe.Adapter: module name -> its A, B and scaling.

Splits are fixed: `zoo.smollm2.folds` names what each leaves out. In `source and kinds` a family of
malicious sources and a group of benign kinds are in no training adapter, hard negatives among the
benign. AUROC by share of poison, mean and worst over splits.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fedloop.kit.measures import Row, cell, summary
from loraprobe import Adapter, load_adapter
from loraprobe.errors import DataError
from zoo.smollm2.folds import Fold, Table, pairs, settings

from .program import documented

ZOO = Path(__file__).resolve().parent
RESULTS = ZOO / "leaderboard.json"
PAGE = ZOO / "leaderboard.md"
SETS = {
    "chat-1m": ZOO / "leave_out" / "designed.csv",
    "smollm2-135m-safe": ZOO / "adapters" / "smollm2-135m-safe" / "manifest.csv",
}
OURS = ("MassMean", "Linear", "HarmfulDirection", "Spectral20", "Norm", "FirstLayerB")


class Detector(Protocol):
    """What is measured."""

    def score(self, adapter: Adapter) -> float:
        """Higher is more malicious."""


def table_of(name: str) -> Table:
    """A set's manifest."""
    path = SETS[name]
    if name != "chat-1m":
        return Table.read(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ones = np.ones(len(rows), int)
    column = {key: np.array([row[key] for row in rows]) for key in ("role", "source", "host")}
    return Table(
        path=[path.parent / row["path"] for row in rows],
        label=np.array([int(row["label"] == "malicious") for row in rows]),
        share=np.array([row["share"] for row in rows], float),
        initial=ones,
        rank=ones,
        steps=ones,
        modules=np.full(len(rows), "qv"),
        **column,
    )


@cache
def loaded(name: str) -> tuple[Table, list[Adapter]]:
    """A set's table and adapters."""
    table = table_of(name)
    return table, [load_adapter(path) for path in table.path]


def splits(table: Table) -> dict[str, list[Fold]]:
    """What is left out -> folds; what a set has one of is not left out."""
    found = {"source and kinds": list(pairs(table))}
    for name, folds in settings(table).items():
        if name in ("initial adapter", "rank", "modules") and len(folds) > 1:
            found[name] = folds
    return found


def measured(make: Callable[[], Any], name: str) -> Row:
    """A detector's row on a set: what is left out -> summary of `fedloop.kit.measures`."""
    table, adapters = loaded(name)
    found: Row = {}
    once: np.ndarray | None = None
    for what, folds in splits(table).items():
        cells = []
        for fold in folds:
            detector = make()
            if not hasattr(detector, "fit"):
                once = _scores(detector, adapters) if once is None else once
                scores = once
            else:
                rows = np.flatnonzero(fold.train)
                detector.fit([adapters[row] for row in rows], table.label[rows])
                scores = np.full(len(adapters), np.nan)
                tested = np.flatnonzero(fold.test)
                scores[tested] = _scores(detector, [adapters[row] for row in tested])
            cells.append(cell(table, fold, scores, None))
        found[what] = summary(cells)
    return found


def _scores(detector: Detector, adapters: Sequence[Adapter]) -> np.ndarray:
    said = [detector.score(adapter) for adapter in adapters]
    for adapter, score in zip(adapters, said, strict=True):
        if not isinstance(score, Real) or not math.isfinite(score):
            raise DataError(f"got the score {score!r} for {adapter!r}; expected a finite number")
    return np.array(said, float)


def detector_of(spec: str) -> Callable[[], Any]:
    """What makes the detector named `package.module:object`.

    Raises:
        DataError: it is not there, or what it makes has no `score`.
    """
    module, _, name = spec.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"got the detector {spec!r}: {error}; expected package.module:Class, importable here"
        ) from error
    if not hasattr(make(), "score"):
        raise DataError(f"{spec} makes a {type(make()).__name__} without score(adapter)")
    return make  # type: ignore[no-any-return]


def page(rows: Row) -> str:
    """The leaderboard as Markdown."""
    lines = ["# Leaderboard", "", (__doc__ or "").strip(), ""]
    for name in SETS:
        table = table_of(name)
        malicious = int(table.label.sum())
        lines += [
            f"## {name}",
            "",
            f"{len(table)} adapters, {malicious} malicious. Mean / worst split; "
            "in brackets the malicious adapters tested, over all splits.",
            "",
        ]
        for what in splits(table):
            lines += [f"### {what} left out", "", *_table(rows, name, what), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: Row, name: str, what: str) -> list[str]:
    lines = ["| detector | splits | 100 % | 50 % | 25 % | 10 % |", "|---|---|---|---|---|---|"]
    found = {
        detector: row[name][what] for detector, row in rows.items() if what in row.get(name, {})
    }
    for detector, row in sorted(found.items(), key=lambda item: -_mean(item[1])):
        shown = [_shown(row.get(share)) for share in ("1", "0.5", "0.25", "0.1")]
        lines.append(f"| {detector} | {row['cells']} | " + " | ".join(shown) + " |")
    return lines


def _mean(row: Row) -> float:
    return float(row.get("1", {}).get("auroc_all", {}).get("mean", 0.0))


def _shown(entry: Row | None) -> str:
    if not entry or "auroc_all" not in entry:
        return "–"
    return f"{entry['auroc_all']['mean']:.2f} / {entry['auroc_all']['worst']:.2f} ({entry['n']})"


def main() -> None:
    """The command line."""
    parser = documented(__doc__)
    parser.add_argument("detector", nargs="?", help="package.module:object")
    parser.add_argument("--set", choices=sorted(SETS), action="append", help="all, if none")
    parser.add_argument("--write", action="store_true", help="measure our rows again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: Row = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if options.write:
        rows = {
            name: {one: measured(detector_of(f"zoo.detectors:{name}"), one) for one in SETS}
            for name in OURS
        }
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(rows), encoding="utf-8")
    if options.detector:
        make = detector_of(options.detector)
        rows[options.detector] = {one: measured(make, one) for one in options.set or SETS}
    print(page(rows))


if __name__ == "__main__":
    main()
