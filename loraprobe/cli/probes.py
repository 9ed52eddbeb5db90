"""`loraprobe score` and `inspect`. The library is imported inside: help must be quick."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from ..errors import KindMismatch, LoraprobeError
from .options import AnyBaseOption, BaseOption, read_probe
from .terminal import (
    Exit,
    JsonOption,
    ProbeOption,
    RevisionOption,
    SubfolderOption,
    app,
    console,
    plain,
    reports_errors,
    tracked,
)

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..probe import Probe


MOST_MODULES = 32  # that inspect shows a line of each
_VERDICTS = {
    "benign": "benign",
    "malicious": "malicious",
    "inconclusive": "inconclusive",
    "error": "not scored",
}


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
    """Score adapters: exit code 0 if all are benign, 3 if some are flagged.

    4 if some are inconclusive, 2 if some are unreadable; the gravest applies, 3 before 2 before 4.
    """
    from ..adapters.kinds import FRESH, as_kind

    detector = read_probe(probe, subfolder, revision)
    kind = detector.featurizer.kind_since(base)
    if base is not None and kind == "weights" and not detector.featurizer.recipe.reads_product:
        raise KindMismatch(
            f"got --base {base}; the probe scores adapters as they are (kind 'weights') and has no"
            " use for it. Leave --base out."
        )
    before = base if base in (None, FRESH) else _adapter(base, alpha)
    results: list[dict[str, Any]] = []
    for name in adapters if as_json else tracked(adapters, "scoring", len(adapters), least=20):
        result = {"adapter": name, "commit": None}
        try:
            adapter = _adapter(name, alpha)
            result["commit"] = adapter.commit
            if not any_base:
                detector.check_base_model(adapter)  # before anything that follows from another base
            if kind == "weights":
                detector.featurizer.check_unread(adapter)
            else:
                adapter.check_finite()  # also of what the probe does not read
            scored = as_kind(adapter, kind, before)
            [verdict] = detector.verdicts([scored], check_base=not any_base)
            results.append(
                {
                    **result,
                    "score": verdict.score,
                    "verdict": verdict.label,
                    "reason": verdict.reason,
                    "coverage": str(verdict.coverage),
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
        console.print(_total(results))
    raise typer.Exit(code)


@app.command()
@reports_errors
def inspect(
    adapter: Annotated[str, typer.Argument(help="A PEFT folder, .safetensors file or Hub id.")],
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="Show the weight change since this adapter instead."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha of a bare file.")] = None,
    every: Annotated[bool, typer.Option("--all", help="A line a module, however many.")] = False,
) -> None:
    """Spectra and norms of every adapted module, in the order of the layers.

    From the low-rank core. Of more than 32 modules a line a layer, without --all.
    """
    from ..adapters.kinds import as_kind

    kind = "weights" if base is None else "weight_delta"
    loaded = _adapter(adapter, alpha)
    loaded.check_finite()  # names the module
    shown = as_kind(loaded, kind, base, alpha)
    short = len(shown) > MOST_MODULES and not every
    console.print(_by_layer(shown) if short else _by_module(shown))
    if short:
        console.print(f"{len(shown)} modules; a line each with --all")
    if shown.ignored:
        console.print(
            plain(f"left out, without effect on the adapter: {', '.join(shown.ignored)}"),
            soft_wrap=True,
        )


def _in_order(adapter: Adapter) -> list[tuple[int | None, str]]:
    """Layer and module, in the order of the layers; those in no layer come first."""
    from ..adapters.layout import layer_of

    layers = {module: layer_of(module) for module in adapter}
    order = sorted(adapter, key=lambda module: -1 if (n := layers[module]) is None else n)
    return [(layers[module], module) for module in order]


def _by_module(adapter: Adapter) -> Table:
    """A line a module: norms and leading singular values."""
    from ..features import norms

    columns = (
        Column(name, no_wrap=True)
        for name in ("shape", "rank", "Frobenius", "spectral", "stable\nrank", "effective\nrank")
    )
    table = Table(
        Column("module", overflow="fold"), *columns, "singular values", title=plain(repr(adapter))
    )
    for _, module in _in_order(adapter):
        pair = adapter[module]
        values = pair.svdvals()
        measures = norms(values).tolist()
        spectrum = " ".join(f"{value:.2g}" for value in values[:8].tolist())
        table.add_row(
            plain(module),
            f"{pair.shape[0]}x{pair.shape[1]}",
            str(pair.rank),
            f"{math.hypot(*values):.4g}",
            f"{values[0]:.4g}",
            f"{measures[3]:.2f}",
            f"{measures[4]:.2f}",
            spectrum,
        )
    return table


def _by_layer(adapter: Adapter) -> Table:
    """A line a layer: norm of its whole change, largest spectral norm, mean stable rank."""
    from itertools import groupby

    from ..features import leaf_name, norms

    names = ("layer", "modules", "rank", "Frobenius", "spectral", "stable\nrank", "most changed")
    table = Table(*(Column(name, no_wrap=True) for name in names), title=plain(repr(adapter)))
    for layer, group in groupby(_in_order(adapter), key=lambda entry: entry[0]):
        modules = [module for _, module in group]
        spectra = [adapter[module].svdvals() for module in modules]
        lengths = [math.hypot(*values) for values in spectra]
        ranks = sorted({adapter[module].rank for module in modules})
        table.add_row(
            "" if layer is None else str(layer),
            str(len(modules)),
            ", ".join(map(str, ranks)),
            f"{math.hypot(*lengths):.4g}",
            f"{max(values[0] for values in spectra):.4g}",
            f"{sum(norms(values)[3] for values in spectra) / len(spectra):.2f}",
            plain(leaf_name(modules[lengths.index(max(lengths))])),
        )
    return table


def _adapter(source: str, alpha: float | None) -> Adapter:
    """An adapter by its path or Hub id.

    Org/name@revision, where no such path exists, is a revision on the Hub.
    """
    from ..adapters.load import load_adapter
    from ..hub.names import looks_like_repo_id

    repo, _, revision = source.partition("@")
    if revision and looks_like_repo_id(repo) and not os.path.exists(source):
        return load_adapter(repo, revision, alpha=alpha)
    return load_adapter(source, alpha=alpha)


def _exit_code(verdicts: set[str]) -> Exit:
    for verdict, code in (
        ("malicious", Exit.FLAGGED),
        ("error", Exit.BAD_INPUT),
        ("inconclusive", Exit.INCONCLUSIVE),
    ):
        if verdict in verdicts:
            return code
    return Exit.BENIGN


def _total(results: list[dict[str, Any]]) -> str:
    """How many of what: "43 adapters: 21 benign, 20 malicious, 2 inconclusive"."""
    counts = Counter(result["verdict"] for result in results)
    shown = [f"{counts[verdict]} {word}" for verdict, word in _VERDICTS.items() if counts[verdict]]
    return f"{len(results)} adapter{'s'[: len(results) != 1]}: {', '.join(shown)}"


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
