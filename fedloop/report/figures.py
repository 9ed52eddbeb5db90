"""The figures of a run's report: plain numbers in, the text of one SVG element out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .drawing import (
    MARKED,
    OTHER_COLOURS,
    PHASE_COLOURS,
    ROLE_WORDS,
    Panel,
    Series,
    client_styles,
    dress,
    figure_legend,
    label,
    longest,
    role_legend,
    svg,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
            for client, style in client_styles(roles).items():
                values = panel.series.get(client, ())
                ax.plot(range(1, len(values) + 1), values, **style)
            _count_alike(ax, panel.series, roles)
            if panel.cut is not None:
                _draw_cut(ax, *panel.cut)
            dress(ax, panel.title, panel.unit, 1, longest(panel.series), skipped)
            if panel.limits is not None:
                ax.set_ylim(*panel.limits)
        role_legend(figure, roles)

    return svg(draw, alt, len(panels), 3.4)


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
        dress(axes[0], "", unit, 1, longest(series), skipped)
        axes[0].set_ylim(-0.03, 1.03)
        figure_legend(figure, handles, list(series))

    return svg(draw, alt, 1, 2.6)


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
            dress(ax, "", label(name, 60), min(rounds), max(rounds))

    return svg(
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
        phase: PHASE_COLOURS.get(phase, OTHER_COLOURS[index % 4])
        for index, phase in enumerate(phases)
    }
    shares = [
        (
            {phase: 100 * by_phase.get(phase, 0.0) / by_phase["train"] for phase in overhead}
            if by_phase.get("train")
            else {}
        )
        for by_phase in seconds
    ]

    def draw(figure: Figure, axes: Sequence[Axes]) -> None:
        first = _stack(axes[0], seconds, phases, colours)
        _stack(axes[1], shares, overhead, colours)
        dress(axes[0], "all phases", "seconds", 1, len(seconds))
        dress(axes[1], "defence and aggregation", "% of training time", 1, len(seconds))
        figure_legend(figure, first, list(phases))

    return svg(draw, alt, 2, 2.9)


def _count_alike(ax: Axes, series: Series, roles: Mapping[str, str]) -> None:
    """Where several lines end at the same place, say how many they are."""
    ends: dict[tuple[int, float], Counter[str]] = {}
    for client, values in series.items():
        if len(values) and math.isfinite(values[-1]):
            at = (len(values), round(values[-1], 2))
            ends.setdefault(at, Counter())[ROLE_WORDS[roles[client]]] += 1
    for at, counts in ends.items():
        if counts.total() > 1:
            ax.annotate(
                ", ".join(f"{count} {role}" for role, count in counts.items()),
                at,
                (0, -4 if at[1] > 0.5 else 4),
                textcoords="offset points",
                fontsize=7,
                ha="right",
                va="top" if at[1] > 0.5 else "bottom",
            )


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
    dress(ax, "", "share of prompts", min(rounds), max(rounds))
    ax.set_ylim(-0.03, 1.03)
    legend = ax.legend(
        ax.containers,
        [str(index) for index in range(len(shares))],
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
    )
    written(legend.get_texts(), list(shares), 48)


def _stack(
    ax: Axes,
    rounds: Sequence[Mapping[str, float]],
    phases: Sequence[str],
    colours: Mapping[str, str],
) -> list[Any]:
    below, bars = [0.0] * len(rounds), []
    for phase in phases:
        heights = [by_phase.get(phase, 0.0) for by_phase in rounds]
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
