"""The scatter plot of coordinates that `loraprobe.study.embed` made."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..colours import BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS, MALICIOUS_MARKERS
from ..errors import FitError, MissingExtra, RecipeError
from .embed import Coordinates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = ("benign", "benign, hard negatives", "malicious")
_STYLES = ((BENIGN_COLOURS, "o"), (HARD_COLOURS, "s"), (MALICIOUS_COLOURS, MALICIOUS_MARKERS))


def is_hard_negative(source: str) -> bool:
    """Return whether a benign source is by its name a hard negative.

    Harmless answers to harmful or borderline prompts.

    That is a name that ends in "_safe" or starts with "refusal", the names of this project's
    sources.
    """
    family = source.partition("@")[0]
    return family.endswith("_safe") or family.startswith("refusal")


def plot_embedding(
    ax: Axes, coordinates: Coordinates, hard_negatives: Collection[str] | None = None
) -> None:
    """Draw the scatter plot into ax.

    A colour and marker per source, the legend to the right of the axes.

    Benign sources are cool circles, hard negatives grey squares, malicious sources warm and
    angular. The poison share in a malicious source's name ("gptfuzz@0.25") sets how pale its points
    are. The number at a cluster is the one before its name in the legend; it sits just above the
    point nearest the median of the source (of its highest poison share). hard_negatives are source
    names; None asks is_hard_negative. Make the figure with layout="constrained", or the legend is
    cut off.

    Raises MissingExtra if matplotlib is absent, FitError for a poison share that is no number in
    (0, 1].
    """
    try:
        from matplotlib import patheffects
    except ImportError as error:
        raise MissingExtra("matplotlib", "figures", "plotting") from error
    families = _families(coordinates, hard_negatives)
    for family in families:
        xy = coordinates.coordinates[family.rows]
        colours = [_pale(family.colour, share) for share in family.shares]
        ax.scatter(
            xy[:, 0],
            xy[:, 1],
            s=38,
            c=colours,
            marker=family.marker,
            linewidths=0.4,
            edgecolors="white",
        )
    for number, family in enumerate(
        families, start=1
    ):  # after all points, so that no point covers a number
        strongest = coordinates.coordinates[family.rows[family.shares == family.shares.max()]]
        centre = strongest[np.argmin(((strongest - np.median(strongest, axis=0)) ** 2).sum(axis=1))]
        label = ax.annotate(
            str(number),
            centre,
            (0.0, 8.0),
            textcoords="offset points",
            ha="center",
            va="center",
            size=8.5,
            weight="bold",
        )
        label.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
    _legend(ax, families)
    n, method = len(coordinates.labels), {"umap": "UMAP", "pca": "PCA"}[coordinates.method]
    ax.set_title(f"{method} of adapter features, n = {n}, seed {coordinates.seed}", loc="left")
    if coordinates.method == "umap":  # its axes have no unit, and a tick would suggest one
        ax.set(
            xlabel="UMAP 1 (who is near whom counts; distances between islands mean nothing)",
            ylabel="UMAP 2",
            xticks=[],
            yticks=[],
        )
    else:
        ax.set(xlabel="principal component 1", ylabel="principal component 2")


def draw_embedding(
    path: str | Path, coordinates: Coordinates, hard_negatives: Collection[str] | None = None
) -> None:
    """Write the picture of plot_embedding to path: a .png, .pdf or .svg.

    Raises MissingExtra if matplotlib is absent, RecipeError for another ending, FitError as
    plot_embedding.
    """
    if Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise RecipeError(f"got the path {path}; expected one that ends in .png, .pdf or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "figures", "plotting") from error
    figure = Figure(
        figsize=(9.5, 6.0), layout="constrained"
    )  # not pyplot's: needs no display and leaves nothing open
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    plot_embedding(ax, coordinates, hard_negatives)
    figure.savefig(path, dpi=160, bbox_inches="tight")


@dataclass(frozen=True)
class _Family:
    """The rows of one source at any poison share, and how they are drawn."""

    name: str
    kind: str
    rows: NDArray[np.int64]
    shares: NDArray[np.float64]
    colour: str
    marker: str


def _families(coordinates: Coordinates, hard_negatives: Collection[str] | None) -> list[_Family]:
    """Return the sources, benign before hard negatives before malicious, each kind by name."""
    members: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for row, (label, source) in enumerate(
        zip(coordinates.labels.tolist(), coordinates.sources.tolist(), strict=True)
    ):
        name, share = _name_and_share(source) if label else (source, 1.0)
        hard = is_hard_negative(name) if hard_negatives is None else name in hard_negatives
        members.setdefault((2 if label else int(hard), name), []).append((row, share))
    families: list[_Family] = []
    seen = [0, 0, 0]
    for (kind, name), pairs in sorted(members.items()):
        colours, markers = _STYLES[kind]
        style = (colours[seen[kind] % len(colours)], markers[seen[kind] % len(markers)])
        seen[kind] += 1
        rows, shares = zip(*pairs, strict=True)
        families.append(_Family(name, _KINDS[kind], np.array(rows), np.array(shares), *style))
    return families


def _name_and_share(source: str) -> tuple[str, float]:
    """Split "gptfuzz@0.25" into ("gptfuzz", 0.25); a source without a share is poisoned throughout.

    1.0.
    """
    name, at, text = source.rpartition("@")
    if not at:
        return source, 1.0
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0.0 < share <= 1.0:
        raise FitError(
            f"got source {source!r}; expected a poison share in (0, 1] after @, such as {name}@0.25"
        )
    return name, share


def _pale(colour: str, share: float) -> tuple[float, float, float]:
    """Mix a "#rrggbb" colour with white: full at share 1, never so pale that it vanishes."""
    strength = 0.25 + 0.75 * share
    red, green, blue = (
        1.0 - strength * (1.0 - int(colour[i : i + 2], 16) / 255.0) for i in (1, 3, 5)
    )
    return red, green, blue


def _legend(ax: Axes, families: list[_Family]) -> None:
    """Put the legend beside the axes.

    A heading per kind, the numbered sources, the shades of the poison shares.
    """
    from matplotlib.lines import Line2D

    def entry(label: str, marker: str = "", colour: Any = "black") -> Line2D:
        return Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            markersize=7,
            color=colour,
            markeredgewidth=0,
            label=label,
        )

    handles: list[Line2D] = []
    for kind in _KINDS:
        mine = [
            (number, family)
            for number, family in enumerate(families, start=1)
            if family.kind == kind
        ]
        if mine:
            handles.append(entry(f"{kind} ({sum(len(family.rows) for _, family in mine)})"))
        for number, family in mine:
            handles.append(
                entry(f"{number}  {family.name}".replace("$", r"\$"), family.marker, family.colour)
            )  # $ starts mathtext
    shares = sorted(
        {
            share
            for family in families
            if family.kind == "malicious"
            for share in family.shares.tolist()
        }
    )
    if len(shares) > 1:
        handles.append(entry("poison share: paler is less"))
        handles += [
            entry(f"{share:.0%}", "s", _pale(MALICIOUS_COLOURS[0], share)) for share in shares
        ]
    legend = ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize=8,
    )
    for handle, text in zip(handles, legend.get_texts(), strict=True):
        if handle.get_marker() == "":
            text.set_fontweight("bold")
