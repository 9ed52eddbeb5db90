"""One protocol of unseen sources for every study: who is trained on and who is tested in a cell.

In a cell one malicious and one benign source are out of training, alone and in mixtures, and so is
the malicious source's safe twin. Tested are clients of that malicious source, at every poison share
mixed into that benign source, against clients of that benign source. The pairs are those of
`loraprobe.study.folds.pair_folds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraprobe.manifest import Row
from loraprobe.metrics import auroc
from loraprobe.study.folds import pair_folds

from .client_design import Client


@dataclass(frozen=True)
class Cell:
    """A malicious and a benign source that were not trained on.

    Attributes:
        train: (n,) of bool, the clients that may be fitted on.
        malicious_rows: poison share -> numbers of the clients of that malicious source.
        benign_rows: numbers of the clients of that benign source.
    """

    malicious: str
    benign: str
    train: np.ndarray
    malicious_rows: dict[float, np.ndarray]
    benign_rows: np.ndarray


def unseen_cells(
    clients: Sequence[Client],
    shares: Sequence[float],
    keep_twins: bool = False,
    anywhere: Sequence[str] = (),
) -> dict[tuple[str, str], Cell]:
    """(malicious source, benign source) -> its cell, hard negatives among the benign ones.

    Args:
        shares: poison shares, 1 among them.
        keep_twins: leave the malicious source's safe twin in training.
        anywhere: benign sources that nothing is mixed into (hard negatives): against them clients
            are tested whatever their malicious source is mixed into.
    """
    rows = [
        Row(Path(one.name), one.label, one.name, one.source, one.role, one.host, one.share)
        for one in clients
    ]
    label, share = (
        np.array([getattr(one, name) for one in clients]) for name in ("label", "share")
    )
    source = np.array([one.source for one in clients])
    found = {}
    for fold in pair_folds(rows, keep_twins):
        malicious, benign = fold.left_out.split(" | ")
        [part] = fold.parts
        train = np.zeros(len(clients), bool)
        train[part.train] = True
        tested = np.zeros(len(clients), bool)
        tested[part.test] = True
        poisoned = (source == malicious) & (label == 1)
        if benign not in anywhere:
            poisoned &= tested
        by_share = {value: np.flatnonzero(poisoned & (share == value)) for value in shares}
        good = np.flatnonzero(tested & (label == 0))
        found[malicious, benign] = Cell(malicious, benign, train, by_share, good)
    return found


def told_apart(bad: np.ndarray, good: np.ndarray) -> dict[str, Any]:
    """How well scores of malicious clients are told from those of benign ones."""
    labels = np.r_[np.ones(len(bad)), np.zeros(len(good))]
    return {
        "n_malicious": len(bad),
        "n_benign": len(good),
        "auroc": auroc(labels, np.r_[bad, good]),
    }
