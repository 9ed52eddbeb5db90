"""What else was tried to tell unknown attacks from unknown benign kinds.

How well each ranks first contact, everything unseen as in `.grid`.

    python -m paper_repro.mixed.levers  # writes results/mixed_levers.json; ten minutes; needs
                                        # paper_repro.mixed.labelled

Ranking only: no cut is made. A lever is what an update is read by (a recipe, and a change of its
    features) and what is fitted on labelled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.svm import SVC, OneClassSVM

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta, weight_delta
from loraprobe.featurizer import FeatureRecipe, Featurizer
from zoo.labelled.client_design import SHARES, plan
from zoo.labelled.deltas import DeltaSet, read_deltas, read_initial
from zoo.labelled.sources import BENIGN, HARD_NEGATIVE, MALICIOUS
from zoo.labelled.unseen_sources import told_apart
from zoo.program import documented, write_rows

from ..common.paths import FOLDER
from .labelled import DESIGN
from .readers import Reader, Reading
from .setting import MODELS, Model

RESULTS = FOLDER / "results" / "mixed_levers.json"
Rows = np.ndarray  # (n, p)
Scorer = Callable[[Rows], np.ndarray]
Fit = Callable[[Rows, np.ndarray, np.ndarray], Scorer]  # labelled rows, their roles, their kinds
Change = Callable[[Rows, np.ndarray], Rows]  # rows, which of them are benign


def mass_mean(hard: float | None = None, every: int = 1) -> Fit:
    """Along the line from the mean benign kind to the mean malicious one.

    Args:
        hard: the share that hard negatives together have in the benign mean; None: what their
            number of kinds gives them.
        every: only every so-manieth benign kind is known.
    """

    def fit(x: Rows, role: np.ndarray, kind: np.ndarray) -> Scorer:
        groups = {
            name: np.unique(kind[role == name])[:: every if name == "benign" else 1]
            for name in set(role)
        }
        means = {
            name: np.mean([x[(role == name) & (kind == one)].mean(0) for one in kinds], axis=0)
            for name, kinds in groups.items()
        }
        share = (
            len(groups["hard_negative"]) / (len(groups["hard_negative"]) + len(groups["benign"]))
            if hard is None
            else hard
        )
        return _along(
            means["malicious"] - (1 - share) * means["benign"] - share * means["hard_negative"]
        )

    return fit


def ridge(strength: float) -> Fit:
    """Least squares on labels, every kind of a class weighing alike.

    The smaller the strength, the sharper the rows are separated.
    """

    def fit(x: Rows, role: np.ndarray, kind: np.ndarray) -> Scorer:
        y = np.where(role == "malicious", 1.0, -1.0)
        weight = np.zeros(len(y))
        for label in (-1.0, 1.0):
            kinds = np.unique(kind[y == label])
            for one in kinds:
                rows = (y == label) & (kind == one)
                weight[rows] = 0.5 / (len(kinds) * rows.sum())
        root = np.sqrt(weight)
        centred, target = (x - weight @ x) * root[:, None], (y - weight @ y) * root
        return _along(
            centred.T @ np.linalg.solve(centred @ centred.T + strength * np.eye(len(y)), target)
        )

    return fit


def widest_margin(x: Rows, role: np.ndarray, kind: np.ndarray) -> Scorer:
    """Group-robust: the direction whose worst kind is farthest on its side, by kinds' means."""
    kinds = np.unique(kind)
    labels = [int((role[kind == one] == "malicious").any()) for one in kinds]
    means = np.stack([x[kind == one].mean(0) for one in kinds])
    return _along(SVC(kernel="linear", C=1e9).fit(means, labels).coef_[0])


def one_class_svm(x: Rows, role: np.ndarray, kind: np.ndarray) -> Scorer:
    """How far outside what is benign, by a support vector machine that never saw an attack."""
    model = OneClassSVM(nu=0.02).fit(x[role != "malicious"])
    return lambda rows: -model.decision_function(rows)


def unlikely(x: Rows, role: np.ndarray, kind: np.ndarray) -> Scorer:
    """How unlikely among what is benign, by probabilistic principal component analysis (Tipping
    and Bishop, 1999) of 64 components.
    """
    model = PCA(64, random_state=0).fit(x[role != "malicious"])
    return lambda rows: -model.score_samples(rows)


def _along(direction: np.ndarray) -> Scorer:
    return lambda rows: np.asarray(rows @ direction)


def _as_they_are(x: Rows, benign: np.ndarray) -> Rows:
    return x


def _signs(x: Rows, benign: np.ndarray) -> Rows:
    return np.sign(x) / np.sqrt(x.shape[1])


def _whitened(x: Rows, benign: np.ndarray) -> Rows:
    scaled = x / np.sqrt((x[benign] ** 2).mean(0) + 1e-12)
    return np.asarray(scaled / np.linalg.norm(scaled, axis=1, keepdims=True))


B, FIRST, BOTH = FeatureRecipe.all_b(), FeatureRecipe.paper(), FeatureRecipe(factors=("A", "B"))
CANONICAL = FeatureRecipe(features=("canonical",))
MASS_MEAN = mass_mean()


@dataclass(frozen=True)
class Lever:
    """One way to rank updates.

    Of several recipes the scores are added up, in deviations of the known benign ones.
    """

    recipes: tuple[FeatureRecipe, ...] = (B,)
    change: Change = _as_they_are
    fit: Fit = MASS_MEAN


LEVERS = {
    "mass-mean, B of all layers": Lever(),
    "B of the first layer": Lever((FIRST,)),
    "A and B of all layers": Lever((BOTH,)),
    "canonical A and B, the same for every factorisation": Lever((CANONICAL,)),
    "ensemble of the four": Lever((B, FIRST, BOTH, CANONICAL)),
    "signs of B": Lever(change=_signs),
    "B divided by its benign root mean square": Lever(change=_whitened),
    "hard negatives half of the benign mean": Lever(fit=mass_mean(hard=0.5)),
    "half of the benign kinds": Lever(fit=mass_mean(every=2)),
    "ridge, strength 1": Lever(fit=ridge(1.0)),
    "ridge, strength 0.1": Lever(fit=ridge(0.1)),
    "ridge, strength 0.01": Lever(fit=ridge(0.01)),
    "ridge, strength 0.001": Lever(fit=ridge(0.001)),
    "group-robust: widest margin between kinds": Lever(fit=widest_margin),
    "one class: support vectors": Lever(fit=one_class_svm),
    "one class: probabilistic PCA": Lever(fit=unlikely),
}


def main() -> None:
    """Measure every lever on every base model."""
    documented(__doc__).parse_args()
    torch.set_num_threads(1)
    rows = [row for model in MODELS.values() for row in measured(model)]
    write_rows(RESULTS, rows)


def measured(model: Model) -> Iterator[dict[str, Any]]:
    """One row a lever and poison share."""
    folder = model.folder / "labelled"
    deltas, start = (
        read_deltas(folder, plan(DESIGN), model.name, DESIGN),
        read_initial(folder, model.name, DESIGN),
    )
    reading = Reading(deltas, Reader("", B, "mass_mean"))
    features = {
        recipe: features_of(recipe, deltas, start) for recipe in (B, FIRST, BOTH, CANONICAL)
    }
    for name, lever in LEVERS.items():
        cells = list(_cells(reading, [features[recipe] for recipe in lever.recipes], lever))
        for share in SHARES:
            values = {
                (malicious, benign): value for malicious, benign, at, value in cells if at == share
            }
            worst = min(values, key=lambda cell: values[cell])
            yield {
                "model": model.key,
                "lever": name,
                "share": share,
                "cells": len(values),
                "auroc_mean": round(float(np.mean(list(values.values()))), 6),
                "auroc_worst": round(values[worst], 6),
                "worst": f"{worst[0]} in {worst[1]}",
                "by_source": {
                    m: round(float(np.mean([v for (s, _), v in values.items() if s == m])), 6)
                    for m in MALICIOUS
                },
            }
        print(f"{model.key}: {name}", flush=True)


def features_of(recipe: FeatureRecipe, deltas: DeltaSet, start: Adapter) -> Rows:
    """(n, p) of every client's factor delta, or of what it does to the weights where a recipe asks
    what no factorisation can change.
    """
    adapters = deltas.adapters()
    if "canonical" in recipe.features:
        adapters = [weight_delta(add_delta(start, delta), start) for delta in adapters]
    return Featurizer.fit(recipe, adapters)(adapters)


def _cells(
    reading: Reading, features: list[Rows], lever: Lever
) -> Iterator[tuple[str, str, float, float]]:
    role, kind = (
        np.array([getattr(client, name) for client in reading.clients])
        for name in ("role", "source")
    )
    parts = [lever.change(x, role == "benign").astype(np.float32) for x in features]
    for malicious, benign in product(MALICIOUS, (*BENIGN, *HARD_NEGATIVE)):
        cell = reading.cells[malicious, benign]
        known = cell.train
        scores = np.zeros(len(role))
        for x in parts:
            found = lever.fit(x[known], role[known], kind[known])(x)
            scores += found / found[known & (role != "malicious")].std()
        for share, rows in cell.malicious_rows.items():
            apart = told_apart(scores[rows], scores[cell.benign_rows])
            yield malicious, benign, share, apart["auroc"]


if __name__ == "__main__":
    main()
