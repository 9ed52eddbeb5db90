"""Points of a two-dimensional embedding: drawn so that no class covers another, and judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from sklearn.neighbors import NearestNeighbors

from loraprobe.metrics import auroc

NEIGHBOURS = 15
LAYERS = 4  # the points are drawn in so many layers, each with some of every kind
# name, colour or colours (n, 4), marker, (n,) which points
Kind = tuple[str, Any, str, np.ndarray]


def plot(ax: Axes, coordinates: np.ndarray, kinds: Sequence[Kind], size: float = 11) -> None:
    """Scatter coordinates (n, 2) into ax, kinds interleaved in one random order."""
    layer = np.random.default_rng(0).integers(LAYERS, size=len(coordinates))
    for number in range(LAYERS):
        for _, colour, marker, rows in kinds:
            here = np.flatnonzero(rows & (layer == number))
            if len(here):
                x, y = coordinates[here].astype(float).T
                ax.scatter(
                    x,
                    y,
                    s=size,
                    c=colour if isinstance(colour, str) else colour[here],
                    marker=marker,
                    linewidths=0.25,
                    edgecolors="white",
                    zorder=2 + number / LAYERS,
                )
    ax.set(xticks=[], yticks=[])


def separability(coordinates: np.ndarray, malicious: np.ndarray) -> float:
    """AUROC of how many of a point's nearest neighbours are malicious; 0.5 is mixed wholly.

    Args:
        coordinates: (n, 2); malicious: (n,) of bool. A point is no neighbour of its own.
    """
    near = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(coordinates.astype(float))
    neighbours = near.kneighbors(return_distance=False)
    return auroc(malicious.astype(int), malicious[neighbours].mean(axis=1))


def handle(marker: str, colour: str, label: str) -> Line2D:
    """The entry of a kind of points in a legend."""
    return Line2D([], [], marker=marker, color=colour, label=label, linestyle="", markersize=6)
