"""Numbers of one fold: how adapters rank, and what a cut that was fixed beforehand does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from loraprobe.errors import LoraprobeError
from loraprobe.fit.calibration import fpr_threshold
from loraprobe.fit.heads import fit_head
from loraprobe.heads import LinearHead
from loraprobe.metrics import auroc

from .folds import Fold, Mask, Table, benign_groups

SHARES = (1.0, 0.5, 0.25, 0.1)
BUDGET = 0.02
LARGEST_BUDGET = 0.05
Row = dict[str, Any]
Features = Callable[[Mask], np.ndarray]


def scores_of(head: str, x: np.ndarray, table: Table, train: Mask) -> np.ndarray:
    """Scores of all adapters by a head fitted on some; logits, where the head has them.

    Raises:
        LoraprobeError: the head cannot be fitted.
    """
    rows = np.flatnonzero(train)
    kinds = [table.kinds[row] for row in rows]
    groups = [str(row) for row in rows]
    fitted = fit_head(head, x[train], table.label[train], groups, seed=0, kinds=kinds)
    if isinstance(fitted, LinearHead):
        return x.astype(np.float64) @ fitted.coef + fitted.intercept
    return np.asarray(fitted(x), np.float64)


def held_out_scores(
    head: str, x: np.ndarray, table: Table, train: Mask, groups: Sequence[Sequence[str]]
) -> np.ndarray:
    """Scores of the training's benign adapters, their kinds left out one group after the other."""
    scores: list[float] = []
    for group in groups:
        out = train & (table.label == 0) & np.isin(table.source, list(group))
        if out.any():
            inner = train & ~table.touches(group)
            scores += scores_of(head, x, table, inner)[out].tolist()
    return np.array(scores)


def cut_of(
    head: str, x: np.ndarray, table: Table, train: Mask, groups: Sequence[Sequence[str]]
) -> float | None:
    """A cut of 2 % from benign kinds that were left out of training; see `cut_at`."""
    return cut_at(held_out_scores(head, x, table, train, groups))


def cut_at(benign: np.ndarray) -> float | None:
    """The cut that 2 % of benign scores reach.

    With m of them, fewer than 49, it is their highest score, whose budget is 1 / (m + 1); None if
    that is above 5 %.
    """
    budget = max(BUDGET, 1.001 / (len(benign) + 1))  # fewer cannot carry a smaller one
    if budget > LARGEST_BUDGET:
        return None
    return fpr_threshold(budget, benign, np.zeros(len(benign), int), list(range(len(benign))))


def cell(table: Table, fold: Fold, scores: np.ndarray, cut: float | None, at: str = "") -> Row:
    """AUROC by poison share, and shares flagged at the cut, of one fold's tested adapters.

    Args:
        at: only malicious adapters of this source; all if empty.
    """
    benign = fold.test & (table.role == "benign")
    hard = fold.test & (table.role == "hard_negative")
    row: Row = {"fold": fold.name, "n_benign": int(benign.sum()), "n_hard": int(hard.sum())}
    row |= {"n_train": int(fold.train.sum())}
    if at:
        row["source"] = at
    if cut is not None:
        row["benign_flagged"] = int((scores[benign] >= cut).sum())
        row["hard_flagged"] = int((scores[hard] >= cut).sum())
    for share in SHARES:
        malicious = fold.test & (table.label == 1) & (table.share == share)
        if at:
            malicious &= table.source == at
        if not malicious.any():
            continue
        entry: Row = {"n": int(malicious.sum())}
        for name, negatives in (("benign", benign), ("all", benign | hard)):
            if negatives.any():
                both = malicious | negatives
                entry[f"auroc_{name}"] = round(auroc(malicious[both].astype(int), scores[both]), 4)
        if cut is not None:
            entry["found"] = int((scores[malicious] >= cut).sum())
        row[f"{share:g}"] = entry
    return row


def summary(cells: Sequence[Row]) -> Row:
    """Mean and worst cell, and flagged shares over all cells."""
    totals: Row = {"cells": len(cells)}
    for share in SHARES:
        entries = [row[f"{share:g}"] for row in cells if f"{share:g}" in row]
        entry: Row = {"n": sum(item["n"] for item in entries)}
        for name in ("auroc_benign", "auroc_all"):
            values = [item[name] for item in entries if name in item]
            if values:
                entry[name] = {"mean": _mean(values), "worst": min(values), "cells": len(values)}
        cut = [item for item in entries if "found" in item]
        if cut:
            entry["found"] = _share(cut, "found", "n")
        if entries:
            totals[f"{share:g}"] = entry
    cut = [row for row in cells if "benign_flagged" in row]
    if cut:
        totals["benign_flagged"] = _share(cut, "benign_flagged", "n_benign")
        totals["hard_flagged"] = _share(cut, "hard_flagged", "n_hard")
    return totals


def flagged_by_kind(
    table: Table, tested: Sequence[tuple[Fold, np.ndarray, float | None]]
) -> dict[str, list[int]]:
    """Kind of benign data -> [flagged, tested] over folds in which nothing of it was trained on."""
    counts: dict[str, list[int]] = {}
    for fold, scores, cut in tested:
        if cut is None:
            continue
        for row in np.flatnonzero(fold.test & (table.label == 0)):
            entry = counts.setdefault(str(table.source[row]), [0, 0])
            entry[0] += int(scores[row] >= cut)
            entry[1] += 1
    return dict(sorted(counts.items()))


def counts(table: Table) -> Row:
    """What there is to learn from."""
    label, role = table.label, table.role
    shares = {f"{s:g}": int(((label == 1) & (table.share == s)).sum()) for s in SHARES}
    return {
        "n": len(table),
        "malicious": {"n": int(label.sum()), "by_share": shares},
        "benign": int((role == "benign").sum()),
        "hard_negative": int((role == "hard_negative").sum()),
        "benign_kinds": len(set(table.source[role == "benign"].tolist())),
        "hard_kinds": len(set(table.source[role == "hard_negative"].tolist())),
        "malicious_sources": sorted(set(table.source[label == 1].tolist())),
        "initial_adapters": len(set(table.initial.tolist())),
        "ranks": _tally(table.rank),
        "modules": _tally(table.modules),
        "long": int((table.steps >= 30).sum()),
    }


def _tally(values: np.ndarray) -> dict[str, int]:
    names, numbers = np.unique(values, return_counts=True)
    return {str(name): int(n) for name, n in zip(names, numbers, strict=True)}


def one_head(
    table: Table,
    folds: Iterable[Fold],
    features: Features,
    head: str,
    cut: bool,
    by_source: bool,
) -> Row:
    """How one head does over folds.

    Args:
        features: training adapters -> features of all of them.
        cut: whether a cut is fixed in every fold; see `cut_of`.
        by_source: a cell for every malicious source of a fold, not one for all.
    """
    cells: list[Row] = []
    tested: list[tuple[Fold, np.ndarray, float | None]] = []
    groups = benign_groups(table)
    for fold in folds:
        x = features(fold.train)
        try:
            scores = scores_of(head, x, table, fold.train)
            at = cut_of(head, x, table, fold.train, groups) if cut else None
        except LoraprobeError as error:
            cells.append({"fold": fold.name, "n_benign": 0, "n_hard": 0, "failed": str(error)})
            continue
        tested.append((fold, scores, at))
        malicious = fold.test & (table.label == 1)
        sources = sorted(set(table.source[malicious].tolist())) if by_source else [""]
        cells += [cell(table, fold, scores, at, source) for source in sources]
    result: Row = {"summary": summary(cells)}
    if by_source:
        result["by_source"] = {
            name: summary([row for row in cells if row.get("source") == name])
            for name in sorted({row["source"] for row in cells if "source" in row})
        }
    if cut:
        kinds = flagged_by_kind(table, tested)
        result["flagged_by_kind"] = kinds
        result["worst_kind"] = _worst(kinds)
    return result | {"cells": cells}


def _worst(kinds: dict[str, list[int]]) -> Row | None:
    """The kind of benign data with the largest share flagged."""
    if not kinds:
        return None
    name = max(kinds, key=lambda kind: (kinds[kind][0] / kinds[kind][1], kinds[kind][1]))
    return {"kind": name, "flagged": kinds[name][0], "n": kinds[name][1]}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _share(rows: Sequence[Row], hits: str, n: str) -> Row:
    total, tested = sum(row[hits] for row in rows), sum(row[n] for row in rows)
    return {"hits": total, "n": tested, "share": round(total / max(tested, 1), 4)}
