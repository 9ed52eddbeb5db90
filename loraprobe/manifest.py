"""A manifest names labelled adapters.

A CSV with the columns path and label, and optionally those below.

path is relative to the manifest's own folder; label is 0, 1, benign or malicious. Other columns are
not read.

group: what must not be split between training and testing: a client, a run.
source: where the training data came from; for tables, figures and leave-one-out evaluation.
initial: the adapter that training started from, relative to the manifest, or "fresh"; where it is
    empty, the command's --base.
role: benign, hard_negative (labelled benign, close to malicious) or malicious.
host, share: a mixture holds this share, in (0, 1], of data from its source; the rest is ordinary
    data of the source `host`.
attack, recipe, rank, lr, base, seed: what made the data malicious; how training was set up, in a
    word; LoRA rank; learning rate; base model; whatever a seed decided for several rows at once,
    such as the initial adapter. See loraprobe.study.leave_out.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .adapters.adapter import Adapter
from .adapters.files import adapters_in
from .adapters.kinds import FRESH, as_kind
from .adapters.load import load_adapter
from .errors import DataError, LoraprobeError
from .limits import MANIFEST, MANIFEST_ROWS, read_limited

_MANIFEST = "manifest.csv"
_LABELS = {"0": 0, "1": 1, "benign": 0, "malicious": 1}
HARD_NEGATIVE = "hard_negative"
_ROLES = (("benign", HARD_NEGATIVE), ("malicious",))  # label -> the roles it may have


@dataclass(frozen=True)
class Row:
    """One labelled adapter; group and source default to its own path and its label.

    Of the other fields, empty or None is what the manifest does not say.
    """

    path: Path
    label: int
    group: str
    source: str
    role: str = ""
    host: str = ""
    share: float | None = None
    attack: str = ""
    recipe: str = ""
    rank: int | None = None
    lr: float | None = None
    base: str = ""
    seed: str = ""
    initial: Path | str | None = None

    @property
    def is_hard_negative(self) -> bool:
        """Whether it is benign and close to malicious."""
        return self.role == HARD_NEGATIVE


def read_manifest(path: Path) -> list[Row]:
    """Read a manifest, or the adapters below benign/ and malicious/ of a folder.

    A folder that holds a manifest.csv is read by that.

    Raises:
        DataError: the file or a column is missing, or a row has a label or path that is not valid.
    """
    if path.is_dir():
        if not (path / _MANIFEST).is_file():
            return _sorted_in_folders(path)
        path = path / _MANIFEST
    try:
        text = read_limited(path, MANIFEST).decode(
            "utf-8-sig"
        )  # spreadsheets write a mark in front
        reader = csv.DictReader(io.StringIO(text, newline=""))
        columns = set(reader.fieldnames or ())
        records = [(reader.line_num, record) for record in islice(reader, MANIFEST_ROWS + 1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the manifest {path}: {error}") from None
    if not {"path", "label"} <= columns or len(columns) != len(reader.fieldnames or ()):
        raise DataError(
            f"{path} has the columns {sorted(reader.fieldnames or ())}; expected path and label,"
            " and optionally others, such as group and source, each once"
        )
    if len(records) > MANIFEST_ROWS:
        raise DataError(f"{path} has more than {MANIFEST_ROWS} rows; expected at most that")
    if not records:
        raise DataError(f"{path} names no adapter; expected at least one row")
    rows = []
    labels: dict[Path, int] = {}
    for number, record in records:
        if None in record:
            raise DataError(
                f"{path}, line {number}: got more values than columns; put a path with a comma in"
                " quotes"
            )
        label = _LABELS.get((record["label"] or "").strip().lower())
        if label is None or not record["path"]:
            raise DataError(
                f"{path}, line {number}: got path {record['path']!r}, label {record['label']!r};"
                f" expected a path and one of {', '.join(_LABELS)}"
            )
        adapter = path.parent / record["path"]
        if labels.setdefault(adapter, label) != label:
            raise DataError(f"{path}, line {number}: {record['path']} has the other label above")
        group, source = (
            record.get("group") or record["path"],
            record.get("source") or ("benign", "malicious")[label],
        )
        try:
            rows.append(Row(adapter, label, group, source, **_optional(record, label, path.parent)))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    return rows


def _sorted_in_folders(folder: Path) -> list[Row]:
    """A row for every adapter at any depth below the folders named after labels."""
    rows = [
        Row(Path(found), label, str(Path(found).relative_to(folder)), name)
        for label, name in enumerate(("benign", "malicious"))
        for found in (adapters_in(folder / name, DataError) if (folder / name).is_dir() else ())
    ]
    if not rows:
        raise DataError(
            f"{folder} holds neither a {_MANIFEST} nor adapters below benign/ and malicious/;"
            " expected one of the two"
        )
    return rows


def _optional(record: Mapping[str, str | None], label: int, folder: Path) -> dict[str, Any]:
    """The optional fields of a row; ValueError for one that is not valid."""
    cells = {name: (value or "").strip() for name, value in record.items()}
    fields: dict[str, Any] = {
        name: cells.get(name, "") for name in ("role", "host", "attack", "recipe", "base", "seed")
    }
    if fields["role"] not in ("", *_ROLES[label]):
        raise ValueError(
            f"got role {fields['role']!r} for a {_ROLES[label][0]} adapter; expected"
            f" {' or '.join(_ROLES[label])}"
        )
    if rank := cells.get("rank"):
        if not (rank.isascii() and rank.isdigit() and int(rank) > 0):
            raise ValueError(f"got rank {rank!r}; expected a whole number above 0")
        fields["rank"] = int(rank)
    for name, most in (("lr", math.inf), ("share", 1.0)):
        if text := cells.get(name):
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if not (0 < number <= most and math.isfinite(number)):
                raise ValueError(
                    f"got {name} {text!r}; expected a number"
                    f" {'in (0, 1]' if most == 1 else 'above 0'}"
                )
            fields[name] = number
    if initial := cells.get("initial"):
        fields["initial"] = FRESH if initial == FRESH else folder / initial
    return fields


def kinds_of(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """What kinds of data each adapter was trained on.

    Its source, then what the source is mixed into.

    Raises:
        DataError: a source is written with its share (`name@share`) and no host says what it is
            mixed into, or stands for a label.
    """
    kinds: list[tuple[str, ...]] = []
    for row in rows:
        if "@" in row.source or row.source in ("benign", "malicious"):
            raise DataError(
                f"{row.path}: got the source {row.source!r}; kinds of data need a column source"
                " with names, and host for mixtures"
            )
        kinds.append(
            (row.source, row.host) if row.host and row.host != row.source else (row.source,)
        )
    return kinds


def read_labelled(rows: Iterable[Row], kind: str, base: str | Path | None) -> list[Adapter]:
    """The adapters of a manifest, with the failing path added to any error.

    Args:
        base: the adapter that training started from, or "fresh", for the rows that do not name
            their own.
    """
    starts: dict[Path | str | None, Adapter | str | Path | None] = {
        None: load_adapter(base) if base is not None and base != FRESH else base
    }
    adapters = []
    for row in rows:
        try:
            if row.initial is not None and row.initial not in starts:
                fresh = row.initial == FRESH
                starts[row.initial] = row.initial if fresh else load_adapter(row.initial)
            adapters.append(as_kind(load_adapter(row.path), kind, starts[row.initial]))
        except LoraprobeError as error:
            raise type(error)(f"{row.path}: {error}") from None
    return adapters
