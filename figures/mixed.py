"""Mixed poison: what an attack breaks against how well an unseen one is told, and what more
participations tell.

python -m figures.mixed
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from typing import Any

from matplotlib.axes import Axes

from figures import style
from figures.arrays import RESULTS, Row
from figures.options import folder_of
from loraprobe.errors import DataError

READER = "mass-mean"
BASES = ("chat-1m", "chat-600k")


def read_rows(name: str) -> Any:
    """One of the files that the programs of paper_repro.mixed wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {RESULTS / name}.json: {error}. Write it with python -m"
            f" paper_repro.mixed.{name.removeprefix('mixed_')}"
        ) from None


def plot_damage(ax: Axes, damage: Sequence[Row], cells: Sequence[Row]) -> None:
    """AUROC at full poison, mean over cells, over the refusals that three times the mean update
    takes; a point a base and malicious source.
    """
    for (colour, marker), base in zip(style.LINES, BASES, strict=False):
        before = next(
            row["refused"] / row["n"]
            for row in damage
            if row["model"] == base and row["source"] is None
        )
        points = []
        for source in dict.fromkeys(row["malicious"] for row in cells):
            after = next(
                row["refused"] / row["n"]
                for row in damage
                if (row["model"], row["source"], row["times"]) == (base, source, 3.0)
            )
            found = [
                r["auroc"]
                for r in cells
                if (r["model"], r["reader"], r["malicious"], r["share"])
                == (base, READER, source, 1.0)
            ]
            points.append((100 * (before - after), sum(found) / len(found), source))
        ax.plot(
            [x for x, *_ in points],
            [y for _, y, _ in points],
            color=colour,
            marker=marker,
            linestyle="",
            label=base,
        )
        for x, y in dict.fromkeys((x, y) for x, y, _ in points):
            names = "\n".join(
                source
                for one, other, source in points
                if abs(one - x) < 3 and abs(other - y) < 0.02
            )
            below = base == BASES[0]
            place = {
                "xytext": (3, -5 if below else 5),
                "va": "top" if below else "bottom",
                "rotation": -30 if below else 30,
            }
            ax.annotate(
                names, (x, y), textcoords="offset points", fontsize=7, color=colour, **place
            )
    style.chance(ax)
    ax.set_xlabel("points of refusal that three times its mean update takes")
    ax.set_ylabel("AUROC at 100 % poison, everything unseen")
    ax.set_xlim(-8, 140)
    ax.set_ylim(0.45, 1.2)
    ax.legend(loc="lower right", frameon=False)


def plot_rounds(ax: Axes, federations: Sequence[Row], base: str, averaged: str) -> None:
    """AUROC of the mean direction over participations, the mean over federations with an attack
    that does damage; a line a poison share.
    """
    own = [
        row
        for row in federations
        if (row["model"], row["averaged"], row["reader"]) == (base, averaged, READER)
        and row["malicious"] != "gptfuzz"
    ]
    for number, (colour, marker) in zip(range(len(own[0]["auroc"])), style.LINES, strict=False):
        curves = [row["auroc"][number]["by_participation"] for row in own]
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        share = own[0]["auroc"][number]["share"]
        ax.plot(
            range(1, len(mean) + 1),
            mean,
            color=colour,
            marker=marker,
            markersize=4,
            label=f"{share:.0%} poison",
        )
        low, high = (list(map(pick, zip(*curves, strict=True))) for pick in (min, max))
        ax.fill_between(range(1, len(mean) + 1), low, high, color=colour, alpha=0.12, linewidth=0)
    style.chance(ax)
    ax.set_title(f"{base}, {averaged} averaged ({len(own)} federations)")
    ax.set_xlabel("participations")
    ax.set_ylim(0.45, 1.04)


def main(argv: Sequence[str] | None = None) -> None:
    """Write mixed.png and mixed.pdf."""
    damage, cells = read_rows("mixed_damage")["damage"], read_rows("mixed_grid")
    federations = [row for name in ("mixed_accumulated", "mixed_fresh") for row in read_rows(name)]
    fig, axes = style.panels(2, 3, (13.0, 7.6))
    plot_damage(axes[0, 0], damage, cells)
    for ax, (base, averaged) in zip(
        axes[:, 1:].flat, product(BASES, ("all", "honest")), strict=True
    ):
        plot_rounds(ax, federations, base, averaged)
        ax.set_ylabel("AUROC within a federation")
    axes[1, 0].axis("off")
    axes[1, 0].legend(
        *axes[0, 1].get_legend_handles_labels(), title="on the right", loc="center", frameon=False
    )
    style.caption(
        fig,
        "Mass-mean reader; malicious source, safe answers to its questions and the honest kind"
        " unseen. Left: a point is the mean of 13 cells.\nRight: without GPTFuzz; 5 malicious"
        " clients a share and 28 honest ones (10 hard negatives) a federation; bands: lowest and"
        " highest federation.",
    )
    style.save_both(fig, folder_of("mixed", __doc__, argv), "mixed", dpi=110)


if __name__ == "__main__":
    main()
