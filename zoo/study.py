"""How well a probe does on kinds of data it has never seen: the measurements behind every record.

Three protocols, each on the last local step of every client:

in_distribution: out-of-fold scores, folds cut by client; every kind of data is in training.
unseen_sources: one malicious and one benign source are taken out of training altogether, also as
    halves of mixtures, and so is the malicious source's safe twin (safe answers to the same
    questions). Tested are clients of that malicious source, at every poison share mixed into that
    benign source, against pure clients of that benign source. 4 x 9 cells.
twin_kept: the same with the safe twin left in training: the questions were seen, as benign.
unseen_hard_negative: one kind of hard negative is taken out; how many of its clients are flagged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraprobe.calibration import Method
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.metrics import auroc, report
from loraprobe.probe import Probe, default_head_options, fit_features, out_of_fold_scores

from .deltas import SHARES, Client, DeltaSet
from .sources import BENIGN, HARD_NEGATIVE, MALICIOUS

Row = dict[str, Any]
FOLDS = 3  # of the out-of-fold scores that thresholds and calibrations are fitted on; every cell needs its own


@dataclass(frozen=True)
class Entry:
    """What a probe is made of: recipe, head, how its threshold is found.

    Attributes:
        cuts_in_cells: whether the threshold is found anew in every cell of unseen sources, which
            takes `FOLDS` more fits each; without, a cell has an AUROC and no error rates.
    """

    name: str
    recipe: FeatureRecipe
    head: str
    threshold: float | str = 0.8
    calibration: Method | None = None
    cuts_in_cells: bool = True


ENTRIES = (
    Entry("linear", FeatureRecipe.all_b(), "linear", "fpr:0.01", "platt"),
    Entry("mlp", FeatureRecipe.all_b(), "mlp", "fpr:0.01", "platt", cuts_in_cells=False),
    Entry("xgboost", FeatureRecipe.all_b(), "xgboost", "fpr:0.01", "platt", cuts_in_cells=False),
    Entry("spectral", FeatureRecipe.spectral(), "xgboost", "fpr:0.01", "platt"),
    Entry("paper", FeatureRecipe.paper(), "linear_paper", 0.8),
)
BASELINES = (
    Entry("norm_only", FeatureRecipe.norm_only(), "linear", cuts_in_cells=False),
    Entry("a_only", FeatureRecipe.all_a(), "linear", cuts_in_cells=False),
    Entry("cosine", FeatureRecipe.all_b(), "cosine", cuts_in_cells=False),
)


class Study:
    """The features of one set of deltas, and a probe fitted on any part of it."""

    def __init__(self, deltas: DeltaSet, entry: Entry, seed: int = 0) -> None:
        adapters = deltas.adapters()
        self.entry, self.seed, self.clients = entry, seed, deltas.clients
        self.featurizer = Featurizer.fit(entry.recipe, adapters)
        self.features = self.featurizer(adapters)
        self.labels = np.array([client.label for client in deltas.clients])
        self.names = [client.name for client in deltas.clients]
        self.base_model = deltas.base_model

    def probe(self, keep: np.ndarray, with_cut: bool = True, **facts: Any) -> Probe:
        """A probe fitted on the clients of the mask; without a cut of its own, only its ranking counts."""
        rows = np.flatnonzero(keep)
        threshold, calibration = (self.entry.threshold, self.entry.calibration) if with_cut else (0.5, None)
        return fit_features(
            self.featurizer, self.features[rows], self.labels[rows], self.entry.head, [self.names[row] for row in rows],
            threshold, self.seed, calibration=calibration, folds=FOLDS, unit="client update, last local step",
            base_model=self.base_model, facts=facts,
        )  # fmt: skip

    def mask(self, test: Callable[[Client], bool]) -> np.ndarray:
        """(n,) which clients pass a test."""
        return np.array([test(client) for client in self.clients])

    def in_distribution(self) -> Row:
        """Out-of-fold report over all clients, by role and share."""
        options = default_head_options(self.entry.head, self.entry.recipe)
        scores = out_of_fold_scores(self.features, self.labels, self.names, self.entry.head, self.seed, **options)
        by = [f"{client.role} {client.share:.0%}" if client.label else client.role for client in self.clients]
        return report(self.labels, scores, self.names, threshold=0.5, by=by, seed=self.seed).to_dict()

    def unseen_sources(self, keep_twin: bool = False) -> Iterator[Row]:
        """One row per malicious source, benign source and poison share."""
        for malicious in MALICIOUS:
            for benign in BENIGN:
                unseen = {malicious, benign} if keep_twin else {malicious, benign, f"{malicious}_safe"}
                train = self.mask(lambda c, unseen=unseen: not unseen & {c.source, c.host})
                probe = self.probe(train, self.entry.cuts_in_cells)
                negatives = self.mask(lambda c, b=benign: c.role == "benign" and c.source == b)
                for share in SHARES:
                    positives = self.mask(lambda c, m=malicious, b=benign, s=share: c.source == m and c.share == s and (s == 1.0 or c.host == b))
                    yield self._cell(probe, positives, negatives, malicious, benign, share)

    def unseen_hard_negatives(self) -> Iterator[Row]:
        """One row per kind of hard negative: the share of its clients that is flagged."""
        for kind in HARD_NEGATIVE:
            probe = self.probe(self.mask(lambda c, k=kind: c.source != k))
            for share in (1.0, 0.25):
                rows = np.flatnonzero(self.mask(lambda c, k=kind, s=share: c.source == k and c.share == s))
                scores = probe.score_features(self.features[rows])
                positives = probe.score_features(self.features[self.mask(lambda c: c.role == "malicious" and c.share == 1.0)])
                labels = np.r_[np.zeros(len(scores)), np.ones(len(positives))]
                yield {
                    "hard_negative": kind, "share": share, "n": len(rows), "flagged": float((scores >= probe.threshold).mean()),
                    "auroc_against_poisoned": auroc(labels, np.r_[scores, positives]),
                }  # fmt: skip

    def _cell(self, probe: Probe, positives: np.ndarray, negatives: np.ndarray, malicious: str, benign: str, share: float) -> Row:
        bad, good = probe.score_features(self.features[positives]), probe.score_features(self.features[negatives])
        labels, scores = np.r_[np.ones(len(bad)), np.zeros(len(good))], np.r_[bad, good]
        rates = (float((bad >= probe.threshold).mean()), float((good >= probe.threshold).mean())) if self.entry.cuts_in_cells else (None, None)
        return {
            "malicious": malicious, "benign": benign, "share": share, "n_malicious": len(bad), "n_benign": len(good),
            "auroc": auroc(labels, scores), "tpr": rates[0], "fpr": rates[1],
        }  # fmt: skip


def by_share(cells: list[Row]) -> list[Row]:
    """Mean, worst and count of the cells of every poison share."""
    rows = []
    for share in SHARES:
        chosen = [cell for cell in cells if cell["share"] == share]
        worst = min(chosen, key=lambda cell: cell["auroc"])
        row = {
            "share": share, "cells": len(chosen), "n": sum(cell["n_malicious"] + cell["n_benign"] for cell in chosen),
            "auroc_mean": float(np.mean([cell["auroc"] for cell in chosen])), "auroc_worst": worst["auroc"],
            "worst_cell": f"{worst['malicious']} in {worst['benign']}",
        }  # fmt: skip
        if worst["tpr"] is not None:
            row |= {f"{rate}_mean": float(np.mean([cell[rate] for cell in chosen])) for rate in ("tpr", "fpr")}
            row |= {"fpr_worst": max(cell["fpr"] for cell in chosen)}
        rows.append(row)
    return rows
