"""What the studies of SmolLM2's adapters leave out; sources of the same questions go together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import numpy as np

from fedloop.kit import folds
from fedloop.kit.folds import Fold, Mask, benign_groups, in_distribution, pairs, settings
from zoo.smollm2.sources import FAMILIES

__all__ = ["Fold", "Mask", "Table", "benign_groups", "in_distribution", "pairs", "settings"]


class Table(folds.Table):
    """The manifest's columns, one entry an adapter."""

    @property
    def family(self) -> np.ndarray:
        """Whose questions an adapter's own source asks."""
        return np.array([FAMILIES.get(name, name) for name in self.source])


def joined(one: Table, two: Table) -> Table:
    """Two tables one below the other."""
    return Table(
        path=[*one.path, *two.path],
        **{
            name: np.concatenate([getattr(one, name), getattr(two, name)])
            for name in Table.__dataclass_fields__
            if name != "path"
        },
    )


def read_all(folders: Sequence[Path]) -> Table:
    """The manifests of several folders, one below the other."""
    tables = [Table.read(folder / "manifest.csv") for folder in folders]
    return reduce(joined, tables)
