"""The figures of a run's report: plain numbers in, the text of one SVG element out.

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
_OTHER_COLOURS = ("#7b3294", "#c2a5cf", "#1b7837", "#a6dba0")
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


def clients_over_rounds(
    panels: Sequence[Panel], roles: Mapping[str, str], skipped: Sequence[int], alt: str
) -> str:
    """A line for every client in each panel; colour, line style and marker say its role.

    Rounds without a value are gaps.

    Args:
        roles: client -> one of ROLES, for every client of the panels, in the order of the legend.
        skipped: rounds to shade.
        alt: what a reader who cannot see it is told.

    Raises:
        MissingExtra: matplotlib is not installed.
    """

    def draw(figure: Figure, axes: Sequence[Axes]) -> None:
        for ax, panel in zip(axes, panels, strict=True):
            for client, style in _client_styles(roles).items():
                values = panel.series.get(client, ())
                ax.plot(range(1, len(values) + 1), values, **style)
            if panel.cut is not None:
                _draw_cut(ax, *panel.cut)
            _dress(ax, panel.title, panel.unit, 1, _longest(panel.series), skipped)
            if panel.limits is not None:
                ax.set_ylim(*panel.limits)
        _role_legend(figure, roles)

    return _svg(draw, alt, len(panels), 3.4)


def lines_over_rounds(
    series: Series, colours: Mapping[str, str], unit: str, skipped: Sequence[int], alt: str
) -> str:
    """A few named lines from 0 to 1. Raises MissingExtra as `clients_over_rounds`."""

    def draw(figure: Figure, axes: Sequence[Axes]) -> None:
        dashes, handles = ("-", "--", ":"), []
        for index, (name, values) in enumerate(series.items()):
            style: dict[str, Any] = {
                "color": colours[name],
                "linestyle": dashes[index % 3],
                "marker": "Xos"[index % 3],
                "markersize": 4.5 if len(values) <= MARKED else 2.0,
            }
            handles += axes[0].plot(range(1, len(values) + 1), values, linewidth=1.4, **style)
        _dress(axes[0], "", unit, 1, _longest(series), skipped)
        axes[0].set_ylim(-0.03, 1.03)
        _legend(figure, handles, list(series))

    return _svg(draw, alt, 1, 2.6)


def metrics_over_rounds(
    shares: Mapping[str, Sequence[tuple[float, float, float]]],
    others: Series,
    rounds: Sequence[int],
    alt: str,
) -> str:
    """Shares with their intervals in one panel, every other metric in one of its own.

    Args:
        shares: metric -> (value, low, high) a measured round, NaN where this metric was not
            measured.
        rounds: the measured rounds.

    Raises MissingExtra as `clients_over_rounds`.
    """

    def draw(figure: Figure, axes: Sequence[Axes]) -> None:
        if shares:
            _draw_shares(axes[0], shares, rounds)
        for ax, (name, values) in zip(axes[1 if shares else 0 :], others.items(), strict=True):
            ax.plot(rounds, values, color="#333333", linewidth=1.4, marker="o", markersize=4)
            _dress(ax, "", label(name, 60), min(rounds), max(rounds))

    return _svg(
        draw,
        alt,
        len(others) + bool(shares),
        3.3,
        widths=[2.2] * bool(shares) + [1.0] * len(others),
    )


def seconds_by_round(
    seconds: Sequence[Mapping[str, float]], phases: Sequence[str], overhead: Sequence[str], alt: str
) -> str:
    """Stacked bars: seconds of every phase, and beside it the phases of `overhead` as a share of
    training.

    Args:
        seconds: phase -> seconds, one mapping a round. A round without training has no bar in the
            second panel.

    Raises MissingExtra as `clients_over_rounds`.
    """
    colours = {
        phase: PHASE_COLOURS.get(phase, _OTHER_COLOURS[index % 4])
        for index, phase in enumerate(phases)
    }
    shares = [
        (
            {phase: 100 * one.get(phase, 0.0) / one["train"] for phase in overhead}
            if one.get("train")
            else {}
        )
        for one in seconds
    ]

    def draw(figure: Figure, axes: Sequence[Axes]) -> None:
        first = _stack(axes[0], seconds, phases, colours)
        _stack(axes[1], shares, overhead, colours)
        _dress(axes[0], "all phases", "seconds", 1, len(seconds))
        _dress(axes[1], "defence and aggregation", "% of training time", 1, len(seconds))
        _legend(figure, first, list(phases))

    return _svg(draw, alt, 2, 2.9)


def _draw_cut(ax: Axes, cut: Sequence[float], name: str) -> None:
    rounds = [0.5, *range(1, len(cut) + 1), len(cut) + 0.5]
    ax.plot(rounds, [cut[0], *cut, cut[-1]], color="black", linewidth=0.8, linestyle=":")
    ax.annotate(
        label(name),
        (0.5, cut[0]),
        (3, 2),
        textcoords="offset points",
        fontsize=7,
        va="bottom",
        parse_math=False,
    )


def _draw_shares(
    ax: Axes, shares: Mapping[str, Sequence[tuple[float, float, float]]], rounds: Sequence[int]
) -> None:
    colours = ("#08519c", "#f16913", "#595959", "#2a9d6f", "#b30000", "#6baed6")
    apart = (
        0.06 * (max(rounds) - min(rounds)) / len(rounds)
    )  # intervals of one round beside each other
    for index, points in enumerate(shares.values()):
        values = [value for value, _, _ in points]
        errors = [
            [max(0.0, value - low) for value, low, _ in points],
            [max(0.0, high - value) for value, _, high in points],
        ]
        at = [number + apart * (index - (len(shares) - 1) / 2) for number in rounds]
        style: dict[str, Any] = {
            "color": colours[index % 6],
            "linestyle": ("-", "--", "-.", ":")[index % 4],
            "marker": "osXD"[index % 4],
        }
        ax.errorbar(
            at, values, errors, linewidth=1.4, markersize=4, elinewidth=0.8, capsize=2, **style
        )
    _dress(ax, "", "share of prompts", min(rounds), max(rounds))
    ax.set_ylim(-0.03, 1.03)
    legend = ax.legend(
        ax.containers,
        [str(index) for index in range(len(shares))],
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
    )
    _name(legend.get_texts(), list(shares), 48)


def _stack(
    ax: Axes,
    rounds: Sequence[Mapping[str, float]],
    phases: Sequence[str],
    colours: Mapping[str, str],
) -> list[Any]:
    below, bars = [0.0] * len(rounds), []
    for phase in phases:
        heights = [one.get(phase, 0.0) for one in rounds]
        bars.append(
            ax.bar(
                range(1, len(rounds) + 1),
                heights,
                0.75 if len(rounds) <= MARKED else 1.0,
                bottom=below,
                color=colours[phase],
                linewidth=0,
            )
        )
        below = [start + height for start, height in zip(below, heights, strict=True)]
    return bars


def _client_styles(roles: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """How each client is drawn: shades within a role tell few clients apart.

    Many are drawn thin, in one colour a role.
    """
    few, seen, styles = len(roles) <= NAMED, dict.fromkeys(ROLES, 0), {}
    for client, role in roles.items():
        shades = ROLE_COLOURS[role]
        styles[client] = {
            "color": shades[seen[role] % len(shades) if few else 0],
            "linestyle": _LINES[role],
            "marker": _MARKERS[role],
            "markersize": 4.0 if few else 2.0,
            "markeredgewidth": 0,
            "linewidth": 1.3 if few else 0.7,
            "alpha": 1.0 if few else 0.6,
            "zorder": 2.0 + 0.1 * ROLES.index(role),
        }
        seen[role] += 1
    return styles


def _role_legend(figure: Figure, roles: Mapping[str, str]) -> None:
    """A heading for each role, its clients below if they are few."""
    from matplotlib.lines import Line2D

    styles = _client_styles(roles)
    handles: list[Line2D] = []
    names: list[str] = []
    headings: list[int] = []
    for role in ROLES:
        members = [client for client, own in roles.items() if own == role]
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
    texts = _legend(figure, handles, names)
    for index in headings:
        texts[index].set_fontweight("bold")


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """A legend right of all axes."""
    # Numbers first, names second: a legend leaves out what starts with an underscore and reads $ as
    # mathematics.
    legend = figure.legend(
        handles,
        [str(index) for index in range(len(names))],
        loc="outside right upper",
        handlelength=2.6,
    )
    return _name(legend.get_texts(), names)


def _name(texts: Sequence[Any], names: Sequence[str], length: int = 24) -> list[Any]:
    for text, name in zip(texts, names, strict=True):
        text.set_parse_math(False)
        text.set_text(label(name, length))
    return list(texts)


def _dress(
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


def _longest(series: Series) -> int:
    return max(map(len, series.values()))


def _svg(
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
        raise MissingExtra("matplotlib", "figures", "the figures of a report") from error
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
