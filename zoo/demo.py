"""The main job in a minute: score real adapters with the zoo's probes and draw them.

    python -m zoo.demo

First adapters of SmolLM2-135M-Instruct (the one that was taught to refuse), from initial adapters,
of a rank and partly of kinds of data that no probe was fitted on; scoring needs no base model. Then
those of the zoo's own chat-1m, whose kinds of data the probes have met. How probes do on kinds that
they have not met is in zoo/smollm2.md, zoo/records and zoo/README.md.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from figures import separability
from loraprobe import Adapter, EvalReport, FeatureRecipe, Featurizer, Probe, evaluate
from loraprobe.manifest import Row, read_labelled, read_manifest
from loraprobe.study.embed import embed

ZOO = Path(__file__).parent
OUT = Path("out")
SEED = 0
REAL_BASE = "smollm2-135m-safe"
HEADS = ("linear", "mass_mean", "mlp", "xgboost")


def main() -> None:
    """Load, score, print, draw."""
    console = Console()
    _real_base(console)
    started = time.monotonic()
    rows = read_manifest(ZOO / "adapters/manifest.csv")
    adapters = read_labelled(
        track(rows, "reading adapters", console=console), "factor_delta", ZOO / "adapters/initial"
    )
    folders = sorted(path.parent for path in (ZOO / "probes").glob("*/config.json"))
    probes = {path.name: Probe.from_pretrained(path) for path in folders}
    reports = {
        name: _measure(probe, adapters, rows)
        for name, probe in track(probes.items(), "scoring", console=console)
    }
    title = f"chat-1m: {len(rows)} adapters of clients no probe was fitted on, of kinds that were"
    console.print(_summary(reports, title))
    console.print(_by_source(reports))
    OUT.mkdir(exist_ok=True)
    with console.status("UMAP (its first import takes a while)"):
        features = Featurizer.fit(FeatureRecipe.all_b(), adapters)(adapters)
        labels, sources = [row.label for row in rows], [row.source for row in rows]
        points = embed(features, "umap", seed=SEED)
        separability.draw(OUT / "separability.png", points, labels, sources, "umap", SEED)
    console.print(
        f"{len(rows)} adapters scored by {len(probes)} probes in {time.monotonic() - started:.0f}"
        f" s; figure: {OUT / 'separability.png'}"
    )


def _real_base(console: Console) -> None:
    """Score the adapters of SmolLM2: from their weights alone, whatever their initial adapter."""
    folder = ZOO / "adapters" / REAL_BASE
    rows = read_manifest(folder / "manifest.csv")
    adapters = read_labelled(rows, "weights", None)
    kinds = [f"{row.role}, {row.share:.0%}" if row.label else row.role for row in rows]
    reports: dict[str, EvalReport] = {}
    for head in HEADS:
        probe = Probe.from_pretrained(ZOO / "probes" / REAL_BASE / head)
        labels = [row.label for row in rows]
        groups = [row.group for row in rows]
        reports[head] = evaluate(probe, adapters, labels, groups, by=kinds, seed=SEED)
    title = f"{REAL_BASE}: {len(rows)} adapters that no probe was fitted on"
    console.print(_summary(reports, title))
    console.print(_by_source(reports))


def _measure(probe: Probe, adapters: list[Adapter], rows: list[Row]) -> EvalReport:
    return evaluate(
        probe,
        adapters,
        [row.label for row in rows],
        [row.group for row in rows],
        by=[row.source for row in rows],
        seed=SEED,
    )


def _summary(reports: dict[str, EvalReport], title: str) -> Table:
    table = Table("probe", "AUROC [95 %]", "flagged of malicious", "flagged of benign", "threshold")
    table.title = title
    for name, report in reports.items():
        low, high = report.auroc_ci
        table.add_row(
            name,
            f"{report.auroc:.3f} [{low:.3f}, {high:.3f}]",
            f"{report.tpr:.0%}",
            f"{report.fpr:.0%}",
            f"{report.threshold:.3f}",
        )
    return table


def _by_source(reports: dict[str, EvalReport]) -> Table:
    """Flagged adapters of every source; gptfuzz@0.25 is a client with 25 % of its data poisoned."""
    table = Table(
        "data of the client",
        "adapters",
        *reports,
        title="share flagged as malicious, by what the client trained on",
    )
    columns = [{row.name: row for row in report.by} for report in reports.values()]
    names = list(columns[0])  # benign names first
    for name, following in zip(names, [*names[1:], names[-1]], strict=True):
        flagged = [f"{column[name].flagged:.0%}" for column in columns]
        table.add_row(
            name,
            str(columns[0][name].n),
            *flagged,
            end_section=columns[0][name].label != columns[0][following].label,
        )
    return table


if __name__ == "__main__":
    main()
