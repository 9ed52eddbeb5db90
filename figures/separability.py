"""How far benign and malicious adapters lie apart: the scatter plot of a 2-D embedding.

A colour and marker a source: benign ones are cool circles, hard negatives grey squares, malicious
ones warm and angular, and the paler the lower the poison share in their name ("gptfuzz@0.25").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

from figures import common
from loraprobe.colours import BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS

_KINDS = {
    "benign": (BENIGN_COLOURS, "o"),
    "benign, hard negatives": (HARD_COLOURS, "s"),
    "malicious": (MALICIOUS_COLOURS, ("X", "^", "P", "v", "*", "<")),
}
_AXES = {
    "umap": "UMAP {} (who is near whom counts; distances between islands mean nothing)",
    "pca": "principal component {}",
}


@dataclass(frozen=True)
class _Family:
    """The rows of one source at any poison share, and how they are drawn."""

    name: str
    kind: str
    rows: np.ndarray
    shares: np.ndarray
    colour: str
    marker: str


def draw(
    picture: Path,
    points: np.ndarray,
    labels: Sequence[int],
    sources: Sequence[str],
    method: str,
    seed: int,
) -> None:
    """Write the picture of points (n, 2) that `loraprobe.study.embed.embed` made."""
    fig, axes = common.panels(1, 1, (9.5, 6.0))
    plot(axes[0, 0], points, labels, sources)
    title = f"{method.upper()} of adapter features, n = {len(labels)}, seed {seed}"
    axes[0, 0].set_title(title, loc="left")
    axes[0, 0].set(xlabel=_AXES[method].format(1), ylabel=f"{method.upper()} 2")
    if method == "umap":  # its axes have no unit, and a tick would suggest one
        axes[0, 0].set(xticks=[], yticks=[])
    common.save(fig, picture)


def plot(ax: Axes, points: np.ndarray, labels: Sequence[int], sources: Sequence[str]) -> None:
    """Draw the scatter plot into ax, its legend to the right.

    The number at a cluster is the one before its name in the legend; it stands above the point
    nearest the median of the source (of its highest poison share).
    """
    families = _families(labels, sources)
    for family in families:
        xy = points[family.rows]
        colours = [_pale(family.colour, share) for share in family.shares]
        look: dict[str, Any] = {"s": 38, "linewidths": 0.4, "edgecolors": "white"}
        ax.scatter(xy[:, 0], xy[:, 1], c=colours, marker=family.marker, **look)
    for number, family in enumerate(families, start=1):  # no point may cover a number
        strongest = points[family.rows[family.shares == family.shares.max()]]
        apart = ((strongest - np.median(strongest, axis=0)) ** 2).sum(axis=1)
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center"}
        centre = strongest[np.argmin(apart)]
        text = ax.annotate(str(number), centre, (0.0, 8.0), size=8.5, weight="bold", **place)
        text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
    _legend(ax, families)


def _families(labels: Sequence[int], sources: Sequence[str]) -> list[_Family]:
    """The sources: benign before hard negatives before malicious, each kind by name."""
    members: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for row, (label, source) in enumerate(zip(labels, sources, strict=True)):
        name, _, share = source.partition("@")
        hard = name.endswith("_safe") or name.startswith("refusal")
        members.setdefault((2 if label else int(hard), name), []).append((row, float(share or 1)))
    families: list[_Family] = []
    for (kind, name), pairs in sorted(members.items()):
        title = list(_KINDS)[kind]
        colours, markers = _KINDS[title]
        turn = sum(family.kind == title for family in families)
        style = colours[turn % len(colours)], markers[turn % len(markers)]
        rows, shares = map(np.array, zip(*pairs, strict=True))
        families.append(_Family(name, title, rows, shares, *style))
    return families


def _pale(colour: str, share: float) -> np.ndarray:
    """A colour mixed with white: full at share 1, never so pale that it vanishes."""
    return 1 - (0.25 + 0.75 * share) * (1 - np.array(to_rgb(colour)))


def _legend(ax: Axes, families: Sequence[_Family]) -> None:
    """A heading a kind, the numbered sources, the shades of the poison shares."""
    handles: list[Line2D] = []

    def add(label: str, marker: str = "", colour: Any = "black") -> None:
        look: dict[str, Any] = {"linestyle": "", "markersize": 7, "markeredgewidth": 0}
        handles.append(Line2D([], [], marker=marker, color=colour, label=label, **look))

    numbered = list(enumerate(families, start=1))
    for kind in dict.fromkeys(family.kind for family in families):
        mine = [(number, family) for number, family in numbered if family.kind == kind]
        add(f"{kind} ({sum(len(family.rows) for _, family in mine)})")
        for number, family in mine:
            add(f"{number}  {family.name}".replace("$", r"\$"), family.marker, family.colour)
    shares = sorted({share for family in families for share in family.shares.tolist()})
    if len(shares) > 1:
        add("poison share: paler is less")
        for share in shares:
            add(f"{share:.0%}", "s", _pale(MALICIOUS_COLOURS[0], share))
    look: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False}
    legend = ax.legend(handles=handles, borderaxespad=0.0, fontsize=8, **look)
    for handle, text in zip(handles, legend.get_texts(), strict=True):
        if handle.get_marker() == "":
            text.set_fontweight("bold")
