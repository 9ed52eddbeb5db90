"""The `loraprobe` sub-commands that read adapters and make probes of them.

The library is imported inside: help must be quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

from ..errors import DataError, KindMismatch, LoraprobeError, RecipeError
from .terminal import (
    Exit,
    JsonOption,
    ProbeOption,
    RevisionOption,
    SubfolderOption,
    app,
    complaints,
    console,
    plain,
    reports_errors,
)

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..calibration import Method
    from ..featurizer import FeatureRecipe
    from ..probe import Probe

RECIPES = ("paper", "all_b", "all_a", "norm_only", "spectral")  # RECIPES of loraprobe.featurizer

BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", "-b", help="The adapter that training started from; 'fresh' if its B was zero."
    ),
]
ManifestArgument = Annotated[
    Path, typer.Argument(help="CSV with columns path, label[, group, source, ...].")
]
RecipeOption = Annotated[
    str,
    typer.Option(help=f"One of {', '.join(RECIPES)}, or a JSON object of FeatureRecipe fields."),
]
KindOption = Annotated[
    str, typer.Option(help="weights, factor_delta or weight_delta; deltas need --base.")
]
AnyBaseOption = Annotated[
    bool, typer.Option("--any-base", help="Score adapters of a base model with another name.")
]
SeedOption = Annotated[int, typer.Option(help="Everything random follows from it.")]


@app.command()
@reports_errors
def score(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="PEFT folders, .safetensors files, or Hub ids: org/name or org/name@revision."
        ),
    ],
    probe: ProbeOption,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    base: BaseOption = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha of bare files.")] = None,
    any_base: AnyBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score adapters: exit code 0 all benign, 3 some flagged, 4 some inconclusive, 2 some
    unreadable.

    The gravest applies: 3 before 2 before 4.
    """
    from ..manifest import FRESH, read_for
    from ..probe import Probe

    detector = Probe.from_pretrained(probe, subfolder, revision)
    kind = detector.featurizer.layout.kind
    if base is not None and kind == "weights":
        raise KindMismatch(
            f"got --base {base}; the probe scores adapters as they are (kind 'weights') and has no"
            " use for it. Leave --base out."
        )
    before = base if base in (None, FRESH) else _adapter(base, alpha)
    results: list[dict[str, Any]] = []
    for name in track(
        adapters, "scoring", console=complaints, disable=as_json or len(adapters) < 20
    ):
        result = {"adapter": name, "commit": None}
        try:
            adapter = _adapter(name, alpha)
            result["commit"] = adapter.commit
            verdict = detector.verdicts([read_for(kind, adapter, before)], check_base=not any_base)[
                0
            ]
            results.append(
                {
                    **result,
                    "score": verdict.score,
                    "verdict": verdict.label,
                    "reason": verdict.reason,
                }
            )
        except (LoraprobeError, OSError) as error:
            results.append(
                {
                    **result,
                    "score": None,
                    "verdict": "error",
                    "reason": f"{type(error).__name__}: {error}",
                }
            )
    code = _exit_code({result["verdict"] for result in results})
    if as_json:
        facts = {
            "probe": probe,
            "commit": detector.commit,
            "threshold": detector.threshold,
            "exit_code": int(code),
        }
        start = {"base": base, "base_commit": getattr(before, "commit", None)}
        print(json.dumps({**facts, **start, "results": results}, indent=2))
    else:
        console.print(_score_table(results, detector))
    raise typer.Exit(code)


@app.command()
@reports_errors
def train(
    manifest: ManifestArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to save the probe in.")],
    base: BaseOption = None,
    kind: KindOption = "factor_delta",
    head: Annotated[
        str, typer.Option(help="linear, linear_paper, mlp, xgboost, cosine or mass_mean.")
    ] = "linear",
    recipe: RecipeOption = "all_b",
    threshold: Annotated[
        str, typer.Option(help="A number, or fpr:0.01 for a budget of false positives.")
    ] = "0.8",
    calibration: Annotated[str | None, typer.Option(help="platt or isotonic.")] = None,
    folds: Annotated[int, typer.Option(help="Folds of the out-of-fold scores.")] = 5,
    by_kind: Annotated[
        bool,
        typer.Option(
            "--by-kind",
            help="Leave out one kind of data (source, host) after the other in place of folds.",
        ),
    ] = False,
    seed: SeedOption = 0,
) -> None:
    """Fit a probe on labelled adapters, save it, and print its out-of-fold report beside trivial
    baselines.
    """
    from ..fit.baselines import baseline_recipes
    from ..fit.fit import fit_probe
    from ..manifest import FRESH, kinds_of, read_labelled, read_manifest

    rows = read_manifest(manifest)
    adapters = read_labelled(
        track(rows, "reading", console=complaints, disable=len(rows) < 200), kind, base
    )
    labels = [row.label for row in rows]
    groups = [row.group for row in rows]
    chosen = _recipe(recipe)
    kinds = kinds_of(rows) if by_kind else None
    probe = fit_probe(
        adapters,
        labels,
        head=head,
        recipe=chosen,
        groups=groups,
        threshold=threshold,
        seed=seed,
        calibration=cast("Method | None", calibration),
        folds=folds,
        kinds=kinds,
    )
    title = f"{len(rows)} adapters, {len(set(groups))} groups, seed {seed}"
    table = Table(
        "detector",
        f"AUROC, out of {'kind' if by_kind else 'fold'}",
        "TPR at 1 % FPR",
        "TPR at 5 % FPR",
        title=title,
    )
    for name, (own, own_head) in {
        f"this probe ({head})": (chosen, head),
        **baseline_recipes(chosen),
    }.items():
        try:
            compared = (
                probe
                if own is chosen and own_head == head
                else fit_probe(
                    adapters,
                    labels,
                    head=own_head,
                    recipe=own,
                    groups=groups,
                    seed=seed,
                    kinds=kinds,
                )
            )
        except KindMismatch:  # with --base fresh there is no change of A
            table.add_row(name, f"needs --base with an adapter, not {FRESH}", "", "")
            continue
        table.add_row(name, *_held_out(compared, adapters, labels, groups, kinds, folds, seed))
    probe.save_pretrained(out)
    console.print(table)
    console.print(plain(f"saved to {out}"), soft_wrap=True)


@app.command()
@reports_errors
def evaluate(
    manifest: ManifestArgument,
    probe: Annotated[
        str | None, typer.Option("--probe", "-p", help="A probe's folder or Hub id.")
    ] = None,
    base: BaseOption = None,
    any_base: AnyBaseOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    leave_out: Annotated[
        str | None,
        typer.Option(help="Instead of a probe: source, attack, recipe, rank, lr, base or seed."),
    ] = None,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs", help="With source: every malicious and benign source out together."
        ),
    ] = False,
    head: Annotated[
        list[str] | None,
        typer.Option(help="Heads to fit; repeat it. [default: linear, linear_paper]"),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(RECIPES)} or JSON; repeat it. [default: all_b, paper, spectral]"
        ),
    ] = None,
    cut: Annotated[
        list[str] | None,
        typer.Option(help="Cuts to report rates at; repeat it. [default: fpr:0.01, 0.8]"),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="platt or isotonic. [default: none]")
    ] = None,
    folds: Annotated[
        int | None, typer.Option(help="Parts of the class that is not left out. [default: 5]")
    ] = None,
    bins: Annotated[
        int | None, typer.Option(help="Quantile ranges of learning rates. [default: 4]")
    ] = None,
    edges: Annotated[
        str | None, typer.Option(help="Ends between ranges of learning rates instead: 0.003,0.006.")
    ] = None,
    keep_twins: Annotated[
        bool,
        typer.Option("--keep-twins", help="Keep NAME_safe in training while NAME is left out."),
    ] = False,
    kind: Annotated[
        str | None,
        typer.Option(help="weights, factor_delta or weight_delta. [default: factor_delta]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .json to write everything to.")
    ] = None,
) -> None:
    """Measure a probe on labelled adapters it was not trained on, or, with --leave-out, probes on
    kinds they were not trained on.

    With --leave-out every head on every recipe, and the trivial baselines, are fitted anew for
    every value of a column that is left out, and tested on the rows of that value. A mixture is
    left out with its host, and a malicious source with its safe twin NAME_safe.
    """
    from .leave_out import LeaveOutOptions, leave_out_command

    asked = {
        "--pairs": pairs,
        "--head": head,
        "--recipe": recipe,
        "--cut": cut,
        "--calibration": calibration,
        "--folds": folds,
        "--bins": bins,
        "--edges": edges,
        "--keep-twins": keep_twins,
        "--kind": kind,
        "--out": out,
    }
    if (probe is None) == (leave_out is None):
        raise DataError(
            "expected either --probe, to measure that one, or --leave-out, to fit probes with kinds"
            " of data left out"
        )
    if leave_out is None:
        if unused := [name for name, value in asked.items() if value]:
            raise DataError(f"got {', '.join(unused)} with --probe; expected them with --leave-out")
        _evaluate_probe(manifest, str(probe), base, any_base, seed, as_json)
        return
    if any_base:
        raise DataError(
            "got --any-base with --leave-out; expected it with --probe: adapters of several base"
            " models are read where a recipe can"
        )
    recipes = {name: _recipe(name) for name in recipe or ()}
    options = LeaveOutOptions(
        leave_out, pairs, head, recipes, cut, calibration, folds, bins, edges, keep_twins
    )
    leave_out_command(manifest, kind or "factor_delta", base, seed, options, out, as_json)


def _evaluate_probe(
    manifest: Path, probe: str, base: str | None, any_base: bool, seed: int, as_json: bool
) -> None:
    from ..evaluation import evaluate as measure
    from ..manifest import read_labelled, read_manifest
    from ..probe import Probe

    detector, rows = Probe.from_pretrained(probe), read_manifest(manifest)
    adapters = read_labelled(
        track(rows, "reading", console=complaints, disable=as_json or len(rows) < 200),
        detector.featurizer.layout.kind,
        base,
    )
    labels, groups, sources = (
        [row.label for row in rows],
        [row.group for row in rows],
        [row.source for row in rows],
    )
    result = measure(
        detector, adapters, labels, groups, by=sources, seed=seed, check_base=not any_base
    )
    print(json.dumps(result.to_dict(), indent=2) if as_json else result.table())


@app.command()
@reports_errors
def embed(
    manifest: ManifestArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .npz to write the coordinates to.")],
    figure: Annotated[Path | None, typer.Option(help="A .png, .pdf or .svg to draw.")] = None,
    base: BaseOption = None,
    kind: KindOption = "factor_delta",
    recipe: RecipeOption = "all_b",
    method: Annotated[str, typer.Option(help="umap or pca.")] = "umap",
    seed: SeedOption = 0,
) -> None:
    """Two-dimensional coordinates of adapters, and a figure of them."""
    from ..featurizer import Featurizer
    from ..manifest import read_labelled, read_manifest
    from ..study.embed import Coordinates, draw_embedding, save_coordinates
    from ..study.embed import embed as coordinates_of

    rows = read_manifest(manifest)
    adapters = read_labelled(rows, kind, base)
    features = Featurizer.fit(_recipe(recipe), adapters)(adapters)
    with console.status(plain(f"{method} of {len(rows)} adapters")):
        points = coordinates_of(features, method, seed=seed)
    labels, sources = [row.label for row in rows], [row.source for row in rows]
    save_coordinates(out, points, labels, sources, method, seed)
    console.print(plain(f"wrote {out}"), soft_wrap=True)
    if figure:
        draw_embedding(figure, Coordinates(points, _array(labels), _array(sources), method, seed))
        console.print(plain(f"wrote {figure}"), soft_wrap=True)


@app.command()
@reports_errors
def inspect(
    adapter: Annotated[str, typer.Argument(help="A PEFT folder, .safetensors file or Hub id.")],
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="Show the weight change since this adapter instead."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha of a bare file.")] = None,
) -> None:
    """Spectra and norms of every adapted module, from the low-rank core."""
    from ..features import norms
    from ..manifest import read_for

    loaded = read_for("weight_delta" if base else "weights", adapter, base, alpha)
    columns = (
        Column(name, no_wrap=True)
        for name in ("shape", "rank", "Frobenius", "spectral", "stable\nrank", "effective\nrank")
    )
    table = Table(
        Column("module", overflow="fold"), *columns, "singular values", title=plain(repr(loaded))
    )
    for module, pair in loaded.items():
        values = pair.svdvals()
        measures = norms(values).tolist()
        spectrum = " ".join(f"{value:.2g}" for value in values[:8].tolist())
        table.add_row(
            plain(module),
            f"{pair.shape[0]}x{pair.shape[1]}",
            str(pair.rank),
            f"{pair.norm():.4g}",
            f"{pair.norm('spectral'):.4g}",
            f"{measures[3]:.2f}",
            f"{measures[4]:.2f}",
            spectrum,
        )
    console.print(table)
    if loaded.ignored:
        console.print(
            plain(f"left out, without effect on the adapter: {', '.join(loaded.ignored)}"),
            soft_wrap=True,
        )


def _adapter(source: str, alpha: float | None) -> Adapter:
    """An adapter by its path or Hub id.

    Org/name@revision, where no such path exists, is a revision on the Hub.
    """
    from ..adapters.peft_io import load_adapter
    from ..hub.hub import looks_like_repo_id

    repo, _, revision = source.partition("@")
    if revision and looks_like_repo_id(repo) and not Path(source).exists():
        return load_adapter(repo, revision, alpha=alpha)
    return load_adapter(source, alpha=alpha)


def _held_out(
    probe: Probe,
    adapters: list[Adapter],
    labels: list[int],
    groups: list[str],
    kinds: list[tuple[str, ...]] | None,
    folds: int,
    seed: int,
) -> list[str]:
    """AUROC with its interval and the TPRs of a probe's recipe and head on adapters of groups, or
    of kinds of data, that were held out.
    """
    from ..evaluation import report
    from ..fit.fit import held_out_scores

    training = probe.facts["training"]
    scores = held_out_scores(
        probe.featurizer(adapters),
        _array(labels),
        groups,
        head=training["head"],
        head_options=training["head_options"],
        seed=seed,
        folds=folds,
        kinds=kinds,
    )
    measured = report(labels, scores, groups, threshold=0.5, seed=seed)
    low, high = measured.auroc_ci
    return [
        f"{measured.auroc:.3f} [{low:.3f}, {high:.3f}]",
        *(f"{tpr:.3f}" for tpr in measured.tpr_at_fpr.values()),
    ]


def _exit_code(verdicts: set[str]) -> Exit:
    for verdict, code in (
        ("malicious", Exit.FLAGGED),
        ("error", Exit.BAD_INPUT),
        ("inconclusive", Exit.INCONCLUSIVE),
    ):
        if verdict in verdicts:
            return code
    return Exit.BENIGN


def _score_table(results: list[dict[str, Any]], probe: Probe) -> Table:
    colours = {"benign": "green", "malicious": "red", "inconclusive": "yellow", "error": "magenta"}
    columns = (
        Column(name, overflow="fold") for name in ("adapter", "P(malicious)", "verdict", "reason")
    )
    table = Table(*columns, title=f"threshold {probe.threshold:.3g}")
    for result in results:
        shown = "" if result["score"] is None else f"{result['score']:.4f}"
        table.add_row(
            plain(result["adapter"]),
            shown,
            Text(result["verdict"], colours[result["verdict"]]),
            plain(result["reason"]),
        )
    return table


def _recipe(text: str) -> FeatureRecipe:
    from ..featurizer import FeatureRecipe, named_recipe

    if not text.lstrip().startswith("{"):
        return named_recipe(text)
    try:
        return FeatureRecipe.from_dict(json.loads(text))
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"got a recipe that is not readable JSON ({error})") from None


def _array(values: list[Any]) -> Any:
    import numpy as np

    return np.asarray(values)
