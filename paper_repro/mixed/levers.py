"""What else was tried to make a direction that carries over: how well each ranks first contact, with everything unseen as in `.grid`.

    python -m paper_repro.mixed.levers      # writes results/mixed_levers.json; minutes; needs paper_repro.mixed.labelled

Ranking only: no cut is made. A lever is a way to make features of the updates and a way to make a direction of labelled rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraprobe.featurizer import FeatureRecipe
from loraprobe.metrics import auroc
from zoo.deltas import DeltaSet, read_deltas
from zoo.design import SHARES, plan
from zoo.sources import BENIGN, HARD_NEGATIVE, MALICIOUS

from .labelled import DESIGN
from .readers import Reader, Reading, unseen_in
from .setting import MODELS, Model

RESULTS = Path(__file__).parents[1] / "results" / "mixed_levers.json"
Rows = np.ndarray  # (n, p)
Direction = Callable[[Rows, np.ndarray, np.ndarray], np.ndarray]


def mass_mean(hard: float | None = None) -> Direction:
    """From the mean benign kind to the mean malicious one; with `hard`, hard negatives together have this share of the benign mean."""

    def direction(x: Rows, role: np.ndarray, kind: np.ndarray) -> np.ndarray:
        means = {name: np.mean([x[(role == name) & (kind == one)].mean(0) for one in np.unique(kind[role == name])], axis=0) for name in set(role)}
        counts = {name: len(np.unique(kind[role == name])) for name in means}
        share = counts["hard_negative"] / (counts["hard_negative"] + counts["benign"]) if hard is None else hard
        return np.asarray(means["malicious"] - (1 - share) * means["benign"] - share * means["hard_negative"])

    return direction


def ridge(strength: float) -> Direction:
    """Least squares on labels, every kind of a class weighing alike: the smaller the strength, the sharper the rows are separated."""

    def direction(x: Rows, role: np.ndarray, kind: np.ndarray) -> np.ndarray:
        y = np.where(role == "malicious", 1.0, -1.0)
        weight = np.zeros(len(y))
        for label in (-1.0, 1.0):
            kinds = np.unique(kind[y == label])
            for one in kinds:
                rows = (y == label) & (kind == one)
                weight[rows] = 0.5 / (len(kinds) * rows.sum())
        root = np.sqrt(weight)
        centred, target = (x - weight @ x) * root[:, None], (y - weight @ y) * root
        return np.asarray(centred.T @ np.linalg.solve(centred @ centred.T + strength * np.eye(len(y)), target))

    return direction


def _as_they_are(x: Rows, benign: np.ndarray) -> Rows:
    return x


def _signs(x: Rows, benign: np.ndarray) -> Rows:
    return np.sign(x) / np.sqrt(x.shape[1])


def _whitened(x: Rows, benign: np.ndarray) -> Rows:
    scaled = x / np.sqrt((x[benign] ** 2).mean(0) + 1e-12)
    return np.asarray(scaled / np.linalg.norm(scaled, axis=1, keepdims=True))


B, FIRST, BOTH = FeatureRecipe.all_b(), FeatureRecipe.paper(), FeatureRecipe(factors=("A", "B"))
LEVERS: dict[str, tuple[FeatureRecipe, Callable[[Rows, np.ndarray], Rows], Direction]] = {
    "mass-mean, B of all layers": (B, _as_they_are, mass_mean()),
    "B of the first layer": (FIRST, _as_they_are, mass_mean()),
    "A and B of all layers": (BOTH, _as_they_are, mass_mean()),
    "signs of B": (B, _signs, mass_mean()),
    "B divided by its benign root mean square": (B, _whitened, mass_mean()),
    "hard negatives half of the benign mean": (B, _as_they_are, mass_mean(hard=0.5)),
    "ridge, strength 1": (B, _as_they_are, ridge(1.0)),
    "ridge, strength 0.1": (B, _as_they_are, ridge(0.1)),
    "ridge, strength 0.01": (B, _as_they_are, ridge(0.01)),
    "ridge, strength 0.001": (B, _as_they_are, ridge(0.001)),
}


def main() -> None:
    """Measure every lever on every base model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for model in MODELS.values() for row in measured(model)]
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def measured(model: Model) -> Iterator[dict[str, Any]]:
    """One row a lever and poison share."""
    deltas = read_deltas(model.folder / "labelled", plan(DESIGN), model.name, DESIGN)
    for name, (recipe, change, direction) in LEVERS.items():
        cells = list(_cells(deltas, recipe, change, direction))
        for share in SHARES:
            values = {(malicious, benign): value for malicious, benign, at, value in cells if at == share}
            worst = min(values, key=lambda cell: values[cell])
            yield {
                "model": model.key, "lever": name, "share": share, "cells": len(values),
                "auroc_mean": round(float(np.mean(list(values.values()))), 6),
                "auroc_worst": round(values[worst], 6), "worst": f"{worst[0]} in {worst[1]}",
                "by_source": {m: round(float(np.mean([v for (s, _), v in values.items() if s == m])), 6) for m in MALICIOUS},
            }  # fmt: skip
        print(f"{model.key}: {name}", flush=True)


def _cells(
    deltas: DeltaSet, recipe: FeatureRecipe, change: Callable[[Rows, np.ndarray], Rows], direction: Direction
) -> Iterator[tuple[str, str, float, float]]:
    reading = Reading(deltas, Reader("", recipe, "mass_mean"))
    role, kind, share, host = (np.array([getattr(client, name) for client in reading.clients]) for name in ("role", "source", "share", "host"))
    x = change(reading.features, role == "benign").astype(np.float32)
    for malicious in MALICIOUS:
        for benign in (*BENIGN, *HARD_NEGATIVE):
            known = ~reading.with_kind(unseen_in(malicious, benign))
            scores = x @ direction(x[known], role[known], kind[known])
            good = scores[(kind == benign) & (role != "malicious")]
            for at in SHARES:
                anywhere = at == 1.0 or benign in HARD_NEGATIVE
                bad = scores[(kind == malicious) & (share == at) & (anywhere | (host == benign))]
                yield malicious, benign, at, auroc(np.r_[np.ones(len(bad)), np.zeros(len(good))], np.r_[bad, good])


if __name__ == "__main__":
    main()
