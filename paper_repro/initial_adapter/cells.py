"""What is left out of training, and how well it is told apart.

A cell leaves out an initial adapter, a malicious source with every source of the same questions, a
family of benign kinds and a kind of hard negative, all of them also as parts of mixtures. Tested
are the clients of that initial adapter: of the malicious source at every share, against those of
the benign family and the hard negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraprobe.fit.calibration import fpr_threshold
from loraprobe.fit.fit import held_out_scores
from loraprobe.fit.heads import fit_head
from loraprobe.heads import Head
from loraprobe.metrics import auroc

from .clients import SHARES, STARTS, Clients, Start
from .sources import FAMILIES, MALICIOUS, SAME_QUESTIONS, UNSEEN_WITH

BUDGET = 0.02
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is unseen."""

    start: Start
    malicious: str
    family: str

    @property
    def unseen(self) -> set[str]:
        """Names of kinds that are not trained on, alone or mixed."""
        same = [name for name in (SAME_QUESTIONS.get(self.malicious),) if name]
        return {
            self.malicious,
            UNSEEN_WITH[self.malicious],
            *(f"{name}_safe" for name in (self.malicious, *same)),
            *same,
            *FAMILIES[self.family],
        }

    def train(self, data: Clients, *, same_start: bool = False) -> np.ndarray:
        """Rows to learn from: of all other starts, or of the same one alone."""
        return np.array(
            [
                row
                for row, (client, start) in enumerate(zip(data.clients, data.starts, strict=True))
                if (start == self.start) == same_start
                and not self.unseen & {client.source, client.host}
            ]
        )

    def tested(self, data: Clients) -> dict[str, np.ndarray]:
        """Name of a group of tested clients -> its rows."""
        groups: dict[str, list[int]] = {name: [] for name in (*map(share_name, SHARES), *NEGATIVES)}
        for row, (client, start) in enumerate(zip(data.clients, data.starts, strict=True)):
            if start != self.start:
                continue
            if client.source == self.malicious:
                groups[share_name(client.share)].append(row)
            elif client.role == "benign" and client.source in FAMILIES[self.family]:
                groups["benign"].append(row)
            elif client.source == UNSEEN_WITH[self.malicious] and client.share == 1.0:
                groups["hard negative"].append(row)
        return {name: np.array(rows, int) for name, rows in groups.items()}


NEGATIVES = ("benign", "hard negative")


def share_name(share: float) -> str:
    """What rows call malicious clients of a poison share."""
    return f"{share:.0%}"


def all_cells(starts: Sequence[Start] = STARTS) -> list[Cell]:
    """Every start with every malicious source; the benign families in turn."""
    families = list(FAMILIES)
    return [
        Cell(start, malicious, families[(STARTS.index(start) + number) % len(families)])
        for start in starts
        for number, malicious in enumerate(MALICIOUS)
    ]


def head_on(name: str, rows: np.ndarray, data: Clients, train: np.ndarray) -> Head:
    """A head fitted on the training rows."""
    labels, groups, kinds = data.labels, data.groups, data.kinds
    chosen = [kinds[row] for row in train]
    return fit_head(
        name, rows[train], labels[train], [groups[row] for row in train], seed=0, kinds=chosen
    )


def cut_for(name: str, rows: np.ndarray, data: Clients, train: np.ndarray) -> float:
    """The cut of a budget of false positives, on training kinds left out one after the other."""
    labels, groups, kinds = data.labels[train], data.groups, data.kinds
    chosen = [groups[row] for row in train]
    scores = held_out_scores(
        rows[train], labels, chosen, kinds=[kinds[row] for row in train], head=name
    )
    return fpr_threshold(BUDGET, scores, labels, chosen)


def measured(scores: dict[str, np.ndarray], cut: float | None = None) -> Row:
    """AUROC of every share against benign clients and hard negatives, and what a cut flags."""
    negatives = np.concatenate([scores[name] for name in NEGATIVES])
    row: Row = {"n": {name: len(values) for name, values in scores.items()}, "auroc": {}}
    for share in map(share_name, SHARES):
        for against, others in (("all", negatives), ("benign", scores["benign"])):
            if len(scores[share]) and len(others):
                labels = np.r_[np.ones(len(scores[share])), np.zeros(len(others))]
                area = auroc(labels, np.r_[scores[share], others])
                row["auroc"][f"{share} against {against}"] = area
    if cut is not None:
        row["flagged"] = {name: int((values >= cut).sum()) for name, values in scores.items()}
    return row
