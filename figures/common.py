"""What every figure shares: one look, the committed numbers, and the command line.

Figures are made without pyplot, so nothing global is set and no window can open: the Agg canvas
draws them. Colours are Okabe and Ito's, which colour-blind readers can tell apart, each with a
marker of its own.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loraprobe.errors import DataError

Row = Mapping[str, Any]

HERE = Path(__file__).resolve().parent
PICTURES = HERE / "pictures"
RESULTS = HERE.parent / "paper_repro" / "results"
NUMBERS = RESULTS / "separability.json"
COORDINATES = RESULTS / "separability_coordinates.npz"
SECTIONS = {"about", "views", "cross_source", "mended", "sampled", "sweeps", "transfer", "drift"}
DPI = 160
LINES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#000000", "v"))
RECIPES = ("paper (B, first layer)", "all B")
CUT = 1.3863  # the logit of 0.8, the paper's threshold
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
}


def panels(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of this size (inches) and its axes (rows, columns), in the common style.

    Args:
        options: as of Figure.subplots.
    """
    with matplotlib.rc_context(STYLE):  # undone on leaving: no other plot changes
        fig = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(fig)
        return fig, np.asarray(fig.subplots(rows, columns, squeeze=False, **options))


def caption(fig: Figure, text: str) -> None:
    """Say below the panels what was measured: how many, which seed."""
    fig.supxlabel(text, fontsize=8.0, color="#444444", x=0.01, ha="left")


def legend_above(
    fig: Figure, ax: Axes, columns: int, title: str | None = None, side: str = "left"
) -> None:
    """The legend of one panel's lines above all panels, where it covers nothing."""
    fig.legend(
        *ax.get_legend_handles_labels(),
        loc=f"outside upper {side}",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        title=title,
        alignment="left",
    )


def reference(ax: Axes, height: float) -> None:
    """A thin dotted line at a height that means something."""
    ax.axhline(height, color="#999999", linewidth=0.8, linestyle=":", zorder=0)


def chance(ax: Axes) -> None:
    """Mark in a plot of AUROCs where guessing lies."""
    reference(ax, 0.5)


def points(
    ax: Axes, number: int, places: Sequence[float], rows: Sequence[Row], **options: Any
) -> None:
    """The AUROCs of rows with their intervals, in colour and marker `number` of LINES."""
    colour, marker = LINES[number]
    values, ends = bars(rows)
    look = {"markersize": 4.5, "linewidth": 1.2, "elinewidth": 1.0, "capsize": 2} | options
    ax.errorbar(places, values, ends, color=colour, marker=marker, **look)


def band(
    ax: Axes, number: int, curves: Sequence[Sequence[float]], label: str, **options: Any
) -> None:
    """The mean of curves over 1, 2, ..., and a band from the lowest to the highest."""
    colour, marker = LINES[number]
    values = np.asarray(curves, dtype=float)
    places = range(1, values.shape[1] + 1)
    look = {"markersize": 4, "linewidth": 1.4, "clip_on": False} | options
    ax.plot(places, values.mean(axis=0), color=colour, marker=marker, label=label, **look)
    ax.fill_between(
        places, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0
    )


UNDATED: dict[str, dict[str, Any]] = {  # a format -> metadata that leaves the date out
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def save(fig: Figure, path: Path, dpi: int = DPI) -> Path:
    """Write the figure as .png or .pdf, by the path's ending; equal figures give equal bytes.

    Raises:
        DataError: another ending.
    """
    if path.suffix not in UNDATED:
        raise DataError(f"got the path {path}; expected one that ends in {' or '.join(UNDATED)}")
    fig.savefig(
        path, dpi=dpi, facecolor="white", bbox_inches="tight", metadata=UNDATED[path.suffix]
    )
    return path


def read_json(path: Path, command: str) -> Any:
    """What a program of paper_repro wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}. Write it with python -m {command}") from None


def with_fields(found: Any, wanted: Iterable[str], path: Path, command: str) -> Any:
    """`found`, which has these fields.

    Raises:
        DataError: it has not.
    """
    missing = set(wanted) - set(found if isinstance(found, dict) else ())
    if missing:
        raise DataError(
            f"{path} has no {', '.join(sorted(missing))}; expected them all. Write it with"
            f" python -m {command}"
        )
    return found


def read_numbers(path: Path = NUMBERS) -> dict[str, Any]:
    """What `python -m paper_repro.separability.run` wrote.

    Raises:
        DataError: the file is missing, damaged or holds no such results.
    """
    command = "paper_repro.separability.run"
    return dict(with_fields(read_json(path, command), SECTIONS, path, command))


def read_coordinates(path: Path = COORDINATES) -> dict[str, np.ndarray]:
    """What `python -m paper_repro.separability.coordinates` wrote: name -> array.

    Raises:
        DataError: the file is missing or damaged, or a coordinate is not finite.
    """
    command = "paper_repro.separability.coordinates"
    try:
        # ZipFile first: np.load takes .npy files, too
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}. Write it with python -m {command}") from None
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(
                f"{path}: {name} holds NaN or infinity; expected finite numbers. Write it anew"
            )
    return arrays


def chosen(rows: Sequence[Row], **fields: Any) -> list[Row]:
    """The rows with these values, in their order.

    Raises:
        DataError: there is none.
    """
    found = [row for row in rows if all(row.get(name) == value for name, value in fields.items())]
    if not found:
        raise DataError(
            f"got no row with {fields}; expected at least one. The results are of another version:"
            " write them anew"
        )
    return found


def bars(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """AUROC (n,) of the rows, and how far its interval reaches down and up, (2, n)."""
    values = np.array([row["auroc"] for row in rows])
    ends = np.array([row["auroc_ci"] for row in rows])
    return values, np.maximum(np.stack([values - ends[:, 0], ends[:, 1] - values]), 0.0)
