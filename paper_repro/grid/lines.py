"""The runs that were made.

A file of JSON lines, one a run, that only grows, survives being cut off, and may be written by
several.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from loraprobe.errors import DataError

from ..common.paths import FOLDER
from ..common.setting import BASE
from .cells import Cell

RESULTS = FOLDER / "results" / "defences.jsonl"
Line = dict[str, Any]


def cell_of(line: Line) -> Cell:
    """The cell that a line is a run of; a line that names no base model is of the first."""
    facts = {"base": BASE, **line}
    return Cell(*(facts[field.name] for field in fields(Cell)))


def read_lines(path: Path = RESULTS) -> list[Line]:
    """The latest line of every cell.

    A last line without an end was cut off while it was written, and is left out.

    Raises:
        DataError: another line cannot be read.
    """
    if not path.exists():
        return []
    found: dict[Cell, Line] = {}
    *whole, _cut_off = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            found[cell_of(line)] = line
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: {error!r}; expected the JSON of one run. Delete the line:"
                " its run is then made again."
            ) from None
    return list(found.values())


def append_line(line: Line, path: Path = RESULTS) -> None:
    """Write a run down, on disk when this returns.

    What an interrupted writer left of a line goes.
    """
    path.parent.mkdir(exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        kept = file.read()
        file.truncate(kept.rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
