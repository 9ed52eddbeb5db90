"""UMAP at several numbers of neighbours, and PCA beside it, of the zoo's updates.

By label, by source and by poison share.

    python -m figures.embeddings

No label was used to place a point. The pictures are for looking at: how far islands lie apart means
    nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from figures import style
from figures.arrays import read_coordinates
from figures.options import folder_of
from loraprobe.errors import DataError

RECIPES = {"paper": "the paper's feature", "all_b": "all B"}
METHODS = {
    "pca": "PCA",
    "umap5": "UMAP, 5 neighbours",
    "umap15": "UMAP, 15 neighbours",
    "umap50": "UMAP, 50 neighbours",
}
COLOURINGS = ("label", "source", "share")
Kind = tuple[str, str, str, np.ndarray]  # name, colour, marker, (n,) which points
_SHARES = {1.0: "#7f0000", 0.5: "#d7301f", 0.25: "#fc8d59", 0.1: "#fdcc8a"}  # darker is more poison


def kinds(arrays: Mapping[str, np.ndarray], colouring: str) -> list[Kind]:
    """What is drawn as one colour and marker, in drawing order; every point is in exactly one kind.

    Raises:
        DataError: an unknown colouring.
    """
    role, source, share = (
        arrays["zoo_role"],
        arrays["zoo_source"],
        arrays["zoo_share"].astype(float),
    )
    benign, hard, malicious = role == "benign", role == "hard_negative", role == "malicious"
    pale = [("benign", "#c6dbef", "o", benign), ("hard negatives", "#bdbdbd", "s", hard)]
    if colouring == "label":
        return [
            ("benign", style.LINES[0][0], "o", benign),
            ("hard negatives", "#555555", "s", hard),
            ("malicious", style.LINES[1][0], "^", malicious),
        ]
    if colouring == "share":
        shares = sorted({float(value) for value in share[malicious]})
        return pale + [
            (f"{_near(one):.0%} poison", _SHARES[_near(one)], "^", malicious & (share == one))
            for one in shares
        ]
    if colouring != "source":
        raise DataError(f"got the colouring {colouring!r}; expected one of {', '.join(COLOURINGS)}")
    found: list[Kind] = []
    for mask, colours, markers in (
        (benign, style.BENIGN_COLOURS, ("o",)),
        (hard, style.HARD_COLOURS, ("s",)),
        (malicious, style.MALICIOUS_COLOURS, style.MALICIOUS_MARKERS),
    ):
        for number, name in enumerate(sorted(set(source[mask].tolist()))):
            found.append(
                (
                    name.replace("_", " "),
                    colours[number % len(colours)],
                    markers[number % len(markers)],
                    mask & (source == name),
                )
            )
    return found


def plot(ax: Axes, coordinates: np.ndarray, points: Sequence[Kind]) -> None:
    """Scatter coordinates (n, 2) into ax."""
    for _, colour, marker, rows in points:
        x, y = coordinates[rows].astype(float).T
        ax.scatter(x, y, s=9, c=colour, marker=marker, linewidths=0, alpha=0.8)
    ax.set(xticks=[], yticks=[])


def draw(arrays: Mapping[str, np.ndarray], colouring: str) -> Any:
    """One picture: a row a recipe, a column a method."""
    fig, axes = style.panels(len(RECIPES), len(METHODS), (13.0, 6.6))
    points = kinds(arrays, colouring)
    for line, (recipe, name) in zip(axes, RECIPES.items(), strict=True):
        for ax, (method, title) in zip(line, METHODS.items(), strict=True):
            plot(ax, arrays[f"zoo_{recipe}_{method}"], points)
            ax.set_title(title)
        line[0].set_ylabel(name, fontsize=11)
    look: dict[str, Any] = {"linestyle": "", "markersize": 6}
    handles = [
        Line2D([], [], marker=marker, color=colour, label=f"{name} ({rows.sum()})", **look)
        for name, colour, marker, rows in points
    ]
    fig.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5)
    style.caption(
        fig,
        f"{len(arrays['zoo_role'])} clients of the zoo after 5 local steps, seed"
        f" {int(arrays['seed'])}, UMAP by cosine; mixed clients count to their malicious source. No"
        " label was used to place a point; distances between islands mean nothing.",
    )
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    """Write embeddings_label, embeddings_source and embeddings_share, each .png and .pdf."""
    folder, arrays = folder_of("embeddings", __doc__, argv), read_coordinates()
    for colouring in COLOURINGS:
        style.save_both(draw(arrays, colouring), folder, f"embeddings_{colouring}", dpi=90)


def _near(share: float) -> float:
    """The share that a float16 stands for."""
    return min(_SHARES, key=lambda known: abs(known - share))


if __name__ == "__main__":
    main()
