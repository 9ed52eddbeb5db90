"""`loraprobe train` and `evaluate`. The library is imported inside: help must be quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import KindMismatch, LayoutMismatch
from .options import (
    AnyBaseOption,
    BaseOption,
    CalibrationOption,
    ForceOption,
    ManifestArgument,
    RecipeOption,
    SeedOption,
    read_adapters,
    read_probe,
    recipe_of,
)
from .terminal import (
    JsonOption,
    ProbeOption,
    RevisionOption,
    SubfolderOption,
    app,
    console,
    plain,
    reports_errors,
)

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..evaluation import EvalReport
    from ..featurizer import FeatureRecipe
    from ..manifest import Row
    from ..probe import Probe


@app.command()
@reports_errors
def train(
    manifest: ManifestArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to save the probe in.")],
    base: BaseOption = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="weights, factor_delta or weight_delta. [default: weights for the recipe invariant"
            " without --base, else factor_delta]"
        ),
    ] = None,
    head: Annotated[
        str, typer.Option(help="linear, linear_paper, mlp, xgboost, cosine or mass_mean.")
    ] = "linear",
    recipe: RecipeOption = "invariant",
    threshold: Annotated[
        str, typer.Option(help="A number, or fpr:0.01 for a budget of false positives.")
    ] = "0.8",
    calibration: CalibrationOption = None,
    folds: Annotated[int, typer.Option(help="Folds of the out-of-fold scores.")] = 5,
    by_kind: Annotated[
        bool,
        typer.Option(
            "--by-kind",
            help="Leave out one kind of data (source, host) after the other in place of folds.",
        ),
    ] = False,
    seed: SeedOption = 0,
    licence: Annotated[
        str,
        typer.Option(help="The probe's licence, for its card: an identifier of the Hub's."),
    ] = "unknown",
    force: ForceOption = False,
) -> None:
    """Fit a probe on labelled adapters and save it, with a card of its own figures and limits.

    Prints its out-of-fold report beside those of trivial baselines.
    """
    from ..adapters.kinds import FRESH
    from ..fit.card_facts import card_facts
    from ..fit.fit import fit_probe
    from ..manifest import kinds_of, read_manifest
    from ..outputs import free_path

    free_path(out, force)
    feature_recipe = recipe_of(recipe)
    rows = read_manifest(manifest)
    if kind is None:
        fresh = (None, FRESH)
        started = base not in fresh or any(row.initial not in fresh for row in rows)
        kind = "weights" if feature_recipe.reads_product and not started else "factor_delta"
    adapters = read_adapters(rows, kind, base, quiet=False)
    labels = [row.label for row in rows]
    groups = [row.group for row in rows]
    kinds = kinds_of(rows) if by_kind else None
    probe = fit_probe(
        adapters,
        labels,
        head=head,
        recipe=feature_recipe,
        groups=groups,
        threshold=threshold,
        seed=seed,
        calibration=calibration,
        folds=folds,
        kinds=kinds,
    )
    protocol = f"out of {'kind' if by_kind else 'fold'} by group, the head alone"
    measured, refused = _beside_baselines(
        probe, (feature_recipe, head), adapters, rows, kinds, folds, seed
    )
    own_report = measured.pop(f"this probe ({head})")
    areas = {name: report.auroc for name, report in measured.items()}
    probe = probe.with_facts(**card_facts(own_report, protocol, areas, probe.base_model, licence))
    probe.save_pretrained(out)
    title = f"{len(rows)} adapters, {len(set(groups))} groups, seed {seed}"
    table = Table("detector", f"AUROC, {protocol}", "TPR at 1 % FPR", "TPR at 5 % FPR", title=title)
    for name, report in {f"this probe ({head})": own_report, **measured}.items():
        low, high = report.auroc_ci
        rates = (f"{tpr:.3f}" for tpr in report.tpr_at_fpr.values())
        table.add_row(name, f"{report.auroc:.3f} [{low:.3f}, {high:.3f}]", *rates)
    for name, reason in refused.items():
        table.add_row(name, reason, "", "")
    console.print(table)
    for failure in probe.facts["known_failures"]:
        console.print(plain(f"known failure: {failure}"), soft_wrap=True)
    console.print(plain(f"saved to {out}"), soft_wrap=True)


def _beside_baselines(
    probe: Probe,
    detector: tuple[FeatureRecipe, str],
    adapters: list[Adapter],
    rows: list[Row],
    kinds: list[tuple[str, ...]] | None,
    folds: int,
    seed: int,
) -> tuple[dict[str, EvalReport], dict[str, str]]:
    """Held-out reports of the probe and of trivial detectors, and why there is none of some."""
    from ..adapters.kinds import FRESH
    from ..fit.baselines import baseline_recipes
    from ..fit.fit import fit_probe

    labels = [row.label for row in rows]
    groups = [row.group for row in rows]
    reports: dict[str, EvalReport] = {}
    refused: dict[str, str] = {}
    detectors = {f"this probe ({detector[1]})": detector, **baseline_recipes(detector[0])}
    for name, (recipe, head) in detectors.items():
        try:
            compared = (
                probe
                if (recipe, head) == detector
                else fit_probe(
                    *(adapters, labels),
                    head=head,
                    recipe=recipe,
                    groups=groups,
                    seed=seed,
                    kinds=kinds,
                )
            )
        except KindMismatch:  # with --base fresh there is no change of A
            refused[name] = f"needs --base with an adapter, not {FRESH}"
        except LayoutMismatch:
            refused[name] = "needs adapters of one rank and choice of modules"
        else:
            reports[name] = _held_out(compared, adapters, rows, kinds, folds, seed)
    return reports, refused


@app.command()
@reports_errors
def evaluate(
    manifest: ManifestArgument,
    probe: ProbeOption,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    base: BaseOption = None,
    any_base: AnyBaseOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure a probe on labelled adapters that it was not trained on."""
    from ..evaluation import evaluate as measure
    from ..manifest import read_manifest

    detector = read_probe(probe, subfolder, revision)
    rows = read_manifest(manifest)
    result = measure(
        detector,
        read_adapters(rows, detector.featurizer.layout.kind, base, quiet=as_json),
        [row.label for row in rows],
        [row.group for row in rows],
        by=[row.source for row in rows],
        seed=seed,
        check_base=not any_base,
    )
    print(json.dumps(result.to_dict(), indent=2) if as_json else result.table())


def _held_out(
    probe: Probe,
    adapters: list[Adapter],
    rows: list[Row],
    kinds: list[tuple[str, ...]] | None,
    folds: int,
    seed: int,
) -> EvalReport:
    """What a probe's recipe and head do on what was held out, at the probe's own threshold."""
    import numpy as np

    from ..evaluation import report
    from ..fit.fit import held_out_scores

    training = probe.facts["training"]
    labels = np.array([row.label for row in rows])
    groups = [row.group for row in rows]
    scores = held_out_scores(
        probe.featurizer(adapters),
        labels,
        groups,
        head=training["head"],
        head_options=training["head_options"],
        seed=seed,
        folds=folds,
        kinds=kinds,
    )
    if probe.calibration is not None:
        scores = probe.calibration(scores)
    by = [row.source for row in rows]
    return report(labels, scores, groups, threshold=probe.threshold, by=by, seed=seed)
