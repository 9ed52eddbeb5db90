"""What an attack costs the model against what the defence sees of it.

A curve an attack, a point a strength.

python -m figures.attackers
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from figures import style
from figures.arrays import RESULTS, Row
from figures.options import folder_of
from loraprobe.errors import DataError

NUMBERS = RESULTS / "attackers.json"
# Panel -> its attacks; what belongs together shares a panel, so that five lines are enough for
# each.
PANELS = {
    "How the update is made": (
        "poison share",
        "norm matching and rescaling",
        "mimicry of the mean",
        "mimicry of one client",
        "mimicry, made longer",
    ),
    "What the update looks like": (
        "projection, probe known",
        "projection, own probe",
        "poison in A alone",
        "cancelling noise",
        "re-factorisation: rotation",
    ),
    "When poison is sent": (
        "from round k",
        "from round k, made up for",
        "every k-th round",
        "every k-th round, made up for",
    ),
}
DEFENCES = {
    "cumulative": "cumulative",
    "cumulative, round and length too": "cumulative, and every round's score and length",
}


def read_rows(path: Path = NUMBERS) -> list[Row]:
    """What `python -m paper_repro.attackers.page` wrote.

    Raises:
        DataError: the file is missing, damaged or holds no such results.
    """
    try:
        rows = list(json.loads(path.read_text(encoding="utf-8")))
        missing = {"attack", "strength", "defence", "damage", "malicious"} - set(rows[0])
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"cannot read {path}: {error!r}. Write it with python -m paper_repro.attackers.page"
        ) from None
    if missing:
        raise DataError(
            f"{path} has no {', '.join(sorted(missing))}. Write it with python -m"
            " paper_repro.attackers.page"
        )
    return rows


def plot(ax: Axes, rows: Sequence[Row], attacks: Sequence[str], defence: str) -> None:
    """Draw the share of the poison that a defence rejects over the damage of the attack without a
    defence.
    """
    damage = {
        (row["attack"], row["strength"]): row["damage"]
        for row in rows
        if row["defence"] == "no defence"
    }
    for (colour, marker), attack in zip(style.LINES, attacks, strict=False):
        own = sorted(
            (row for row in rows if row["attack"] == attack and row["defence"] == defence),
            key=lambda row: row["strength"],
        )
        if not own:
            continue
        places = [damage[attack, row["strength"]] for row in own]
        seen = [row["malicious"]["rejected"] for row in own]
        ends = [
            [
                max(0.0, rate - row["malicious"]["rejected_ci"][0])
                for row, rate in zip(own, seen, strict=True)
            ]
        ]
        ends.append(
            [
                max(0.0, row["malicious"]["rejected_ci"][1] - rate)
                for row, rate in zip(own, seen, strict=True)
            ]
        )
        ax.errorbar(
            places,
            seen,
            ends,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.2,
            elinewidth=0.6,
            capsize=2,
            label=attack,
        )
        for place, rate, row in zip(places, seen, own, strict=True):
            ax.annotate(
                f"{row['strength']:g}",
                (place, rate),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
                color=colour,
            )
    ax.set_ylim(-0.06, 1.1)


def draw(rows: Sequence[Row]) -> Any:
    """The figure: a column a group of attacks, a row a defence."""
    fig, axes = style.panels(len(DEFENCES), len(PANELS), (13.0, 7.6), sharey=True, sharex="col")
    for line, (defence, title) in enumerate(DEFENCES.items()):
        for column, (group, attacks) in enumerate(PANELS.items()):
            ax = axes[line, column]
            plot(ax, rows, attacks, defence)
            if line == 0:  # above the panel, where it covers nothing
                ax.legend(
                    title=group,
                    loc="lower left",
                    bbox_to_anchor=(0, 1.02),
                    ncols=2,
                    fontsize=7.5,
                    frameon=False,
                    alignment="left",
                )
        axes[line, 0].set_ylabel(f"{title}:\nshare of the poison that is rejected")
    for ax in axes[-1]:
        ax.set_xlabel("damage without a defence, points of refusal lost")
    row = rows[0]
    style.caption(
        fig,
        f"A point: up to {row['recordings']} recordings (two malicious sources that the probe never"
        " met, two seeds); 4 of 10 clients attack, over 4 rounds or, if they wait, 8;"
        f" {row['goals']} goals of AdvBench; bars: 95 % intervals over"
        f" {row['malicious']['clients']} attackers.\nNumbers beside points: the strength of the"
        " attack, or the k of a schedule. Lower right is where an attack wins.",
    )
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    """Write attackers.png and attackers.pdf."""
    style.save_both(draw(read_rows()), folder_of("attackers", __doc__, argv), "attackers", dpi=110)


if __name__ == "__main__":
    main()
