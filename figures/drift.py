"""How the drift of the global LoRA moves AUROC and scores of submitted updates, over a client's
participations.

python -m figures.drift
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from figures import style
from figures.arrays import Row, bars, chosen, read_numbers
from figures.options import folder_of

RECIPES = ("paper (B, first layer)", "all B")
WAYS = {
    "client": "update since the round's global LoRA (client level)",
    "absolute": "submitted LoRA since the initial one",
}
CUT = 1.3863  # the logit of 0.8, the paper's threshold


def plot(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw AUROC over participations into ax, a line a start point."""
    for number, (way, label) in enumerate(WAYS.items()):
        own = [row for row in rows if row["way"] == way]
        values, ends = bars(own)
        colour, marker = style.LINES[2 + number]
        places = [row["participation"] + 0.16 * (number - 0.5) for row in own]
        ax.errorbar(
            places,
            values,
            ends,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=label,
        )
    style.chance(ax)


def plot_scores(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw into ax the logits of the update over participations.

    The median and the middle 80 % of malicious and of honest clients.
    """
    own = [row for row in rows if row["way"] == "client"]
    places = [row["participation"] for row in own]
    for who, (colour, marker) in zip(("honest", "malicious"), style.LINES[:2], strict=True):
        low, middle, high = zip(*(row[f"logit_{who}"] for row in own), strict=True)
        ax.plot(
            places,
            middle,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            label=f"{who}: median, middle 80 %",
        )
        ax.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    ax.axhline(CUT, color="#999999", linewidth=0.8, linestyle=":", zorder=0)


def draw(numbers: dict[str, Any]) -> Any:
    """The figure: a column a poison share.

    AUROC and scores of the paper's feature above those of all B.
    """
    shares = numbers["about"]["zoo_design"]["shares"]
    fig, axes = style.panels(2 * len(RECIPES), len(shares), (12.5, 9.2), sharex=True, sharey="row")
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
    style.legend_above(fig, axes[0, 0], 1)
    fig.legend(
        *axes[1, 0].get_legend_handles_labels(),
        loc="outside upper right",
        frameon=False,
        fontsize=8.5,
    )
    row = numbers["sampled"][0]
    style.caption(
        fig,
        f"A point: {row['federations']} undefended federations of 48 clients, one malicious source"
        f" each; {row['n_malicious']} malicious clients of the share and {row['n_benign']} honest"
        " ones (hard negatives among them);\nlinear heads that met neither the malicious source"
        f" nor its twin; 95 % client-bootstrap intervals, seed {numbers['about']['seed']}.",
    )
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    """Write drift.png and drift.pdf."""
    style.save_both(draw(read_numbers()), folder_of("drift", __doc__, argv), "drift", dpi=110)


if __name__ == "__main__":
    main()
