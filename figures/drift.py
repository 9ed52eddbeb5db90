"""How the drift of the global LoRA moves AUROC and scores of updates, and spares the shadow branch.

`drift`: submitted updates over a client's participations. `shadow`: what each level reads of an
update, over rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import common
from figures.common import CUT, RECIPES, Row, chosen, read_numbers

SUBMITTED = {
    "client": "update since the round's global LoRA (client level)",
    "absolute": "submitted LoRA since the initial one",
}
LEVELS = {
    "client": "client level: update since the round's global LoRA",
    "step": "step level: the same after every local step",
    "shadow": "shadow: from the fixed initial LoRA",
    "absolute": "submitted LoRA minus the initial one",
}


def plot(
    ax: Axes, rows: Sequence[Row], time: str, ways: Mapping[str, str], apart: float, first: int = 0
) -> None:
    """Draw AUROC over time into ax, a line a way to see the update."""
    for number, (way, label) in enumerate(ways.items()):
        own = [row for row in rows if row["way"] == way]
        places = [row[time] + apart * (number - (len(ways) - 1) / 2) for row in own]
        common.points(ax, first + number, places, own, label=label)
    common.chance(ax)


def plot_scores(
    ax: Axes, rows: Sequence[Row], time: str, way: str, label: str, alpha: float, **look: Any
) -> None:
    """Draw into ax the logits over time.

    The median and the middle 80 % of malicious and of honest clients.
    """
    own = [row for row in rows if row["way"] == way]
    places = [row[time] for row in own]
    for who, (colour, marker) in zip(("honest", "malicious"), common.LINES[:2], strict=True):
        low, middle, high = zip(*(row[f"logit_{who}"] for row in own), strict=True)
        marked = {"marker": marker} if "markersize" in look else {}
        ax.plot(places, middle, color=colour, label=label.format(who), **marked, **look)
        ax.fill_between(places, low, high, color=colour, alpha=alpha, linewidth=0)


def plot_directions(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw over rounds what is left of round 1's difference between malicious and honest clients.

    Its cosine and its length.
    """
    for number, way in enumerate(LEVELS):
        if way == "step":
            continue  # the same updates as client level
        own = [row for row in rows if row["way"] == way]
        colour, marker = common.LINES[number]
        rounds = [row["round"] for row in own]
        cosines = [row["contrast_cosine"] for row in own]
        lengths = [row["contrast_norm"] / own[0]["contrast_norm"] for row in own]
        ax.plot(rounds, cosines, color=colour, marker=marker, markersize=4, linewidth=1.2)
        ax.plot(rounds, lengths, color=colour, linestyle=":", linewidth=1.2)


def draw_drift(numbers: dict[str, Any]) -> Figure:
    """The figure: a column a poison share.

    AUROC and scores of the paper's feature above those of all B.
    """
    shares = numbers["about"]["zoo_design"]["shares"]
    fig, axes = common.panels(2 * len(RECIPES), len(shares), (12.5, 9.2), sharex=True, sharey="row")
    for number, recipe in enumerate(RECIPES):
        for column, share in enumerate(shares):
            own = chosen(numbers["sampled"], recipe=recipe, share=share)
            areas, scores = axes[2 * number : 2 * number + 2, column]
            plot(areas, own, "participation", SUBMITTED, 0.16, first=2)
            label, look = "{}: median, middle 80 %", {"markersize": 4, "linewidth": 1.4}
            plot_scores(scores, own, "participation", "client", label, 0.18, **look)
            common.reference(scores, CUT)
            areas.set_title(f"{recipe}, {share:.0%} poison")
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


def draw_shadow(numbers: dict[str, Any]) -> Figure:
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
        plot(axes[0, column], own, "round", LEVELS, 0.08)
        for way, label, line, alpha in (
            ("client", "{}, update", "-", 0.18),
            ("shadow", "{}, shadow", "--", 0.08),
        ):
            look = {"linestyle": line, "linewidth": 1.5}
            plot_scores(axes[1, column], own, "round", way, label, alpha, **look)
        common.reference(axes[1, column], CUT)
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
    """drift and shadow."""
    numbers = read_numbers()
    return {"drift": draw_drift(numbers), "shadow": draw_shadow(numbers)}
