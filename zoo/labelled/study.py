"""How well a probe does on kinds of data it has never seen: the measurements behind every record.

Each protocol measures on the last local step of every client:

in_distribution: out-of-fold scores, folds cut by client; every kind of data is in training.
cell: one malicious and one benign source unseen (`unseen_sources`), against pure clients of that
    benign source. In the zoo: 4 x 9 cells. With the twin kept, its questions were seen, as
    benign.
hard_negative: one kind of hard negative is taken out; how many of its clients are flagged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from loraprobe.calibration import Method
from loraprobe.distribution import distribution_of
from loraprobe.evaluation import report
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.fit.fit import default_head_options, fit_features, held_out_scores
from loraprobe.metrics import auroc
from loraprobe.probe import Probe

from .client_design import HARD_SHARE, Client
from .deltas import DeltaSet
from .unseen_sources import Cell, told_apart, unseen_cells

Row = dict[str, Any]
# of the out-of-fold scores that thresholds and calibrations are fitted on; every cell needs its own
FOLDS = 3
IN_DISTRIBUTION_FOLDS = 5


@dataclass(frozen=True)
class Entry:
    """What a probe is made of: recipe, head, how its threshold is found.

    Attributes:
        cuts_in_cells: whether the threshold is found anew in every cell of unseen sources, which
            takes `FOLDS` more fits each; without, a cell has an AUROC and no error rates.
    """

    FIELDS: ClassVar = ("recipe", "head", "threshold", "calibration", "cuts_in_cells")

    name: str
    recipe: FeatureRecipe
    head: str
    threshold: float | str = 0.8
    calibration: Method | None = None
    cuts_in_cells: bool = True

    def to_dict(self) -> Row:
        """All but the name, as a record holds it."""
        recipe = json.loads(json.dumps(self.recipe.to_dict()))
        return {
            field: recipe if field == "recipe" else getattr(self, field) for field in self.FIELDS
        }

    @classmethod
    def from_dict(cls, name: str, data: Row) -> Entry:
        """The inverse of `to_dict`; other keys of the data do not count."""
        values = {field: data[field] for field in cls.FIELDS}
        return cls(name, **{**values, "recipe": FeatureRecipe.from_dict(values["recipe"])})


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
        self.entry = entry
        self.seed = seed
        self.clients = deltas.clients
        self.design = deltas.design
        self._cells: dict[bool, dict[tuple[str, str], Cell]] = {}
        self.featurizer = Featurizer.fit(entry.recipe, adapters)
        self.features = self.featurizer(adapters)
        self.labels = np.array([client.label for client in deltas.clients])
        self.names = [client.name for client in deltas.clients]
        self.base_model = deltas.base_model

    @property
    def fits_of_a_probe(self) -> int:
        """How many heads are fitted for one probe with a cut of its own."""
        return 1 + FOLDS * (
            self.entry.calibration is not None or isinstance(self.entry.threshold, str)
        )

    def probe(self, keep: np.ndarray, with_cut: bool = True, **facts: Any) -> Probe:
        """A probe fitted on the clients of the mask.

        Without a cut of its own, only its ranking counts.
        """
        rows = np.flatnonzero(keep)
        threshold, calibration = (
            (self.entry.threshold, self.entry.calibration) if with_cut else (0.5, None)
        )
        return fit_features(
            self.featurizer,
            self.features[rows],
            self.labels[rows],
            head=self.entry.head,
            groups=[self.names[row] for row in rows],
            threshold=threshold,
            seed=self.seed,
            calibration=calibration,
            folds=FOLDS,
            unit="client update, last local step",
            base_model=self.base_model,
            facts=facts,
        )

    def mask(self, test: Callable[[Client], bool]) -> np.ndarray:
        """(n,) which clients pass a test."""
        return np.array([test(client) for client in self.clients])

    def in_distribution(self) -> Row:
        """Out-of-fold report over all clients, by role and share."""
        by = [
            f"{client.role} {client.share:.0%}" if client.label else client.role
            for client in self.clients
        ]
        return report(
            self.labels,
            self._out_of_fold(IN_DISTRIBUTION_FOLDS),
            self.names,
            threshold=0.5,
            by=by,
            seed=self.seed,
        ).to_dict()

    def score_distribution(self, probe: Probe) -> Row:
        """How often a published probe's scores fall where, by kind of client, from heads that did
        not see the client.
        """
        scores = self._out_of_fold(FOLDS)
        scores = scores if probe.calibration is None else probe.calibration(scores)
        kinds = np.array([client.kind for client in self.clients])
        ordered = [
            client.kind
            for client in sorted(
                self.clients, key=lambda client: (client.label, client.role, -client.share)
            )
        ]
        what = (
            f"out-of-fold scores, {FOLDS} folds by"
            f" client{', calibrated' if probe.calibration else ''}; all sources in training"
        )
        return distribution_of(
            what, "client update", {kind: scores[kinds == kind] for kind in dict.fromkeys(ordered)}
        )

    def cell(self, malicious: str, benign: str, keep_twin: bool = False) -> list[Row]:
        """One row a poison share, for a malicious and a benign source that were not trained on."""
        if keep_twin not in self._cells:
            self._cells[keep_twin] = unseen_cells(self.clients, self.design.shares, keep_twin)
        cell = self._cells[keep_twin][malicious, benign]
        probe = self.probe(cell.train, self.entry.cuts_in_cells)
        good = probe.score_features(self.features[cell.benign_rows])
        rows = []
        for share, chosen in cell.malicious_rows.items():
            bad = probe.score_features(self.features[chosen])
            row: Row = {"malicious": malicious, "benign": benign, "share": share}
            row |= told_apart(bad, good) | {"tpr": None, "fpr": None}
            if self.entry.cuts_in_cells:
                row["tpr"] = float((bad >= probe.threshold).mean())
                row["fpr"] = float((good >= probe.threshold).mean())
            rows.append(row)
        return rows

    def hard_negative(self, kind: str) -> list[Row]:
        """One row a share: how many clients of a kind of hard negative are flagged that was not
        trained on.
        """
        probe = self.probe(self.mask(lambda c: c.source != kind))
        positives = probe.score_features(
            self.features[self.mask(lambda c: c.role == "malicious" and c.share == 1.0)]
        )
        rows = []
        for share in (1.0, HARD_SHARE):
            chosen = np.flatnonzero(self.mask(lambda c, s=share: c.source == kind and c.share == s))
            scores = probe.score_features(self.features[chosen])
            labels = np.r_[np.zeros(len(scores)), np.ones(len(positives))]
            rows.append(
                {
                    "hard_negative": kind,
                    "share": share,
                    "n": len(chosen),
                    "flagged": float((scores >= probe.threshold).mean()),
                    "auroc_against_poisoned": auroc(labels, np.r_[scores, positives]),
                }
            )
        return rows

    def _out_of_fold(self, folds: int) -> np.ndarray:
        options = default_head_options(self.entry.head, self.entry.recipe)
        return held_out_scores(
            self.features,
            self.labels,
            self.names,
            head=self.entry.head,
            head_options=options,
            seed=self.seed,
            folds=folds,
        )


def by_share(cells: list[Row]) -> list[Row]:
    """Mean, worst and count of the cells of every poison share."""
    rows = []
    for share in dict.fromkeys(cell["share"] for cell in cells):
        chosen = [cell for cell in cells if cell["share"] == share]
        worst = min(chosen, key=lambda cell: cell["auroc"])
        row = {
            "share": share,
            "cells": len(chosen),
            "n": sum(cell["n_malicious"] + cell["n_benign"] for cell in chosen),
            "auroc_mean": float(np.mean([cell["auroc"] for cell in chosen])),
            "auroc_worst": worst["auroc"],
            "worst_cell": f"{worst['malicious']} in {worst['benign']}",
        }
        if worst["tpr"] is not None:
            row |= {
                f"{rate}_mean": float(np.mean([cell[rate] for cell in chosen]))
                for rate in ("tpr", "fpr")
            }
            row |= {"fpr_worst": max(cell["fpr"] for cell in chosen)}
        rows.append(row)
    return rows
