"""AUROC of every malicious source against every benign one, neither of which the head met.

A heat map a poison share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from figures import common
from figures.common import RECIPES, Row, chosen, read_numbers


def matrix(
    rows: Sequence[Row], recipe: str, share: float, malicious: Sequence[str], benign: Sequence[str]
) -> np.ndarray:
    """The AUROCs: (malicious sources, benign sources)."""
    return np.array(
        [
            [
                chosen(rows, recipe=recipe, share=share, malicious=bad, benign=good)[0]["auroc"]
                for good in benign
            ]
            for bad in malicious
        ]
    )


def plot(
    ax: Axes, values: np.ndarray, malicious: Sequence[str], benign: Sequence[str]
) -> AxesImage:
    """Draw one heat map into ax, with every number in its cell."""
    image = ax.imshow(values, cmap="cividis", vmin=0.2, vmax=1.0, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        ax.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if value < 0.62 else "black",
        )
    ax.set_xticks(
        range(len(benign)), [name.replace("_", " ") for name in benign], rotation=40, ha="right"
    )
    ax.set_yticks(range(len(malicious)), malicious)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image


def draw(numbers: dict[str, Any]) -> Figure:
    """The figure: a row a poison share, a column a recipe."""
    design, rows = numbers["about"]["zoo_design"], numbers["cross_source"]
    fig, axes = common.panels(
        len(design["shares"]), len(RECIPES), (11.0, 9.0), sharex=True, sharey=True
    )
    for line, share in zip(axes, design["shares"], strict=True):
        for ax, recipe in zip(line, RECIPES, strict=True):
            values = matrix(rows, recipe, share, design["malicious"], design["benign"])
            image: AxesImage = plot(ax, values, design["malicious"], design["benign"])
            ax.set_title(f"{recipe}, {share:.0%} poison: mean {values.mean():.2f}")
        line[0].set_ylabel("malicious source")
    for ax in axes[-1]:
        ax.set_xlabel("benign source")
    fig.colorbar(image, ax=axes, label="AUROC (0.5 is guessing)", shrink=0.5)
    full, mixed = (chosen(rows, share=share)[0] for share in (1.0, design["shares"][1]))
    common.caption(
        fig,
        f"A cell: {full['n_malicious']} malicious clients at 100 %, {mixed['n_malicious']} below,"
        f" against {full['n_benign']} benign ones; linear head, seed {numbers['about']['seed']}."
        " Intervals are in the results.",
    )
    return fig


def pictures() -> dict[str, Figure]:
    """cross_source."""
    return {"cross_source": draw(read_numbers())}
