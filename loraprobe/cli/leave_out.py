"""The tables of `loraprobe leave-out`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from .terminal import plain

if TYPE_CHECKING:
    from ..study.report import LeaveOneOutReport, Outcome

_SHOWN = 60  # outcomes that are shown one by one; all of them are in --json and --out


def tables_of(report: LeaveOneOutReport) -> list[Table]:
    """The summary, and every outcome where they are not too many."""
    facts = report.protocol
    what = (
        "every pair of a malicious and a benign source"
        if facts["pairs"]
        else f"one {facts['leave_out']} at a time"
    )
    counts = (
        f"{facts['n']} adapters ({facts['n_malicious']} malicious, {facts['n_hard_negative']} hard"
        " negatives)"
    )
    title = f"{what} left out; {counts}, seed {facts['seed']}"
    columns = (
        "detector",
        "recipe",
        "left out is",
        "measured",
        "AUROC\nmean / worst",
        "worst for",
        "TPR at\n1 % FPR",
        "ECE",
        "cut",
    )
    rates = ("TPR\nmean / worst", "FPR\nmean / worst", "hard negatives\nmean / worst")
    summary = Table(*(Column(name, overflow="fold") for name in columns + rates), title=title)
    for row in report.summary():
        name = f"{row['detector']}{' (baseline)' if row['baseline'] else ''}"
        share = f"{row['measured']} of {row['measured'] + row['cannot']}"
        start = [plain(name), plain(row["recipe"]), plain(row["side"]), plain(share)]
        if not row["measured"]:
            summary.add_row(*start, "cannot read" if "Mismatch" in row["error"] else "cannot")
            continue
        areas = f"{row['auroc_mean']:.2f} / {row['auroc_worst']:.2f}"
        summary.add_row(
            *start,
            areas,
            plain(row["worst"]),
            f"{row['tpr_at_1_fpr_mean']:.2f}",
            f"{row['ece_mean']:.2f}",
            *_cut_cells(row["cuts"]),
        )
    return (
        [summary, _outcome_table(report.outcomes)] if len(report.outcomes) <= _SHOWN else [summary]
    )


def _cut_cells(cuts: Sequence[dict[str, Any]]) -> list[str]:
    """Name and rates of every cut, a line each."""
    cells = [[cut["cut"] for cut in cuts]]
    for rate in ("tpr", "fpr", "fpr_hard"):
        cells.append(
            [
                (
                    "no such cut"
                    if "error" in cut
                    else f"{_two(cut[f'{rate}_mean'])} / {_two(cut[f'{rate}_worst'])}"
                )
                for cut in cuts
            ]
        )
    return ["\n".join(lines) for lines in cells]


def _outcome_table(outcomes: Sequence[Outcome]) -> Table:
    names = ("left out", "detector", "recipe", "malicious / benign tested", "AUROC", "rates")
    table = Table(*(Column(name, overflow="fold") for name in names))
    for outcome in outcomes:
        start = [plain(outcome.left_out), plain(outcome.detector), plain(outcome.recipe)]
        if outcome.report is None:
            table.add_row(*start, "", "", plain(outcome.error))
            continue
        low, high = outcome.report.auroc_ci
        rates = [
            cut.error or f"{cut.cut}: TPR {cut.tpr:.2f}, FPR {cut.fpr:.2f}" for cut in outcome.cuts
        ]
        counts = f"{outcome.report.n_malicious} / {outcome.report.n - outcome.report.n_malicious}"
        table.add_row(
            *start,
            counts,
            f"{outcome.report.auroc:.3f} [{low:.3f}, {high:.3f}]",
            plain("\n".join(rates)),
        )
    return table


def reasons_of(report: LeaveOneOutReport) -> dict[str, int]:
    """Why what was not measured, and how often: whole outcomes, and cuts."""
    counts: dict[str, int] = {}
    for outcome in report.outcomes:
        cut_errors = (f"{cut.cut}: {cut.error}" for cut in outcome.cuts if cut.error)
        for reason in {outcome.error, *cut_errors} - {""}:
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def _two(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"
