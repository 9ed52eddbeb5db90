"""Mixed poison: what an attack breaks beside how well it is told, and what participations tell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import common
from figures.common import LINES, RESULTS, Row

READER = "mass-mean"
BASES = ("chat-1m", "chat-600k")
LOWEST = 0.45  # of every axis of AUROCs


def read_rows(name: str) -> Any:
    """One of the files that the programs of paper_repro.mixed wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    command = f"paper_repro.mixed.{name.removeprefix('mixed_')}"
    return common.read_json(RESULTS / f"{name}.json", command)


def damages(rows: Sequence[Row], base: str) -> dict[str, float]:
    """Malicious source -> points of refusal that three times its mean update takes."""
    refused = {
        (row["source"], row["times"]): 100 * row["refused"] / row["n"]
        for row in rows
        if row["model"] == base
    }
    before = next(value for (source, _), value in refused.items() if source is None)
    return {source: before - value for (source, times), value in refused.items() if times == 3.0}


def plot_damage(ax: Axes, damage: Sequence[Row], cells: Sequence[Row]) -> None:
    """AUROC at full poison, mean over cells, a line a malicious source; beside it the damage."""
    sources = list(dict.fromkeys(row["malicious"] for row in cells))
    for number, base in enumerate(BASES):
        colour, marker = LINES[number]
        taken = damages(damage, base)
        for place, source in enumerate(sources):
            wanted = {"model": base, "reader": READER, "malicious": source, "share": 1.0}
            value = mean(row["auroc"] for row in common.chosen(cells, **wanted))
            height = place + 0.18 * (2 * number - 1)
            label = base if place == 0 else None
            ax.plot(value, height, marker, color=colour, linestyle="", label=label, clip_on=False)
            text = f"takes {max(taken[source], 0):.0f} points"
            ax.text(value - 0.015, height, text, ha="right", va="center", color=colour, fontsize=8)
    ax.axvline(0.5, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    ax.set_yticks(range(len(sources)), sources)
    ax.set_ylim(len(sources) - 0.5, -0.5)
    ax.set_xlim(LOWEST, 1.0)
    ax.set_xlabel("AUROC at 100 % poison, everything unseen")


def plot_rounds(ax: Axes, federations: Sequence[Row], base: str, averaged: str) -> None:
    """AUROC of the mean direction over participations; a line a poison share.

    The mean over federations with an attack that does damage.
    """
    wanted = {"model": base, "averaged": averaged, "reader": READER}
    rows = [row for row in common.chosen(federations, **wanted) if row["malicious"] != "gptfuzz"]
    for number, entry in enumerate(rows[0]["auroc"]):
        curves = [row["auroc"][number]["by_participation"] for row in rows]
        look = {"markersize": 8 - 2 * number}  # where lines lie on each other, all can be seen
        common.band(ax, number, curves, f"{entry['share']:.0%} poison", **look)
    common.chance(ax)
    ax.set_title(f"{base}, {averaged} averaged ({len(rows)} federations)", pad=10)
    ax.set_xlabel("participations")
    ax.set_ylabel("AUROC within a federation")
    ax.set_ylim(LOWEST, 1.0)


def pictures() -> dict[str, Figure]:
    """mixed."""
    damage = read_rows("mixed_damage")["damage"]
    cells = read_rows("mixed_grid")
    federations = [row for name in ("mixed_accumulated", "mixed_fresh") for row in read_rows(name)]
    fig, axes = common.panels(2, 3, (13.0, 7.6))
    plot_damage(axes[0, 0], damage, cells)
    kinds = product(BASES, ("all", "honest"))
    for ax, (base, averaged) in zip(axes[:, 1:].flat, kinds, strict=True):
        plot_rounds(ax, federations, base, averaged)
    axes[1, 0].axis("off")
    for title, ax, place in (("above", axes[0, 0], 0.75), ("on the right", axes[0, 1], 0.35)):
        fig.legend(
            *ax.get_legend_handles_labels(),
            title=title,
            loc="center",
            bbox_to_anchor=(0.5, place),
            bbox_transform=axes[1, 0].transAxes,
            frameon=False,
        )
    common.caption(
        fig,
        "Mass-mean reader; malicious source, safe answers to its questions and the honest kind"
        " unseen. Left: a point is the mean of 13 cells; points: of refusal, lost to three times"
        " the mean update of the source.\nRight: without GPTFuzz; 5 malicious clients a share and"
        " 28 honest ones (10 hard negatives) a federation; bands: lowest and highest federation.",
    )
    return {"mixed": fig}
