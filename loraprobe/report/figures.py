"""The pictures of a report: told apart by marker and lightness as well as by hue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .analysis import Analysis, ModuleFacts, norm_of

STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
}
MARKS = {  # colour and marker
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
HATCHES = {"malicious": "///", "inconclusive": "..."}  # bands overlap, and are printed in grey
DARK = 0.88  # of the colour map's range: its lightest end is not seen as a line on white


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, list(np.asarray(figure.subplots(rows, columns, squeeze=False)).flat)


def heat_map(modules: Sequence[ModuleFacts], title: str) -> Figure:
    """Norm and stable rank, layers across and modules down."""
    layers = sorted({facts.layer for facts in modules})
    leaves = sorted({facts.leaf for facts in modules})
    size = (max(6.0, 0.2 * len(layers) + 3), 1.3 + 0.7 * len(leaves))
    figure, axes = _figure(2, 1, size)
    for axis, what in zip(axes, ("norm", "stable_rank"), strict=True):
        grid = np.full((len(leaves), len(layers)), np.nan)
        for facts in modules:
            grid[leaves.index(facts.leaf), layers.index(facts.layer)] = getattr(facts, what)
        image = axis.imshow(grid, aspect="auto", cmap=HEAT, interpolation="nearest")
        axis.set_title(what.replace("_", " "), loc="left")
        axis.set_yticks(range(len(leaves)), leaves)
        step = max(1, len(layers) // 16)
        axis.set_xticks(range(0, len(layers), step), list(map(str, layers[::step])))
        figure.colorbar(image, ax=axis)
    axes[-1].set_xlabel("layer")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def spectra(modules: Sequence[ModuleFacts], title: str) -> Figure:
    """Singular values relative to the largest, a line a module, a panel a kind of module."""
    leaves = sorted({facts.leaf for facts in modules})
    columns = min(4, len(leaves))
    rows = -(-len(leaves) // columns)
    figure, axes = _figure(rows, columns, (2.4 * columns + 1.2, 2.2 * rows + 0.6))
    colours = matplotlib.colormaps[HEAT].resampled(256)
    colours = ListedColormap(colours(np.linspace(0, DARK, 256)))
    scale = Normalize(0, max((facts.layer for facts in modules), default=0) or 1)
    for axis, leaf in zip(axes, leaves, strict=False):
        for facts in modules:
            if facts.leaf == leaf and facts.values and facts.values[0] > 0:
                values = np.array(facts.values) / facts.values[0]
                colour = colours(scale(max(facts.layer, 0)))
                axis.plot(range(1, len(values) + 1), values, ".-", color=colour, linewidth=0.8)
        axis.set_title(leaf, loc="left")
        axis.set_ylim(0, 1.05)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axis in axes[len(leaves) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("σ / largest σ")
    figure.supxlabel("index", fontsize=9.0)
    figure.colorbar(ScalarMappable(scale, colours), ax=axes, label="layer")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def norms_by_layer(analysis: Analysis) -> Figure:
    """Which layers moved: a line an adapter, or a band a kind where there are many."""
    figure, [axis] = _figure(1, 1, (7.0, 3.6))
    if analysis.usual is not None and analysis.usual.layers:
        numbers = [int(layer) for layer in analysis.usual.layers]
        low, middle, high = np.array(list(analysis.usual.layers.values())).T
        label = f"adapters of the base ({analysis.usual.size}): median, 10 to 90 %"
        axis.fill_between(numbers, low, high, color="#E4E4E4", linewidth=0)
        for edge in (low, high):
            axis.plot(numbers, edge, "-", color="#999999", linewidth=0.8)
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
            axis.fill_between(
                layers, low, high, color=colour, alpha=0.22, hatch=HATCHES.get(kind), linewidth=0
            )
            for edge in (low, high):
                axis.plot(layers, edge, dash, color=colour, linewidth=0.8)
            label = f"{label}: median, 10 to 90 %"
            axis.plot(layers, middle, dash, color=colour, linewidth=2.2, label=label)
            continue
        for line in lines:
            axis.plot(list(line), list(line.values()), dash, color=colour, label=label, alpha=0.8)
            label = "_"  # one entry a kind
    axis.set_xlabel("layer")
    axis.set_ylabel("norm of the change")
    drawn = [value for line in axis.get_lines() for value in np.asarray(line.get_ydata())]
    if min(drawn) > 0 and max(drawn) > 8 * min(drawn):
        axis.set_yscale("log")  # of cohorts that differ in scale
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    return figure


def similarity(analysis: Analysis) -> Figure:
    """Cosine of the products and overlap of their column spaces."""
    count = len(analysis.names)
    side = 3.2 + min(3.0, 0.06 * count)
    figure, axes = _figure(1, 2, (2 * side + 1.4, 0.85 * side + 0.2))
    order = _by_likeness(analysis.cosine)
    names = [cut(name) for name in labels(analysis.names).values()]
    for axis, matrix, title, low in (
        (axes[0], analysis.cosine, "cosine of the products", -1.0),
        (axes[1], analysis.overlap, "overlap of the column spaces", 0.0),
    ):
        shown = np.where(np.eye(count, dtype=bool), np.nan, matrix)[np.ix_(order, order)]
        top = max(float(np.nanquantile(np.abs(shown), 0.99)), 0.05)
        image = axis.imshow(shown, cmap=HEAT, vmin=top * low, vmax=top)
        axis.set_title(title, loc="left")
        figure.colorbar(image, ax=axis, shrink=0.8)
        if count <= MOST_NAMES and axis is axes[0]:
            axis.set_yticks(range(count), [names[row] for row in order], fontsize=6)
        else:
            axis.set_yticks([])
        axis.set_xticks([])
    return figure


def embedding(analysis: Analysis) -> Figure:
    """The cohort in two dimensions, outliers named, the reference behind it."""
    methods = list(analysis.coordinates)
    figure, axes = _figure(1, len(methods), (4.4 * len(methods), 4.0))
    kinds = np.array([kind_of(analysis, name) for name in analysis.names])
    shown = labels(analysis.names)
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
            right = x > points[:, 0].mean()  # towards the middle: it stays inside
            axis.annotate(
                cut(shown[name]),
                (x, y),
                (-4 if right else 4, 3),
                textcoords="offset points",
                fontsize=6.5,
                ha="right" if right else "left",
            )
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


def labels(names: Sequence[str]) -> dict[str, str]:
    """Names without the folders that all of them begin with."""
    parts = {name: name.rstrip("/").split("/") for name in names}
    columns = zip(*(part[:-1] for part in parts.values()), strict=False)
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    return {name: "/".join(part[shared:]) or name for name, part in parts.items()}


def cut(label: str, longest: int = 30) -> str:
    """A label without its middle, where it is longer."""
    if len(label) <= longest:
        return label
    return f"{label[: longest // 2]}…{label[-longest // 2 + 1 :]}"


def figures(analysis: Analysis) -> Mapping[str, tuple[Figure, str]]:
    """Name -> figure and the text that stands for it where it cannot be seen."""
    foreground = analysis.names[: len(analysis.names) - analysis.behind]
    drawn: dict[str, tuple[Figure, str]] = {}
    largest = max(foreground, key=lambda name: norm_of(analysis.modules[name]))
    shown = labels(analysis.names)[largest]
    title = shown if len(foreground) == 1 else f"{shown} (the largest change)"
    modules = analysis.modules[largest]
    strongest = max(modules, key=lambda facts: facts.norm)
    drawn["heat_map"] = (
        heat_map(modules, title),
        f"Heat maps of norm and stable rank of {shown} by layer and module; the largest norm,"
        f" {strongest.norm:.3g}, is at {strongest.module}.",
    )
    drawn["spectra"] = (
        spectra(modules, title),
        f"Singular values of every module of {shown}, relative to the largest of the module.",
    )
    drawn["layers"] = (
        norms_by_layer(analysis),
        "Norm of each layer's change, dashed where malicious, dotted where inconclusive. "
        + " ".join(_layer_sentences(analysis)),
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
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        drawn["embedding"] = (embedding(analysis), f"A map of the cohort: {kinds}.")
    return drawn


def _layer_sentences(analysis: Analysis) -> list[str]:
    """A sentence a kind: where its adapters changed most and least, by the median."""
    sentences = []
    for kind in MARKS:
        lines = [
            _by_layer(analysis.modules[name])
            for name in analysis.names
            if kind_of(analysis, name) == kind
        ]
        layers = sorted({layer for line in lines for layer in line})
        medians = {
            layer: float(np.median([line[layer] for line in lines if layer in line]))
            for layer in layers
        }
        if medians:
            most, least = max(layers, key=medians.__getitem__), min(layers, key=medians.__getitem__)
            sentences.append(
                f"{len(lines)} {kind}: most at layer {most} ({medians[most]:.3g}), least at layer"
                f" {least} ({medians[least]:.3g})."
            )
    return sentences


def _by_layer(modules: Sequence[ModuleFacts]) -> dict[int, float]:
    """Layer -> norm of its change, in rising order."""
    layers = sorted({facts.layer for facts in modules})
    return {
        layer: norm_of([facts for facts in modules if facts.layer == layer]) for layer in layers
    }


def _by_likeness(cosine: np.ndarray) -> np.ndarray:
    """An order that puts like adapters together: the leaves of average linkage of 1 - cosine."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    apart = squareform(1 - cosine, checks=False)
    return np.asarray(leaves_list(linkage(apart, "average")))
