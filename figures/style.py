"""One look for every figure: sizes, the palette, and how a picture is made and saved.

Figures are made without pyplot, so nothing global is set and no window can open: the Agg canvas draws them.
The palette is that of loraprobe.embed (cool circles benign, grey squares benign but hard, warm angular markers malicious):
the three classes differ in lightness and marker too, for colour-blind readers and grey prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loraprobe.embed import BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS, MALICIOUS_MARKERS

__all__ = ["BENIGN_COLOURS", "DPI", "HARD_COLOURS", "MALICIOUS_COLOURS", "MALICIOUS_MARKERS", "SINGLE", "STYLE", "WIDE", "figure", "save"]

SINGLE = (6.0, 4.2)  # inches: one plot, legend inside
WIDE = (9.5, 6.0)  # inches: one plot, legend beside it
DPI = 160
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
}


def figure(size: tuple[float, float] = SINGLE) -> tuple[Figure, Axes]:
    """Return an empty figure of this size (inches) and its one axes, in the common style; legends beside the axes fit in."""
    with matplotlib.rc_context(STYLE):  # undone on leaving: importing this file changes no other plot
        fig = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(fig)
        return fig, fig.subplots()


def save(fig: Figure, path: str | Path) -> None:
    """Write the figure to path as a PNG of 160 dots per inch; equal figures give equal bytes.

    Raises ValueError if the path does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"got the path {path}; expected one that ends in .png")
    fig.savefig(path, dpi=DPI, format="png", facecolor="white", bbox_inches="tight", metadata={"Software": None})
