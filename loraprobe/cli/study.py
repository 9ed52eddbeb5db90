"""`loraprobe leave-out`. The library is imported inside: help must be quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from .leave_out import reasons_of, tables_of
from .options import (
    BaseOption,
    CalibrationOption,
    ForceOption,
    KindOption,
    ManifestArgument,
    ManyHeadsOption,
    SeedOption,
    read_adapters,
    recipe_of,
)
from .terminal import JsonOption, app, console, plain, reports_errors, tracked

if TYPE_CHECKING:
    from ..study.report import LeaveOneOutReport


@app.command("leave-out")
@reports_errors
def leave_out(
    manifest: ManifestArgument,
    field: Annotated[str, typer.Argument(help="source, attack, recipe, rank, lr, base or seed.")],
    pairs: Annotated[
        bool,
        typer.Option("--pairs", help="Of source: every malicious and benign one out together."),
    ] = False,
    head: ManyHeadsOption = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Recipes; repeat it. [default: all_b, paper, spectral]")
    ] = None,
    cut: Annotated[
        list[str] | None,
        typer.Option(help="Cuts to report rates at; repeat it. [default: fpr:0.01, 0.8]"),
    ] = None,
    calibration: CalibrationOption = None,
    folds: Annotated[int, typer.Option(help="Parts of the class that is not left out.")] = 5,
    bins: Annotated[int, typer.Option(help="Quantile ranges of learning rates.")] = 4,
    edges: Annotated[
        str | None, typer.Option(help="Ends between ranges of learning rates instead: 0.003,0.006.")
    ] = None,
    keep_twins: Annotated[
        bool,
        typer.Option("--keep-twins", help="Keep NAME_safe in training while NAME is left out."),
    ] = False,
    base: BaseOption = None,
    kind: KindOption = "factor_delta",
    seed: SeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .json to write everything to.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure probes on kinds of data that they were not trained on.

    Every head on every recipe, and the trivial baselines, are fitted anew for every value of a
    column that is left out, and tested on the rows of that value. A mixture is left out with its
    host, and a malicious source with its safe twin NAME_safe.
    """
    from ..manifest import read_manifest
    from ..outputs import free_path
    from ..study.leave_out import HEADS, RECIPES, detectors_of, leave_one_out

    if out is not None:
        free_path(out, force, file=True)
    recipes = {name: recipe_of(name) for name in recipe or ()} or RECIPES
    detectors = detectors_of(head or HEADS, recipes)
    options: dict[str, Any] = {"cuts": cut} if cut else {}
    ends = _edges(edges)
    rows = read_manifest(manifest)
    report = leave_one_out(
        read_adapters(rows, kind, base, quiet=as_json),
        rows,
        field,
        detectors,
        pairs=pairs,
        folds=folds,
        calibration=calibration,
        bins=bins,
        edges=ends,
        keep_twins=keep_twins,
        seed=seed,
        progress=lambda jobs: jobs if as_json else tracked(jobs, "fitting", len(jobs)),
        **options,
    )
    _show(report, out, as_json)


def _show(report: LeaveOneOutReport, out: Path | None, as_json: bool) -> None:
    facts = report.to_dict()
    if out:
        out.write_text(_lines(facts), encoding="utf-8")
    if as_json:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    for table in tables_of(report):
        console.print(table)
    for reason, count in reasons_of(report).items():
        unmeasured = f"not measured in {count} of {len(report.outcomes)} fits: {reason}"
        console.print(plain(unmeasured), soft_wrap=True)
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


def _lines(facts: dict[str, Any]) -> str:
    """JSON with a line for every summary row and outcome.

    A change shows as the lines that changed.
    """
    parts = [f'"protocol": {json.dumps(facts["protocol"], allow_nan=False)}']
    for name in ("summary", "outcomes"):
        parts.append(
            f'"{name}": [\n'
            + ",\n".join(json.dumps(row, allow_nan=False) for row in facts[name])
            + "\n]"
        )
    return "{" + ",\n".join(parts) + "}\n"
