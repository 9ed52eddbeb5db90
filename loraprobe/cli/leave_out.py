"""What `loraprobe evaluate --leave-out` does: reads, runs, shows.

The command itself is in loraprobe.cli.probes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track
from rich.table import Column, Table

from ..errors import DataError
from .terminal import complaints, console, plain

if TYPE_CHECKING:
    from ..featurizer import FeatureRecipe
    from ..study.report import LeaveOneOutReport, Outcome

_SHOWN = 60  # outcomes that are shown one by one; all of them are in --json and --out


@dataclass(frozen=True)
class LeaveOutOptions:
    """The options of the command that are about leaving out; None where nothing was asked for."""

    field: str
    pairs: bool
    heads: Sequence[str] | None
    recipes: dict[str, FeatureRecipe] | None
    cuts: Sequence[str | float] | None
    calibration: str | None
    folds: int | None
    bins: int | None
    edges: str | None
    keep_twins: bool


def leave_out_command(
    manifest: Path,
    kind: str,
    base: str | None,
    seed: int,
    asked: LeaveOutOptions,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run the evaluation and print it.

    Raises:
        LoraprobeError: see `loraprobe.study.leave_out.leave_one_out`.
    """
    from ..manifest import read_labelled, read_manifest
    from ..study.leave_out import HEADS, RECIPES, detectors_of, leave_one_out

    rows = read_manifest(manifest)
    adapters = read_labelled(
        track(rows, "reading", console=complaints, disable=as_json or len(rows) < 200), kind, base
    )
    detectors = detectors_of(asked.heads or HEADS, asked.recipes or RECIPES)
    named = {
        "folds": asked.folds,
        "cuts": asked.cuts,
        "calibration": asked.calibration,
        "bins": asked.bins,
        "edges": _edges(asked.edges),
    }
    options: dict[str, Any] = {name: value for name, value in named.items() if value}
    report = leave_one_out(
        adapters,
        rows,
        asked.field,
        detectors,
        pairs=asked.pairs,
        keep_twins=asked.keep_twins,
        seed=seed,
        **options,
        progress=lambda jobs: track(jobs, "fitting", console=complaints, disable=as_json),
    )
    found = report.to_dict()
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_lines(found), encoding="utf-8")
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    for table in _tables(report):
        console.print(table)
    for reason, count in _reasons(report).items():
        console.print(
            plain(f"not measured in {count} of {len(report.outcomes)} fits: {reason}"),
            soft_wrap=True,
        )
    if out:
        console.print(plain(f"wrote {out}"), soft_wrap=True)


def _edges(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(edge) for edge in text.split(",")]
    except ValueError:
        raise DataError(
            f"got --edges {text!r}; expected rising numbers with commas between them, such as"
            " 0.003,0.006"
        ) from None


def _lines(found: dict[str, Any]) -> str:
    """JSON with a line for every summary row and outcome.

    A change shows as the lines that changed.
    """
    parts = [f'"protocol": {json.dumps(found["protocol"], allow_nan=False)}']
    for name in ("summary", "outcomes"):
        parts.append(
            f'"{name}": [\n'
            + ",\n".join(json.dumps(row, allow_nan=False) for row in found[name])
            + "\n]"
        )
    return "{" + ",\n".join(parts) + "}\n"


def _tables(report: LeaveOneOutReport) -> list[Table]:
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
    table = Table(
        *(
            Column(name, overflow="fold")
            for name in (
                "left out",
                "detector",
                "recipe",
                "malicious / benign tested",
                "AUROC",
                "rates",
            )
        )
    )
    for one in outcomes:
        start = [plain(one.left_out), plain(one.detector), plain(one.recipe)]
        if one.report is None:
            table.add_row(*start, "", "", plain(one.error))
            continue
        low, high = one.report.auroc_ci
        rates = [
            cut.error or f"{cut.cut}: TPR {cut.tpr:.2f}, FPR {cut.fpr:.2f}" for cut in one.cuts
        ]
        counts = f"{one.report.n_malicious} / {one.report.n - one.report.n_malicious}"
        table.add_row(
            *start,
            counts,
            f"{one.report.auroc:.3f} [{low:.3f}, {high:.3f}]",
            plain("\n".join(rates)),
        )
    return table


def _reasons(report: LeaveOneOutReport) -> dict[str, int]:
    """Why what was not measured, and how often: whole outcomes, and cuts."""
    counts: dict[str, int] = {}
    for one in report.outcomes:
        for reason in {one.error, *(f"{cut.cut}: {cut.error}" for cut in one.cuts if cut.error)} - {
            ""
        }:
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def _two(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"
