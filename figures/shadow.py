"""How the drift of the global LoRA breaks what step- and client-level read, and why the shadow
branch is spared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import common
from figures.common import CUT, RECIPES, Row, chosen, read_numbers

WAYS = {
    "client": "client level: update since the round's global LoRA",
    "step": "step level: the same after every local step",
    "shadow": "shadow: from the fixed initial LoRA",
    "absolute": "submitted LoRA minus the initial one",
}


def plot(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw AUROC over rounds, a line a way to see the update."""
    for number, (way, label) in enumerate(WAYS.items()):
        own = [row for row in rows if row["way"] == way]
        places = [row["round"] + 0.08 * (number - 1.5) for row in own]
        common.points(ax, number, places, own, label=label)
    common.chance(ax)


def plot_scores(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw the logits over rounds.

    The median and the middle 80 % of malicious and of honest clients, update and shadow.
    """
    for way, line, alpha in (("client", "-", 0.18), ("shadow", "--", 0.08)):
        own = [row for row in rows if row["way"] == way]
        rounds = [row["round"] for row in own]
        for who, (colour, _) in zip(("honest", "malicious"), common.LINES[:2], strict=True):
            low, middle, high = zip(*(row[f"logit_{who}"] for row in own), strict=True)
            label = f"{who}, {'update' if way == 'client' else way}"
            ax.plot(rounds, middle, line, color=colour, linewidth=1.5, label=label)
            ax.fill_between(rounds, low, high, color=colour, alpha=alpha, linewidth=0)
    common.reference(ax, CUT)


def plot_directions(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw over rounds what is left of round 1's difference between malicious and honest clients.

    Its cosine and its length.
    """
    for number, way in enumerate(WAYS):
        if way == "step":
            continue  # the same updates as client level
        own = [row for row in rows if row["way"] == way]
        colour, marker = common.LINES[number]
        rounds = [row["round"] for row in own]
        cosines = [row["contrast_cosine"] for row in own]
        lengths = [row["contrast_norm"] / own[0]["contrast_norm"] for row in own]
        ax.plot(rounds, cosines, color=colour, marker=marker, markersize=4, linewidth=1.2)
        ax.plot(rounds, lengths, color=colour, linestyle=":", linewidth=1.2)


def draw(numbers: dict[str, Any]) -> Figure:
    """The figure: a column a recipe and poison share.

    AUROC, scores and directions below each other.
    """
    rows = numbers["drift"]
    shares = list(dict.fromkeys(row["share"] for row in rows))
    fig, axes = common.panels(3, len(RECIPES) * len(shares), (13.0, 8.4), sharex=True, sharey="row")
    for column, (recipe, share) in enumerate(
        (recipe, share) for recipe in RECIPES for share in shares
    ):
        own = chosen(rows, recipe=recipe, share=share)
        plot(axes[0, column], own)
        plot_scores(axes[1, column], own)
        plot_directions(axes[2, column], own)
        axes[0, column].set_title(f"{recipe}, {share:.0%} poison")
        axes[2, column].set_xlabel("round")
    axes[0, 0].set_ylabel("AUROC\nwithin a federation")
    axes[1, 0].set_ylabel("logit\n(dotted line: P = 0.8)")
    axes[2, 0].set_ylabel("malicious minus honest mean,\nagainst round 1:\ncosine (dotted: length)")
    common.legend_above(fig, axes[0, 0], 2)
    common.legend_above(fig, axes[1, 0], 2, side="right")
    row = rows[0]
    common.caption(
        fig,
        f"A point: {row['federations']} undefended federations of one malicious source each,"
        f" {row['n_malicious']} malicious and {row['n_benign']} honest clients (a refuser among"
        " them), heads that never met the malicious source;\nAUROC with 95 % client-bootstrap"
        f" intervals; bands: the middle 80 % of clients. AdamW at {numbers['about']['drift_lr']:g},"
        f" seed {numbers['about']['seed']}. In round 1 update and shadow are the same.",
    )
    return fig


def pictures() -> dict[str, Figure]:
    """shadow."""
    return {"shadow": draw(read_numbers())}
