"""The pictures of a report: told apart by marker and lightness as well as by hue."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .analysis import Analysis, ModuleFacts

STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
}
MARKS = {  # colour, marker, and whether it is filled
    "benign": ("#0072B2", "o"),
    "inconclusive": ("#595959", "s"),
    "malicious": ("#D55E00", "^"),
    "not scored": ("#0072B2", "o"),
    "reference": ("#BBBBBB", "."),
}
HEAT = "viridis"  # its lightness rises evenly: it prints in grey
MOST_NAMES = 40  # more would not be legible as tick labels
MOST_LABELS = 25
MOST_LINES = 20
DASHES = {"malicious": "--", "inconclusive": ":"}


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, list(np.asarray(figure.subplots(rows, columns, squeeze=False)).flat)


def heat_map(modules: Sequence[ModuleFacts], title: str) -> Figure:
    """Norm and stable rank, layers across and modules down."""
    layers = sorted({one.layer for one in modules})
    leaves = sorted({one.leaf for one in modules})
    size = (max(6.0, 0.2 * len(layers) + 3), 1.3 + 0.7 * len(leaves))
    figure, axes = _figure(2, 1, size)
    for axis, what in zip(axes, ("norm", "stable_rank"), strict=True):
        grid = np.full((len(leaves), len(layers)), np.nan)
        for one in modules:
            grid[leaves.index(one.leaf), layers.index(one.layer)] = getattr(one, what)
        image = axis.imshow(grid, aspect="auto", cmap=HEAT, interpolation="nearest")
        axis.set_title(what.replace("_", " "), loc="left")
        axis.set_yticks(range(len(leaves)), leaves)
        step = max(1, len(layers) // 16)
        axis.set_xticks(range(0, len(layers), step), [str(one) for one in layers[::step]])
        figure.colorbar(image, ax=axis)
    axes[-1].set_xlabel("layer")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def spectra(modules: Sequence[ModuleFacts], title: str) -> Figure:
    """Singular values relative to the largest, a line a module, a panel a kind of module."""
    leaves = sorted({one.leaf for one in modules})
    columns = min(4, len(leaves))
    rows = -(-len(leaves) // columns)
    figure, axes = _figure(rows, columns, (2.4 * columns + 1.2, 2.2 * rows + 0.6))
    colours = matplotlib.colormaps[HEAT]
    last = max((one.layer for one in modules), default=0) or 1
    for axis, leaf in zip(axes, leaves, strict=False):
        for one in modules:
            if one.leaf == leaf and one.values and one.values[0] > 0:
                values = np.array(one.values) / one.values[0]
                colour = colours(max(one.layer, 0) / last)
                axis.plot(range(1, len(values) + 1), values, color=colour, linewidth=0.9)
        axis.set_title(leaf, loc="left")
        axis.set_ylim(0, 1.05)
    for axis in axes[len(leaves) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("σ / largest σ")
    figure.supxlabel("index; the darkest line is the first layer", fontsize=8.0)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def norms_by_layer(analysis: Analysis) -> Figure:
    """Which layers moved: a line an adapter, or a band a kind where there are many."""
    figure, [axis] = _figure(1, 1, (7.0, 3.4))
    if analysis.usual is not None and analysis.usual.layers:
        numbers = [int(layer) for layer in analysis.usual.layers]
        low, middle, high = np.array(list(analysis.usual.layers.values())).T
        label = f"adapters of the base ({analysis.usual.size}): median, 10 to 90 %"
        axis.fill_between(numbers, low, high, color="#DDDDDD", linewidth=0)
        axis.plot(numbers, middle, "-", color="#999999", linewidth=3, label=label)
    for kind, (colour, _) in MARKS.items():
        names = [name for name in analysis.names if kind_of(analysis, name) == kind]
        lines = [_by_layer(analysis.modules[name]) for name in names]
        dash = DASHES.get(kind, "-")
        label = f"{kind} ({len(names)})"
        if len(names) > MOST_LINES:
            layers = sorted({layer for line in lines for layer in line})
            rows = [[line[layer] for line in lines if layer in line] for layer in layers]
            low, middle, high = np.array([np.quantile(row, (0.1, 0.5, 0.9)) for row in rows]).T
            axis.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(layers, middle, dash, color=colour, label=f"{label}: median, 10 to 90 %")
            continue
        for line in lines:
            axis.plot(list(line), list(line.values()), dash, color=colour, label=label, alpha=0.8)
            label = "_"  # one entry a kind
    axis.set_xlabel("layer")
    axis.set_ylabel("norm of the change")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    return figure


def similarity(analysis: Analysis) -> Figure:
    """Cosine of the products and overlap of their column spaces."""
    count = len(analysis.names)
    side = 3.2 + min(3.0, 0.06 * count)
    figure, axes = _figure(1, 2, (2 * side + 1.4, side + 0.4))
    order = _by_likeness(analysis.cosine)
    for axis, matrix, title, low in (
        (axes[0], analysis.cosine, "cosine of the products", -1.0),
        (axes[1], analysis.overlap, "overlap of the column spaces", 0.0),
    ):
        colours = "RdGy" if low < 0 else HEAT
        shown = np.where(np.eye(count, dtype=bool), np.nan, matrix)[np.ix_(order, order)]
        top = max(float(np.nanquantile(np.abs(shown), 0.99)), 0.05)
        image = axis.imshow(shown, cmap=colours, vmin=top * low, vmax=top)
        axis.set_title(title, loc="left")
        figure.colorbar(image, ax=axis, shrink=0.8)
        if count <= MOST_NAMES and axis is axes[0]:
            axis.set_yticks(range(count), [short(analysis.names[row]) for row in order], fontsize=6)
        else:
            axis.set_yticks([])
        axis.set_xticks([])
    return figure


def embedding(analysis: Analysis) -> Figure:
    """The cohort in two dimensions, outliers named, the reference behind it."""
    methods = list(analysis.coordinates)
    figure, axes = _figure(1, len(methods), (4.4 * len(methods), 4.0))
    kinds = np.array([kind_of(analysis, name) for name in analysis.names])
    for axis, method in zip(axes, methods, strict=True):
        points = analysis.coordinates[method]
        for kind in ("reference", "not scored", "benign", "inconclusive", "malicious"):
            rows = np.flatnonzero(kinds == kind)
            if len(rows):
                colour, marker = MARKS[kind]
                label = f"{kind} ({len(rows)})" if axis is axes[0] else None
                behind = 1 if kind == "reference" else 2
                x, y = points[rows].T
                axis.scatter(
                    x, y, s=22, c=colour, marker=marker, label=label, alpha=0.75, zorder=behind
                )
        named = [name for name in analysis.names if name in analysis.outliers][:MOST_LABELS]
        for name in named:
            x, y = points[analysis.names.index(name)]
            axis.annotate(short(name), (x, y), (3, 3), textcoords="offset points", fontsize=6.5)
        axis.set_title(method, loc="left")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=8.5)
    return figure


def kind_of(analysis: Analysis, name: str) -> str:
    """What a point stands for: its verdict, "not scored", or "reference"."""
    if analysis.behind and name in analysis.names[-analysis.behind :]:
        return "reference"
    return analysis.verdicts.get(name, "not scored")


def short(name: str, longest: int = 28) -> str:
    """The end of a name, which is what tells adapters apart."""
    return name if len(name) <= longest else "…" + name[-longest + 1 :]


def figures(analysis: Analysis) -> Mapping[str, tuple[Figure, str]]:
    """Name -> figure and the text that stands for it where it cannot be seen."""
    own = analysis.names[: len(analysis.names) - analysis.behind]
    drawn: dict[str, tuple[Figure, str]] = {}
    largest = max(own, key=lambda name: sum(one.norm**2 for one in analysis.modules[name]))
    short = largest.rsplit("/", 1)[-1]
    title = short if len(own) == 1 else f"{short} (the largest change)"
    modules = analysis.modules[largest]
    strongest = max(modules, key=lambda one: one.norm)
    drawn["heat_map"] = (
        heat_map(modules, title),
        f"Heat maps of norm and stable rank of {largest} by layer and module; the largest norm,"
        f" {strongest.norm:.3g}, is at {strongest.module}.",
    )
    drawn["spectra"] = (
        spectra(modules, title),
        f"Singular values of every module of {largest}, relative to the largest of the module.",
    )
    drawn["layers"] = (
        norms_by_layer(analysis),
        "Lines of the norm of each layer's change, one an adapter, dashed where malicious.",
    )
    if len(analysis.names) > 1:
        upper = analysis.cosine[np.triu_indices(len(analysis.names), 1)]
        drawn["similarity"] = (
            similarity(analysis),
            f"Matrices of similarity between adapters; cosines from {upper.min():.2f} to"
            f" {upper.max():.2f}, median {np.median(upper):.2f}.",
        )
    if analysis.coordinates:
        counts = dict.fromkeys(MARKS, 0)
        for name in analysis.names:
            counts[kind_of(analysis, name)] += 1
        said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        drawn["embedding"] = (embedding(analysis), f"A map of the cohort: {said}.")
    return drawn


def _by_layer(modules: Sequence[ModuleFacts]) -> dict[int, float]:
    """Layer -> norm of its change, in rising order."""
    layers = sorted({one.layer for one in modules})
    return {
        layer: math.sqrt(sum(one.norm**2 for one in modules if one.layer == layer))
        for layer in layers
    }


def _by_likeness(cosine: np.ndarray) -> np.ndarray:
    """An order that puts like adapters together: along the leading eigenvector."""
    return np.argsort(np.linalg.eigh(cosine)[1][:, -1], kind="stable")
