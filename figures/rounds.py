"""Where clients' updates lie from one participation to the next, from two start points.

Seen from the round's global LoRA, and from the initial one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from figures import common, points

WAYS = {"client": "since the round's global LoRA", "absolute": "since the initial LoRA"}
METHODS = {"pca": "PCA", "umap15": "UMAP, 15 neighbours"}
MARKERS = (("honest", "o", 0), ("malicious", "^", 1))


def draw(arrays: Mapping[str, np.ndarray]) -> Figure:
    """The figure: a row a way to see the client, a column a method."""
    rounds = arrays["rounds_participation"].astype(int)
    labels = arrays["rounds_label"]
    last = int(rounds.max())
    colours = ScalarMappable(
        BoundaryNorm(np.arange(0.5, last + 1), last), colormaps["viridis"].resampled(last)
    )
    shades = colours.to_rgba(rounds)
    drawn = [(name, shades, marker, labels == label) for name, marker, label in MARKERS]
    fig, axes = common.panels(len(WAYS), len(METHODS), (10.5, 8.0))
    for line, (way, title) in zip(axes, WAYS.items(), strict=True):
        for ax, (method, name) in zip(line, METHODS.items(), strict=True):
            coordinates = arrays[f"rounds_{way}_{method}"]
            points.plot(ax, coordinates, drawn, size=18)
            number = points.separability(coordinates, labels == 1)
            ax.set_title(f"{title}: {name}: {number:.2f}")
    fig.colorbar(colours, ax=axes, label="participation", shrink=0.5, ticks=range(1, last + 1))
    axes[0, 0].legend(
        handles=[points.handle(marker, "#555555", name) for name, marker, _ in MARKERS],
        loc="best",
        frameon=False,
    )
    federations = len(set(arrays["rounds_source"].tolist()))
    common.caption(
        fig,
        f"B of all layers, L2-normalised; {federations} undefended federations of 48 clients with"
        f" {last} participations each: {len(labels)} points a panel"
        f" ({int((labels == 1).sum())} malicious, at any share); seed {int(arrays['seed'])}.\nNo"
        " label was used to place a point. Numbers: AUROC of malicious against honest by how many"
        f" of the {points.NEIGHBOURS} nearest points in that panel are malicious; 0.5 is mixed.",
    )
    return fig


def pictures() -> dict[str, Figure]:
    """rounds."""
    return {"rounds": draw(common.read_coordinates())}
