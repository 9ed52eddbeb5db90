"""What is trained on and what is tested when one value of a manifest's field is left out.

Pure row logic, no features.

A fold leaves out every row that carries the value, and the whole group of every such row. For a
source it also leaves out

- mixtures into that source (its `host` is the value): half of their data is of the source;
- the *safe twin* `NAME_safe` of a malicious source NAME that no malicious row is left of: safe
  answers to the same questions. A probe that met the questions, and only from clients who refused
  them, has not met an unseen source; it is worse than one that never saw them. The rule holds for
  every field; `keep_twins` switches it off, to measure just that.

Tested are the rows of the value. If they are of one class, all rows of the other class (a malicious
value: all benign rows, hard negatives included) are cut by group into folds, and each is tested
once, by a probe that saw none of its group; the value's own rows are cut and tested likewise. If
they are of both classes they are tested against each other, by one probe.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..errors import DataError, FitError
from ..manifest import Row

Field = Literal["source", "attack", "recipe", "rank", "lr", "base", "seed"]
FIELDS: tuple[Field, ...] = get_args(Field)
MAX_VALUES = 64  # of a field: more are names of single rows, not of a kind
Mask = NDArray[np.bool_]
Side = Literal["malicious", "benign", "both", "pair"]


@dataclass(frozen=True)
class Part:
    """One fit and the rows that it is tested on: row numbers, ascending."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """One value, or one pair of sources, left out.

    Attributes:
        left_out: the value; of a pair "malicious | benign".
        side: the classes of the value's own rows; "pair" for a pair of sources.
        withheld: how many rows are neither trained on nor tested: mixtures, safe twins, others of
            their groups.
        parts: their tests are disjoint.
        kinds: what `kind_of` calls the value's own rows, or a pair's.
    """

    left_out: str
    side: Side
    withheld: int
    parts: tuple[Part, ...]
    kinds: frozenset[str]


def twin_of(malicious: str) -> str:
    """The name of a malicious source's safe twin.

    Safe answers to the same questions, where there is such a source.
    """
    return f"{malicious}_safe"


def kind_of(row: Row) -> str:
    """What tables call rows like this one.

    Its source, and where it is a mixture the source's share.
    """
    share = "" if row.share in (None, 1.0) else f" at {row.share:.0%}"
    return f"{row.source}{share}{' (hard negative)' if row.is_hard_negative else ''}"


def value_folds(
    rows: Sequence[Row],
    values: Sequence[str],
    by_source: bool,
    folds: int,
    seed: int,
    keep_twins: bool = False,
) -> list[Fold]:
    """A fold for every value, in alphabetical order.

    Args:
        values: (n,) what `values_of` gave; "" for a row that has none.
        by_source: whether the values are sources, so that mixtures into them are left out with
            them.
        folds: into how many parts the other class is cut at most.
    """
    table = _Table(rows)
    named = np.array(values)
    return [
        _value_fold(table, value, named == value, by_source, folds, seed, keep_twins)
        for value in sorted({*values} - {""})
    ]


def pair_folds(rows: Sequence[Row], keep_twins: bool = False) -> list[Fold]:
    """The whole grid: every malicious source with every benign one, both out of training.

    Hard negatives are among the benign. Tested are rows of that malicious source that are not mixed
    into a third one, against the benign rows of that benign source.
    """
    table = _Table(rows)
    pairs = []
    for bad in sorted({*table.source[table.labels == 1]}):
        for good in sorted({*table.source[table.labels == 0]}):
            mine = table.of_class(bad, 1) & (~table.mixed | (table.host == good))
            test = mine | table.of_class(good, 0)
            out = table.touching((bad, good))
            out |= table.twins(out, keep_twins)
            train = ~table.in_groups(out | test)
            part = Part(np.flatnonzero(train), np.flatnonzero(test))
            withheld = int((~train & ~test).sum())
            name = f"{bad} | {good}"
            pairs.append(Fold(name, "pair", withheld, (part,), table.kinds_in(test)))
    return pairs


def _value_fold(
    table: _Table,
    value: str,
    target: Mask,
    by_source: bool,
    folds: int,
    seed: int,
    keep_twins: bool,
) -> Fold:
    out = target.copy()
    if by_source:
        out |= table.mixed & (table.host == value)
    out |= table.twins(out, keep_twins)
    train, classes = ~table.in_groups(out), set(table.labels[target].tolist())
    if len(classes) == 2:
        part = Part(np.flatnonzero(train), np.flatnonzero(target))
        return Fold(value, "both", int((~train & ~target).sum()), (part,), table.kinds_in(target))
    [label] = classes
    other = table.labels != label
    numbers = _fold_numbers(table, target, other, folds, seed)
    parts = []
    for number in range(numbers.max() + 1):
        here = numbers == number
        part_train = train & ~table.in_groups(other & here)
        parts.append(Part(np.flatnonzero(part_train), np.flatnonzero((target | other) & here)))
    withheld = int((~train & ~target & ~other).sum())
    side: Side = "malicious" if label else "benign"
    return Fold(value, side, withheld, tuple(parts), table.kinds_in(target))


def _fold_numbers(
    table: _Table, target: Mask, other: Mask, folds: int, seed: int
) -> NDArray[np.int64]:
    """(n,) the number of every row's group; groups of one class and kind are spread evenly.

    Rows of neither mask have no use for it.
    """
    rng = random.Random(seed)
    numbers: dict[str, int] = {}
    count = max(1, min(folds, len({*table.groups[other]})))
    turn = 0
    for mask in (other, target):
        for kind in sorted({*table.kinds[mask]}):
            groups = sorted({*table.groups[mask & (table.kinds == kind)]} - numbers.keys())
            rng.shuffle(groups)
            for group in groups:
                numbers[group] = turn % count
                turn += 1
    return np.array([numbers.get(group, 0) for group in table.groups])


class _Table:
    """Rows as columns."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.labels = np.array([row.label for row in rows])
        self.source = np.array([row.source for row in rows])
        self.host = np.array([row.host for row in rows])
        self.groups = np.array([row.group for row in rows])
        self.kinds = np.array([kind_of(row) for row in rows])
        self.mixed = (self.host != "") & (self.host != self.source)

    def of_class(self, source: str, label: int) -> Mask:
        """Rows of a source and a class."""
        return np.asarray((self.source == source) & (self.labels == label))

    def touching(self, sources: Sequence[str]) -> Mask:
        """Rows of these sources, and mixtures into them."""
        mixed = self.mixed & np.isin(self.host, sources)
        return np.asarray(np.isin(self.source, sources) | mixed)

    def in_groups(self, mask: Mask) -> Mask:
        """Rows of a group that has a row in the mask."""
        return np.isin(self.groups, self.groups[mask])

    def kinds_in(self, mask: Mask) -> frozenset[str]:
        """The kinds of rows in the mask."""
        return frozenset(self.kinds[mask].tolist())

    def twins(self, out: Mask, keep: bool) -> Mask:
        """Rows of safe twins of the malicious sources that are left out altogether."""
        malicious = self.labels == 1
        gone = set() if keep else {*self.source[out & malicious]} - {*self.source[malicious & ~out]}
        return np.isin(self.source, np.array([twin_of(source) for source in gone], dtype=str))


def values_of(
    rows: Sequence[Row],
    adapters: Sequence[Adapter],
    field: str,
    bins: int = 4,
    edges: Sequence[float] | None = None,
) -> list[str]:
    """(n,) every row's value of a field, in words; "" for a benign row without an attack.

    Learning rates are continuous: more than `bins` different ones are cut at their quantiles, or at
    `edges`. A rank or base model that the manifest does not give is the adapter's own (a rank not
    for weight deltas, whose rank is that of a difference).

    Raises:
        FitError: the field is unknown, or has one value, or more than `MAX_VALUES`; or the edges do
            not rise.
        DataError: a row has no value, or its source holds a share or lacks the host of a mixture.
    """
    if field not in FIELDS:
        raise FitError(f"got {field!r} to leave out; expected one of {', '.join(FIELDS)}")
    if edges is not None and field != "lr":
        raise FitError(
            f"got edges for {field}; expected them for lr alone, whose values are cut into ranges"
        )
    if field == "source":
        _check_sources(rows)
    pairs = list(zip(rows, adapters, strict=True))
    if field == "lr":
        values = _ranges(rows, [row.lr for row in rows], bins, edges)
    elif field == "rank":
        values = [_rank(row, adapter) for row, adapter in pairs]
    elif field == "base":
        values = [row.base or adapter.base_model or "" for row, adapter in pairs]
    else:
        values = [str(getattr(row, field)) for row in rows]
    free = [field == "attack" and row.label == 0 for row in rows]
    _check_given(rows, field, [bool(v) or f for v, f in zip(values, free, strict=True)])
    if not 2 <= (count := len({*values} - {""})) <= MAX_VALUES:
        raise FitError(
            f"got {count} values of {field} in {len(rows)} rows; expected from 2 to {MAX_VALUES}:"
            " with one there is nothing left to train on, and a value of its own for every row is"
            " no kind that could be unseen"
        )
    return values


def _check_given(rows: Sequence[Row], field: str, present: Sequence[bool]) -> None:
    absent = [row for row, there in zip(rows, present, strict=True) if not there]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(rows)} rows have no {field}, first {absent[0].path}; expected"
            f" one each, or it may be left in training. Fill the manifest's column {field}"
        )


def _check_sources(rows: Sequence[Row]) -> None:
    for row in rows:
        if "@" in row.source and row.share is None:
            raise DataError(
                f"{row.path} has the source {row.source!r}; expected the source alone, its share in"
                " the column share, and what it is mixed into in the column host: otherwise other"
                " shares of it would stay in training"
            )
        if row.share is not None and row.share < 1 and not row.host:
            raise DataError(
                f"{row.path} is a mixture (share {row.share:g}) without a host; expected the source"
                " that the rest of its data is of"
            )


def _rank(row: Row, adapter: Adapter) -> str:
    if row.rank is not None:
        return str(row.rank)
    if adapter.kind == "weight_delta":
        return ""
    return "/".join(map(str, sorted({pair.rank for pair in adapter.values()})))


def _ranges(
    rows: Sequence[Row], numbers: Sequence[float | None], bins: int, edges: Sequence[float] | None
) -> list[str]:
    """The range that each number lies in, [low, high), the last one closed.

    The number itself where there are few.
    """
    _check_given(rows, "lr", [number is not None for number in numbers])
    rates = np.array(numbers, dtype=np.float64)
    if bins < 2:
        raise FitError(f"got {bins} bins; expected at least 2")
    if edges is None and len(set(rates.tolist())) <= bins:
        return [f"{number:g}" for number in rates]
    if edges is None:
        inner = np.unique(np.quantile(rates, np.arange(1, bins) / bins))
    else:
        inner = np.array(edges, dtype=np.float64)
        if not len(inner) or not np.isfinite(inner).all() or (np.diff(inner) <= 0).any():
            raise FitError(f"got edges {list(edges)}; expected rising numbers between the ranges")
    ends = [f"{end:.3g}" for end in (rates.min(), *inner, rates.max())]
    index = np.searchsorted(inner, rates, side="right")
    return [f"{number + 1}: {ends[number]} to {ends[number + 1]}" for number in index]
