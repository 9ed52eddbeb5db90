"""What papers report beside what was measured here: two columns that are never mixed.

The settings differ in everything but the question.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraprobe.errors import DataError

from ..common.format import attack_name, markdown, spread, where
from ..common.paths import FOLDER
from .cells import FULL, NO_ATTACK, SOURCES, Axes
from .lines import Line
from .tables import within

REPORTED = FOLDER / "reported.json"
FIELDS = {"source", "setting", "defence", "attack", "measure", "value", "measured"}
MEASURES = {"refusal_rule": "Rule", "refusal_strict": "strict refusal"}


def read_reported(path: Path = REPORTED) -> list[dict[str, Any]]:
    """Every reported figure.

    `measured` says which of our cells asks the same question, None that none does.

    Raises:
        DataError: the file is not a list of such figures.
    """
    figures = json.loads(path.read_text(encoding="utf-8"))
    for figure in figures:
        if figure.keys() != FIELDS:
            raise DataError(
                f"{path}: got a figure with {', '.join(sorted(figure))}; expected"
                f" {', '.join(sorted(FIELDS))}"
            )
    return list(figures)


def reported_table(lines: Sequence[Line]) -> str:
    """One row a reported figure: those that a cell of ours can stand beside, then the others."""
    own = within(lines, Axes(sources=SOURCES[:1], benign=FULL.benign[:1]))
    names = ("source", "setting", "defence", "attack", "measure")
    head = ["reported by", "its setting", "defence", "attack", "measure", "reported"]
    alone, beside = [head], [[*head, "measured here", "runs", "our cell and measure"]]
    for figure in read_reported():
        value = figure["value"]
        said = [
            *(figure[name] for name in names),
            f"{value:g}" if isinstance(value, int | float) else value,
        ]
        if figure["measured"] is None:
            alone.append(said)
        else:
            beside.append([*said, *_measured(figure["measured"], own)])
    return (
        f"{markdown(beside)}\nMeasured: mean ± standard deviation over seeds in %, {SOURCES[0]} and"
        f" the {FULL.benign[0]} benign set, a model of 1.05 M parameters; a dash: the cell was not"
        f" run. Reported, and nothing here asks the same question:\n\n{markdown(alone)}"
    )


def _measured(cell: dict[str, Any], lines: Sequence[Line]) -> list[str]:
    found = where(lines, **{name: cell[name] for name in ("row", "malicious", "share")})
    place = cell["row"]
    if place != NO_ATTACK:
        place += f", {attack_name(cell['malicious'], cell['share'])}"
    measured = spread([line["metrics"][cell["metric"]] for line in found])
    return [measured, str(len(found)), f"{place}: {MEASURES[cell['metric']]}"]
