"""What studies of labelled adapters leave out: sources, kinds, initial adapters, settings."""

from __future__ import annotations

import csv
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from ..errors import DataError
from .design import MODULE_SETS

GROUPS = 6  # of kinds of benign data that are left out together
FOLDS = 5  # in distribution
LONG = 30  # steps
Mask = np.ndarray


@dataclass(frozen=True)
class Table:
    """The manifest's columns, one entry an adapter."""

    path: list[Path]
    label: np.ndarray
    role: np.ndarray
    source: np.ndarray
    host: np.ndarray
    share: np.ndarray
    initial: np.ndarray
    rank: np.ndarray
    modules: np.ndarray
    steps: np.ndarray

    @classmethod
    def read(cls, manifest: Path) -> Self:
        """Of a manifest that `fedloop.kit.clients` wrote.

        Raises:
            DataError: there is none.
        """
        if not manifest.is_file():
            raise DataError(f"no manifest at {manifest}; train the clients first")
        with manifest.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        column = {name: [row[name] for row in rows] for name in rows[0]}
        numbers = {name: np.array(column[name], int) for name in ("label", "rank", "steps")}
        numbers["initial"] = np.array(column["seed"], int)
        names = {name: np.array(column[name]) for name in ("role", "source", "host", "modules")}
        paths = [manifest.parent / path for path in column["path"]]
        return cls(path=paths, share=np.array(column["share"], float), **numbers, **names)

    def __len__(self) -> int:
        return len(self.path)

    @property
    def family(self) -> np.ndarray:
        """Which sources are left out together: here every source by itself."""
        return self.source

    @property
    def kinds(self) -> list[tuple[str, ...]]:
        """What loraprobe's heads call kinds: the source, then the host of a mixture."""
        pairs = zip(self.source, self.host, strict=True)
        return [(s, h) if s != h else (s,) for s, h in pairs]

    def touches(self, kinds: Collection[str]) -> Mask:
        """Whether an adapter saw data of one of these kinds, by itself or mixed in."""
        names = list(kinds)
        return np.isin(self.source, names) | np.isin(self.host, names)


@dataclass(frozen=True)
class Fold:
    """A split: what is trained on, what is tested on."""

    name: str
    train: Mask
    test: Mask


def benign_groups(table: Table) -> list[list[str]]:
    """The benign kinds, hard negatives among them, in groups that are left out together."""
    rng = random.Random(0)
    groups: list[list[str]] = [[] for _ in range(GROUPS)]
    for role in ("benign", "hard_negative"):
        names = sorted(set(table.source[table.role == role].tolist()))
        for index, name in enumerate(rng.sample(names, len(names))):
            groups[index % GROUPS].append(name)
    return [group for group in groups if group]


def in_distribution(table: Table) -> Iterator[Fold]:
    """Every client once, by chance."""
    order = np.random.default_rng(0).permutation(len(table))
    for number in range(FOLDS):
        test = np.zeros(len(table), bool)
        test[order[number::FOLDS]] = True
        yield Fold(f"fold {number + 1}", ~test, test)


def pairs(table: Table, initials: int = 1) -> Iterator[Fold]:
    """A family of malicious sources and a group of benign kinds, both unseen.

    Args:
        initials: into how many parts the initial adapters are cut; with more than one, the part
            that is tested on is not trained on either, and everything is unseen.
    """
    families = sorted(set(table.family[table.label == 1].tolist()))
    seeds = np.random.default_rng(0).permutation(sorted(set(table.initial.tolist())))
    for family in families:
        for number, group in enumerate(benign_groups(table)):
            for part in range(initials):
                here = np.isin(table.initial, seeds[part::initials])
                malicious = (table.label == 1) & (table.family == family)
                benign = (table.label == 0) & np.isin(table.source, group)
                train = (table.family != family) & ~table.touches(group)
                if initials > 1:
                    train &= ~here
                name = f"{family} x group {number + 1}"
                name += f" x initial part {part + 1}" if initials > 1 else ""
                yield Fold(name, train, (malicious | benign) & here)


def settings(table: Table) -> dict[str, list[Fold]]:
    """Initial adapters, ranks, module sets and numbers of steps left out, one after the other."""
    seeds = np.random.default_rng(0).permutation(sorted(set(table.initial.tolist())))
    by_setting: dict[str, list[Fold]] = {
        "initial adapter": [
            _without(f"part {part + 1}", np.isin(table.initial, seeds[part::5]))
            for part in range(5)
        ],
        "rank": [_without(f"rank {r}", table.rank == r) for r in sorted(set(table.rank.tolist()))],
        "modules": [_without(name, table.modules == name) for name in MODULE_SETS],
        "steps": [
            _without("30 steps or more", table.steps >= LONG),
            _without("under 30 steps", table.steps < LONG),
        ],
    }
    return {
        name: [fold for fold in folds if fold.test.any() and fold.train.any()]
        for name, folds in by_setting.items()
    }


def _without(name: str, test: Mask) -> Fold:
    return Fold(name, ~test, test)
