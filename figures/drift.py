"""How the drift of the global LoRA moves AUROC and scores of submitted updates, over a client's
participations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import common
from figures.common import CUT, RECIPES, Row, chosen, read_numbers

WAYS = {
    "client": "update since the round's global LoRA (client level)",
    "absolute": "submitted LoRA since the initial one",
}


def plot(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw AUROC over participations into ax, a line a start point."""
    for number, (way, label) in enumerate(WAYS.items()):
        own = [row for row in rows if row["way"] == way]
        places = [row["participation"] + 0.16 * (number - 0.5) for row in own]
        common.points(ax, 2 + number, places, own, label=label)
    common.chance(ax)


def plot_scores(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw into ax the logits of the update over participations.

    The median and the middle 80 % of malicious and of honest clients.
    """
    own = [row for row in rows if row["way"] == "client"]
    places = [row["participation"] for row in own]
    for who, (colour, marker) in zip(("honest", "malicious"), common.LINES[:2], strict=True):
        low, middle, high = zip(*(row[f"logit_{who}"] for row in own), strict=True)
        look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}
        ax.plot(places, middle, label=f"{who}: median, middle 80 %", **look)
        ax.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    common.reference(ax, CUT)


def draw(numbers: dict[str, Any]) -> Figure:
    """The figure: a column a poison share.

    AUROC and scores of the paper's feature above those of all B.
    """
    shares = numbers["about"]["zoo_design"]["shares"]
    fig, axes = common.panels(2 * len(RECIPES), len(shares), (12.5, 9.2), sharex=True, sharey="row")
    for number, recipe in enumerate(RECIPES):
        for column, share in enumerate(shares):
            own = chosen(numbers["sampled"], recipe=recipe, share=share)
            plot(axes[2 * number, column], own)
            plot_scores(axes[2 * number + 1, column], own)
            axes[2 * number, column].set_title(f"{recipe}, {share:.0%} poison")
        axes[2 * number, 0].set_ylabel("AUROC\nwithin a federation")
        axes[2 * number + 1, 0].set_ylabel("logit of the update\n(dotted line: P = 0.8)")
    for ax in axes[-1]:
        ax.set_xlabel("participation of the client")
    common.legend_above(fig, axes[0, 0], 1)
    common.legend_above(fig, axes[1, 0], 1, side="right")
    row = numbers["sampled"][0]
    common.caption(
        fig,
        f"A point: {row['federations']} undefended federations of 48 clients, one malicious source"
        f" each; {row['n_malicious']} malicious clients of the share and {row['n_benign']} honest"
        " ones (hard negatives among them);\nlinear heads that met neither the malicious source"
        f" nor its twin; 95 % client-bootstrap intervals, seed {numbers['about']['seed']}.",
    )
    return fig


def pictures() -> dict[str, Figure]:
    """drift."""
    return {"drift": draw(read_numbers())}
