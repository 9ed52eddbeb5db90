"""One look for every figure: sizes, the palette, and how a picture is made and saved.

Figures are made without pyplot, so nothing global is set and no window can open: the Agg canvas
draws them. The palette is that of loraprobe.study.embed (cool circles benign, grey squares benign
but hard, warm angular markers malicious): the three classes differ in lightness and marker too, for
colour-blind readers and grey prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loraprobe.colours import BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS, MALICIOUS_MARKERS

__all__ = [
    "BENIGN_COLOURS",
    "DPI",
    "HARD_COLOURS",
    "LINES",
    "MALICIOUS_COLOURS",
    "MALICIOUS_MARKERS",
    "PICTURES",
    "SINGLE",
    "STYLE",
    "WIDE",
    "caption",
    "chance",
    "figure",
    "legend_above",
    "panels",
    "save",
    "save_both",
]

SINGLE = (6.0, 4.2)  # inches: one plot, legend inside
WIDE = (9.5, 6.0)  # inches: one plot, legend beside it
DPI = 160
PICTURES = (
    Path(__file__).resolve().parent / "pictures"
)  # where the figures of the documentation are
# Okabe and Ito's palette, which colour-blind readers can tell apart, each with a marker of its own:
# lines of a plot in this order.
LINES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#000000", "v"))
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
}


def figure(size: tuple[float, float] = SINGLE) -> tuple[Figure, Axes]:
    """Return an empty figure of this size (inches) and its one axes, in the common style.

    Legends beside the axes fit in.
    """
    with matplotlib.rc_context(
        STYLE
    ):  # undone on leaving: importing this file changes no other plot
        fig = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(fig)
        return fig, fig.subplots()


def panels(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, np.ndarray]:
    """Return a figure of this size (inches) and its axes (rows, columns), in the common style.

    Options as of Figure.subplots.
    """
    with matplotlib.rc_context({**STYLE, "axes.titlesize": 9.5}):
        fig = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(fig)
        return fig, np.asarray(fig.subplots(rows, columns, squeeze=False, **options))


def caption(fig: Figure, text: str) -> None:
    """Say below the panels what was measured: how many, which seed."""
    fig.supxlabel(text, fontsize=8.0, color="#444444", x=0.01, ha="left")


def legend_above(fig: Figure, ax: Axes, columns: int, title: str | None = None) -> None:
    """Put the legend of one panel's lines above all panels, where it covers nothing."""
    fig.legend(
        *ax.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        title=title,
        alignment="left",
    )


def chance(ax: Axes) -> None:
    """Mark in a plot of AUROCs where guessing lies."""
    ax.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":", zorder=0)


def save_both(fig: Figure, folder: str | Path, name: str, dpi: int = DPI) -> list[Path]:
    """Write name.png and name.pdf into the folder, which is made; equal figures give equal bytes.

    Returns the two paths.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    png, pdf = Path(folder) / f"{name}.png", Path(folder) / f"{name}.pdf"
    fig.savefig(
        png,
        dpi=dpi,
        format="png",
        facecolor="white",
        bbox_inches="tight",
        metadata={"Software": None},
    )
    fig.savefig(
        pdf,
        dpi=dpi,
        format="pdf",
        facecolor="white",
        bbox_inches="tight",
        metadata={"CreationDate": None, "Creator": None, "Producer": None},
    )
    return [png, pdf]


def save(fig: Figure, path: str | Path) -> None:
    """Write the figure to path as a PNG of 160 dots per inch; equal figures give equal bytes.

    Raises ValueError if the path does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"got the path {path}; expected one that ends in .png")
    fig.savefig(
        path,
        dpi=DPI,
        format="png",
        facecolor="white",
        bbox_inches="tight",
        metadata={"Software": None},
    )
