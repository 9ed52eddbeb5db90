"""Where clients' updates lie from one participation to the next, seen from the round's global LoRA
and from the initial one.

python -m figures.rounds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.lines import Line2D

from figures import style
from figures.arrays import read_coordinates
from figures.options import folder_of

WAYS = {"client": "since the round's global LoRA", "absolute": "since the initial LoRA"}
METHODS = {"pca": "PCA", "umap15": "UMAP, 15 neighbours"}
MARKERS = (("honest", "o", 0), ("malicious", "^", 1))


def plot(
    ax: Axes,
    coordinates: np.ndarray,
    rounds: np.ndarray,
    labels: np.ndarray,
    colours: ScalarMappable,
) -> None:
    """Scatter coordinates (n, 2) into ax: the colour says the round, the marker who."""
    for _, marker, label in MARKERS:
        rows = labels == label
        x, y = coordinates[rows].astype(float).T
        ax.scatter(
            x, y, s=16, c=colours.to_rgba(rounds[rows]), marker=marker, linewidths=0, alpha=0.85
        )
    ax.set(xticks=[], yticks=[])


def draw(arrays: Mapping[str, np.ndarray]) -> Any:
    """The figure: a row a way to see the client, a column a method."""
    rounds, labels = arrays["rounds_participation"].astype(int), arrays["rounds_label"]
    norm = BoundaryNorm(np.arange(0.5, rounds.max() + 1), rounds.max())
    colours = ScalarMappable(norm, colormaps["viridis"].resampled(int(rounds.max())))
    fig, axes = style.panels(len(WAYS), len(METHODS), (10.5, 8.0))
    for line, (way, title) in zip(axes, WAYS.items(), strict=True):
        for ax, (method, name) in zip(line, METHODS.items(), strict=True):
            plot(ax, arrays[f"rounds_{way}_{method}"], rounds, labels, colours)
            ax.set_title(f"{title}: {name}")
    fig.colorbar(
        colours, ax=axes, label="participation", shrink=0.5, ticks=range(1, rounds.max() + 1)
    )
    handles = [
        Line2D([], [], linestyle="", marker=marker, color="#555555", markersize=6, label=name)
        for name, marker, _ in MARKERS
    ]
    axes[0, 0].legend(handles=handles, loc="best", frameon=False)
    federations = len(set(arrays["rounds_source"].tolist()))
    style.caption(
        fig,
        f"B of all layers, L2-normalised; {federations} undefended federations of 48 clients with"
        f" {rounds.max()} participations each: {len(labels)} points a panel"
        f" ({int((labels == 1).sum())} malicious, at any share); seed {int(arrays['seed'])}. No"
        " label was used to place a point.",
    )
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    """Write rounds.png and rounds.pdf."""
    style.save_both(draw(read_coordinates()), folder_of("rounds", __doc__, argv), "rounds", dpi=100)


if __name__ == "__main__":
    main()
