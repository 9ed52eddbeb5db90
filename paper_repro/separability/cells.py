"""Two protocols for the question whether clients can be told apart, and intervals for their
answers.

in distribution: every client is scored by a head that was fitted on other clients of the same
    sources (5 folds by client).
unseen: one malicious and one benign source are out of training (`unseen_sources`). An AUROC
    is the mean over such cells.

The head is the package's linear one. Its L2 penalty sees only inner products of rows, so the
coordinates of all rows in their common row space are found once for every set of features, and each
of the many fits is solved in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from loraprobe.errors import DataError
from loraprobe.fit.data import row_space
from loraprobe.metrics import auroc, auroc_ci
from zoo.labelled import unseen_sources as sources
from zoo.labelled.client_design import Client, Design, twin_of

FOLDS, SEED, RESAMPLES = 5, 0, 1000
C, TOLERANCE, ITERATIONS = 100.0, 1e-9, 2000  # those of loraprobe.fit.heads.fit_linear
PROTOCOLS = ("in distribution", "unseen")
Row = dict[str, Any]
Fit = tuple[
    str, str, np.ndarray
]  # malicious source, benign source, logits (n,) of the head that met neither


@dataclass(frozen=True)
class Cell:
    """What one fitted head said of clients it did not see.

    Attributes:
        labels: (n,) 1 = malicious.
        scores: (n,) logits.
        clients: (n,) numbers of the clients; intervals resample these.
    """

    malicious: str
    benign: str
    share: float
    labels: np.ndarray
    scores: np.ndarray
    clients: np.ndarray

    @property
    def auroc(self) -> float:
        """Of this cell alone."""
        return auroc(self.labels, self.scores)


class Rows:
    """Labelled feature rows of clients, some of which a head may be fitted on.

    Args:
        features: (n, p) float32, as a Featurizer makes them.
        clients: (n,) whom they belong to.
        fitted: (n,) which rows heads may be fitted on; all of them if None. The others are scored
            only.
    """

    def __init__(
        self, features: np.ndarray, clients: Sequence[Client], fitted: np.ndarray | None = None
    ) -> None:
        if len(features) != len(clients):
            raise DataError(
                f"got {len(features)} feature rows for {len(clients)} clients; expected one a"
                " client"
            )
        self.coordinates, _ = row_space(features)  # (n, k) float64
        self.clients = tuple(clients)
        self.labels = np.array([client.label for client in clients])
        self.fitted = np.ones(len(clients), bool) if fitted is None else fitted

    def mask(self, **fields: Any) -> np.ndarray:
        """(n,) which clients have these values of `zoo.labelled.client_design.Client`'s fields."""
        return np.array(
            [
                all(getattr(client, name) == value for name, value in fields.items())
                for client in self.clients
            ]
        )

    def scores(self, train: np.ndarray) -> np.ndarray:
        """(n,) logits of every row from a head fitted on the rows of the mask."""
        model = LogisticRegression(
            C=C, class_weight="balanced", solver="lbfgs", max_iter=ITERATIONS, tol=TOLERANCE
        )
        model.fit(self.coordinates[train], self.labels[train])
        return np.asarray(model.decision_function(self.coordinates))

    def out_of_fold(self) -> np.ndarray:
        """(n,) logits, each from a head that did not see that client.

        NaN for rows that no head may be fitted on.
        """
        scores, rows = np.full(len(self.clients), np.nan), np.flatnonzero(self.fitted)
        for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=SEED).split(
            rows, self.labels[rows]
        ):
            chosen = np.zeros(len(self.clients), bool)
            chosen[rows[train]] = True
            scores[rows[test]] = self.scores(chosen)[rows[test]]
        return scores


def in_distribution(rows: Rows, design: Design) -> list[Row]:
    """One row a poison share: its clients against every benign one, hard negatives among them.

    And against these alone.
    """
    scores, found = rows.out_of_fold(), []
    kinds = {"all benign": rows.labels == 0, "hard negatives": rows.mask(role="hard_negative")}
    for share in design.shares:
        bad = rows.fitted & rows.mask(role="malicious", share=share)
        for against, kind in kinds.items():
            chosen = np.flatnonzero(bad | (rows.fitted & kind))
            labels, names = rows.labels[chosen], chosen.tolist()
            low, high = auroc_ci(labels, scores[chosen], names, resamples=RESAMPLES, seed=SEED)
            found.append(
                {
                    "protocol": PROTOCOLS[0],
                    "against": against,
                    "share": share,
                    "auroc": auroc(labels, scores[chosen]),
                    "auroc_ci": [low, high],
                    "n_malicious": int(labels.sum()),
                    "n_benign": int((1 - labels).sum()),
                }
            )
    return found


def unseen_fits(rows: Rows, design: Design) -> list[Fit]:
    """The logits of every row under the head of every pair of unseen sources."""
    pairs = sources.unseen_cells(rows.clients, design.shares)
    return [
        (malicious, benign, rows.scores(rows.fitted & pairs[malicious, benign].train))
        for malicious in design.malicious
        for benign in design.benign
    ]


def unseen_cells(
    rows: Rows, design: Design, fits: Iterable[Fit], tested: np.ndarray | None = None
) -> tuple[list[Cell], list[Cell]]:
    """Every pair of unseen sources at every share, and the same malicious clients against their
    safe twin.

    Args:
        tested: (n,) which clients are scored; those that heads are fitted on if None.

    Returns:
        cells against pure clients of the benign source, cells against pure clients of the twin
        (where there is one).
    """
    scored = np.flatnonzero(rows.fitted if tested is None else tested)
    clients = [rows.clients[row] for row in scored]
    pairs = sources.unseen_cells(clients, design.shares)
    cells: list[Cell] = []
    twins: list[Cell] = []
    for malicious, benign, scores in fits:
        pair = pairs.get((malicious, benign))
        if pair is None:  # none of these clients holds one of the two
            continue
        twin = [
            row
            for row, client in enumerate(clients)
            if client.source == twin_of(malicious) and client.share == 1.0
        ]
        for share, bad in pair.malicious_rows.items():
            for negatives, kept in ((pair.benign_rows, cells), (twin, twins)):
                if len(bad) and len(negatives):
                    chosen = scored[np.r_[bad, negatives]]
                    kept.append(
                        Cell(malicious, benign, share, rows.labels[chosen], scores[chosen], chosen)
                    )
    return cells, twins


def single(cell: Cell) -> Row:
    """One cell's AUROC with its interval."""
    low, high = auroc_ci(
        cell.labels, cell.scores, cell.clients.tolist(), resamples=RESAMPLES, seed=SEED
    )
    return {
        "malicious": cell.malicious,
        "benign": cell.benign,
        "share": cell.share,
        "n_malicious": int(cell.labels.sum()),
        "n_benign": int((1 - cell.labels).sum()),
        "auroc": cell.auroc,
        "auroc_ci": [low, high],
    }


def summary(cells: Iterable[Cell]) -> Row:
    """The mean AUROC over cells, its interval, the worst cell, and how many clients stand behind
    it.
    """
    cells = list(cells)
    if not cells:
        raise DataError(
            "got no cell to summarise; expected at least one. Train more clients of every kind"
        )
    worst = min(cells, key=lambda cell: cell.auroc)
    labelled = {
        (int(client), int(label))
        for cell in cells
        for client, label in zip(cell.clients, cell.labels, strict=True)
    }
    malicious = sum(label for _, label in labelled)
    return {
        "cells": len(cells),
        "n_malicious": malicious,
        "n_benign": len(labelled) - malicious,
        "auroc": float(np.mean([cell.auroc for cell in cells])),
        "auroc_ci": list(mean_ci(cells)),
        "auroc_worst": worst.auroc,
        "worst_cell": f"{worst.malicious} in {worst.benign}",
    }


def mean_ci(cells: Sequence[Cell], level: float = 0.95) -> tuple[float, float]:
    """The cluster-bootstrap percentile interval of the mean AUROC over cells.

    One resample draws as many clients as there are, with replacement; a client that is in several
    cells is drawn for all of them, and a cell that is left with one class is left out of that
    resample's mean. It says how far other clients of the same sources would move the mean, not how
    far other sources would. Where every cell's AUROC is exactly 1 the
    bootstrap would collapse to a point: then the interval of `loraprobe.metrics.auroc_ci` for that
        case is returned.
    """
    numbers, inverse = np.unique(
        np.concatenate([cell.clients for cell in cells]), return_inverse=True
    )
    values = np.array([cell.auroc for cell in cells])
    if (values == 1.0).all():
        sides = [
            len(np.unique(np.concatenate([cell.clients[cell.labels == label] for cell in cells])))
            for label in (0, 1)
        ]
        return float(((1.0 - level) / 2.0) ** (1.0 / min(sides))), 1.0
    rng = np.random.default_rng(SEED)
    drawn = rng.integers(len(numbers), size=(RESAMPLES, len(numbers)))
    counts = np.stack([np.bincount(row, minlength=len(numbers)) for row in drawn], axis=1).astype(
        np.float64
    )  # (clients, resamples)
    resampled, at = [], 0
    for cell in cells:
        weights = counts[inverse[at : at + len(cell.clients)]]  # (n, resamples)
        at += len(cell.clients)
        resampled.append(_weighted(cell, weights))
    every = np.stack(resampled)  # (cells, resamples)
    counted = (~np.isnan(every)).sum(axis=0)
    means = np.divide(
        np.nansum(every, axis=0), counted, out=np.full(RESAMPLES, np.nan), where=counted > 0
    )
    low, high = np.nanquantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def _weighted(cell: Cell, weights: np.ndarray) -> np.ndarray:
    """The cell's AUROC under each column of client weights; NaN where a class weighs nothing.

    (resamples,).
    """
    bad, good = cell.labels == 1, cell.labels == 0
    difference = cell.scores[bad][:, None] - cell.scores[good][None, :]
    won = (difference > 0) + 0.5 * (difference == 0)  # (m, n)
    total = weights[bad].sum(axis=0) * weights[good].sum(axis=0)
    halves = (weights[bad] * (won @ weights[good])).sum(axis=0)
    return np.asarray(
        np.divide(halves, total, out=np.full(weights.shape[1], np.nan), where=total > 0)
    )
