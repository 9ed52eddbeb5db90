"""What an attack costs the model against what the defence sees of it.

A picture a group of attacks, a panel an attack, a point a strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import common
from figures.common import RESULTS, Row

NUMBERS = RESULTS / "attackers.json"
COMMAND = "paper_repro.tables"
FIELDS = ("attack", "strength", "defence", "damage", "malicious")
# picture -> (its title, its attacks)
PICTURES = {
    "made": (
        "How the update is made",
        (
            "poison share",
            "norm matching and rescaling",
            "mimicry of the mean",
            "mimicry of one client",
            "mimicry, made longer",
        ),
    ),
    "looks": (
        "What the update looks like",
        (
            "projection, probe known",
            "projection, own probe",
            "poison in A alone",
            "cancelling noise",
            "re-factorisation: rotation",
        ),
    ),
    "when": (
        "When poison is sent",
        (
            "from round k",
            "from round k, made up for",
            "every k-th round",
            "every k-th round, made up for",
        ),
    ),
}
DEFENCES = {
    "cumulative": "cumulative",
    "cumulative, round and length too": "cumulative, and every round's score and length",
}


def read_rows(path: Path = NUMBERS) -> list[Row]:
    """What `python -m paper_repro.tables` wrote.

    Raises:
        DataError: the file is missing, damaged or holds no such results.
    """
    rows = common.read_json(path, COMMAND)
    first = rows[0] if isinstance(rows, list) and rows else {}
    common.with_fields(first, FIELDS, path, COMMAND)
    return list(rows)


def plot(ax: Axes, rows: Sequence[Row], attack: str) -> None:
    """The share of the poison that each defence rejects over what the attack does undefended."""
    damage = {
        row["strength"]: row["damage"]
        for row in rows
        if (row["attack"], row["defence"]) == (attack, "no defence")
    }
    for number, (defence, label) in enumerate(DEFENCES.items()):
        chosen = [row for row in rows if (row["attack"], row["defence"]) == (attack, defence)]
        chosen.sort(key=lambda row: row["strength"])
        places = [damage[row["strength"]] for row in chosen]
        seen = [
            {"auroc": row["malicious"]["rejected"], "auroc_ci": row["malicious"]["rejected_ci"]}
            for row in chosen
        ]
        look = {"linestyle": ("-", "--")[number], "markersize": (7, 4)[number], "clip_on": False}
        common.points(ax, number, places, seen, label=label, **look)
        if number == 0:
            strengths = [f"{row['strength']:g}" for row in chosen]
            _name_points(ax, strengths, places, [row["auroc"] for row in seen])
    ax.set(xlim=(-5, 105), ylim=(0, 1))
    ax.set_title(attack, pad=18)
    ax.axhspan(0, 0.5, xmin=0.5, color="#f2e6d8", zorder=-1)


def _name_points(
    ax: Axes, names: Sequence[str], places: Sequence[float], heights: Sequence[float]
) -> None:
    """Say beside each point what it is; points that lie on each other share one text."""
    spots: dict[tuple[int, float], tuple[tuple[float, float], list[str]]] = {}
    for name, place, height in zip(names, places, heights, strict=True):
        spot = (round(place / 8), round(height, 1))
        spots.setdefault(spot, ((place, height), []))[1].append(name)
    for point, found in spots.values():
        look = {"textcoords": "offset points", "xytext": (6, 5), "fontsize": 7.5}
        ax.annotate(", ".join(found), point, color="#333333", **look)


def draw(rows: Sequence[Row], picture: str) -> Figure:
    """The figure of one group of attacks."""
    title, attacks = PICTURES[picture]
    fig, axes = common.panels(1, len(attacks), (2.6 * len(attacks), 3.6), sharey=True)
    for ax, attack in zip(axes[0], attacks, strict=True):
        plot(ax, rows, attack)
    axes[0, 0].set_ylabel("share of the poison that is rejected")
    axes[0, len(attacks) // 2].set_xlabel("damage without a defence, points of refusal lost")
    common.legend_above(fig, axes[0, 0], len(DEFENCES), title)
    row = rows[0]
    common.caption(
        fig,
        f"A point: up to {row['recordings']} recordings (two malicious sources that the probe never"
        " met, two seeds); 4 of 10 clients attack, over 4 rounds or, if they wait, 8;"
        f" {row['goals']} goals of AdvBench; bars: 95 % intervals over"
        f" {row['malicious']['clients']} attackers.\nNumbers beside points: the strength of the"
        " attack, or the k of a schedule. Shaded: where an attack wins, much damage and little"
        " rejected.",
    )
    return fig


def pictures() -> dict[str, Figure]:
    """attackers_made, attackers_looks and attackers_when."""
    rows = read_rows()
    return {f"attackers_{picture}": draw(rows, picture) for picture in PICTURES}
