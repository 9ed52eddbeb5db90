"""What the figures of a run's report share: colours, labels, legends, axes, and the SVG itself.

Drawn without pyplot, so nothing global stays set. Text stays text in the SVG (the page chooses the
font), escaped by the writer; `label` makes it harmless to the layout, too. Equal input gives equal
output, whatever the reader's matplotlibrc says.
"""

from __future__ import annotations

import html
import io
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraprobe.colours import BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS

from ..errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROLES = ("benign", "hard_negative", "malicious", "unknown")
ROLE_WORDS = {
    "benign": "benign",
    "hard_negative": "hard negative",
    "malicious": "malicious",
    "unknown": "role unknown",
}
ROLE_COLOURS = {
    "benign": BENIGN_COLOURS,
    "hard_negative": HARD_COLOURS,
    "malicious": MALICIOUS_COLOURS,
    "unknown": ("#7b3294",),
}
PHASE_COLOURS = {
    "train": "#9ecae1",
    "evidence": "#f16913",
    "assess": "#b30000",
    "aggregate": "#595959",
    "evaluate": "#d9d9d9",
}
WIDTH = 7.6  # inches, of every figure
NAMED = 16  # more clients than this and a legend of all would be longer than the figure is high
MARKED = 40  # more rounds than this stand too close for large markers and for gaps between bars

_LINES: dict[str, Any] = {"benign": "-", "hard_negative": "--", "malicious": "-.", "unknown": ":"}
_MARKERS = {"benign": "o", "hard_negative": "s", "malicious": "X", "unknown": "D"}
OTHER_COLOURS = ("#7b3294", "#c2a5cf", "#1b7837", "#a6dba0")
_STYLE: dict[Any, Any] = {
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "svg.fonttype": "none",
}

Series = Mapping[str, Sequence[float]]
"""Name -> one value a round, NaN where there is none."""


@dataclass(frozen=True)
class Panel:
    """One of several axes side by side.

    Attributes:
        series: client -> one value a round.
        limits: of the vertical axis; None to fit the values.
        cut: a line to compare the values with, one value a round, and what it is called.
    """

    title: str
    unit: str
    series: Series
    limits: tuple[float, float] | None = None
    cut: tuple[Sequence[float], str] | None = None


def plain(text: str) -> str:
    """The text with every control, formatting, unassigned or surrogate character as U+FFFD, so
    that it can be written and reorders nothing.
    """
    return "".join(
        "\ufffd" if unicodedata.category(char).startswith("C") else char for char in text
    )


def label(text: str, length: int = 24) -> str:
    """The text for a figure.

    At most this long, without characters that the fonts of a figure lack.
    """
    text = plain(text).encode("latin-1", "replace").decode("latin-1")
    return text if len(text) <= length else text[: length - 3] + "..."


def client_styles(roles: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """How each client is drawn: shades within a role tell few clients apart.

    Many are drawn thin, in one colour a role.
    """
    few, drawn, styles = len(roles) <= NAMED, dict.fromkeys(ROLES, 0), {}
    for client, role in roles.items():
        shades = ROLE_COLOURS[role]
        styles[client] = {
            "color": shades[drawn[role] % len(shades) if few else 0],
            "linestyle": _LINES[role],
            "marker": _MARKERS[role],
            "markersize": 4.0 if few else 2.0,
            "markeredgewidth": 0,
            "linewidth": 1.3 if few else 0.7,
            "alpha": 1.0 if few else 0.6,
            "zorder": 2.0 + 0.1 * ROLES.index(role),
        }
        drawn[role] += 1
    return styles


def role_legend(figure: Figure, roles: Mapping[str, str]) -> None:
    """A heading for each role, its clients below if they are few."""
    from matplotlib.lines import Line2D

    styles = client_styles(roles)
    handles: list[Line2D] = []
    names: list[str] = []
    headings: list[int] = []
    for role in ROLES:
        members = [client for client in roles if roles[client] == role]
        if members and len(roles) <= NAMED:
            headings.append(len(names))
            handles += [Line2D([], [], linestyle="")] + [
                Line2D([], [], **styles[client]) for client in members
            ]
            names += [f"{ROLE_WORDS[role]} ({len(members)})", *members]
        elif members:
            handles.append(
                Line2D(
                    [],
                    [],
                    **styles[members[0]] | {"alpha": 1.0, "markersize": 4.0, "linewidth": 1.3},
                )
            )
            names.append(f"{ROLE_WORDS[role]} ({len(members)})")
    texts = figure_legend(figure, handles, names)
    for index in headings:
        texts[index].set_fontweight("bold")


def figure_legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """A legend right of all axes."""
    # Numbers first, names second: a legend leaves out what starts with an underscore and reads $ as
    # mathematics.
    legend = figure.legend(
        handles,
        [str(index) for index in range(len(names))],
        loc="outside right upper",
        handlelength=2.6,
    )
    return written(legend.get_texts(), names)


def written(texts: Sequence[Any], names: Sequence[str], length: int = 24) -> list[Any]:
    """The texts of a legend, each with its name as it is, whatever it holds."""
    for text, name in zip(texts, names, strict=True):
        text.set_parse_math(False)
        text.set_text(label(name, length))
    return list(texts)


def dress(
    ax: Axes, title: str, unit: str, first: int, last: int, skipped: Sequence[int] = ()
) -> None:
    """Titles, axes over the rounds from first to last, and shades for the skipped ones."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("round")
    ax.set_ylabel(unit, parse_math=False)
    ax.set_title(title, loc="left")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlim(first - 0.5, last + 0.5)
    for number in skipped:
        ax.axvspan(number - 0.5, number + 0.5, color="#eeeeee", zorder=0, linewidth=0)


def longest(series: Series) -> int:
    """How many rounds there are."""
    return max(map(len, series.values()))


def svg(
    draw: Callable[[Figure, Sequence[Axes]], None],
    alt: str,
    panels: int,
    height: float,
    widths: Sequence[float] | None = None,
) -> str:
    """Draw into `panels` axes and return the <svg> element, without what only a file needs.

    The page gives it its width.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "figures", "drawing a report") from error
    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            _STYLE | {"svg.hashsalt": alt}
        )  # ids differ between the figures of a page, and only there
        figure = Figure(figsize=(WIDTH, height))
        figure.set_layout_engine("constrained", wspace=0.06)
        draw(figure, figure.subplots(1, panels, squeeze=False, width_ratios=widths)[0])
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    document = buffer.getvalue()
    drawing = document[document.index(">", document.index("<svg")) + 1 :]
    drawing = re.sub(
        r'<g id="[^"]*"', "<g", drawing
    )  # nothing refers to these; text cannot match, its < is escaped
    drawing = re.sub(
        r"<style[^>]*>[^<]*</style>|<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL
    )
    view = f"0 0 {72 * WIDTH:g} {72 * height:g}"
    return (
        f'<svg role="img" aria-label="{html.escape(plain(alt))}" viewBox="{view}"'
        f' xmlns:xlink="http://www.w3.org/1999/xlink">{drawing}'
    )
