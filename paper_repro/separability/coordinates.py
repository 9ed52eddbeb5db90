"""Two-dimensional coordinates of the updates for the figures, so that those can be drawn anew
without training.

    python -m paper_repro.separability.coordinates  # results/separability_coordinates.npz; minutes

UMAP with a fixed seed at several numbers of neighbours, and PCA beside it; neither sees a label.
They are pictures: no number of this project rests on them. Finished parts are kept under
build/separability/coordinates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.study.embed import embed
from zoo.labelled.deltas import DeltaSet
from zoo.program import documented

from ..common.paths import FOLDER
from .rounds import columns_of
from .run import RECIPES, zoo_deltas
from .sampled import WAYS, recorded_sources, sampled

COORDINATES = FOLDER / "results" / "separability_coordinates.npz"
KEPT = Path("build/separability/coordinates")
SEED = 0
NEIGHBOURS = (5, 15, 50)
METHODS: dict[str, dict[str, Any]] = {
    "pca": {},
    **{f"umap{count}": {"n_neighbors": count} for count in NEIGHBOURS},
}
ROUND_METHODS = ("pca", "umap15")
SHORT = {"paper (B, first layer)": "paper", "all B": "all_b"}
PARTS = (*SHORT.values(), "rounds")


def main() -> None:
    """Embed what is not embedded yet, and write the file."""
    options = documented(__doc__, "work").parse_args()
    torch.set_num_threads(1)
    deltas = zoo_deltas(options.work)
    KEPT.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if not (KEPT / f"{part}.npz").exists():
            arrays = round_arrays(deltas) if part == "rounds" else zoo_arrays(deltas, part)
            np.savez(KEPT / f"{part}.npz", **arrays)
    found: dict[str, Any] = {"seed": np.array(SEED)}
    for part in PARTS:
        with np.load(KEPT / f"{part}.npz") as file:
            found |= {name: file[name] for name in file.files}
    np.savez_compressed(COORDINATES, **found)


def zoo_arrays(deltas: DeltaSet, part: str) -> dict[str, Any]:
    """Of every client of the zoo after its last local step.

    Who it is, and (n, 2) float16 of a recipe for each method.
    """
    clients = deltas.clients
    arrays: dict[str, Any] = {
        "zoo_source": np.array([client.source for client in clients]),
        "zoo_host": np.array([client.host for client in clients]),
        "zoo_role": np.array([client.role for client in clients]),
        "zoo_share": np.array([client.share for client in clients], np.float16),
    }
    features = next(view for name, view in RECIPES.items() if SHORT[name] == part).features(deltas)
    for method in METHODS:
        print(f"zoo, {part}, {method}", flush=True)
        arrays[f"zoo_{part}_{method}"] = coordinates(features, method)
    return arrays


def round_arrays(deltas: DeltaSet) -> dict[str, Any]:
    """Of every client and participation of the federations with client sampling, B of all layers,
    from both start points.
    """
    columns = np.flatnonzero(
        columns_of(Featurizer.fit(FeatureRecipe.all_b(), deltas.adapters()[:1]), deltas)
    )
    found = [
        sampled(number, malicious, columns) for number, malicious in enumerate(recorded_sources())
    ]
    participations = len(found[0][0].features[WAYS[0]])
    arrays: dict[str, Any] = {
        "rounds_participation": (
            np.concatenate(
                [np.repeat(np.arange(1, participations + 1), len(one.labels)) for one, _ in found]
            ).astype(np.int8)
        ),
        "rounds_label": (
            np.concatenate([np.tile(one.labels, participations) for one, _ in found]).astype(
                np.int8
            )
        ),
        "rounds_share": (
            np.concatenate([np.tile(shares, participations) for _, shares in found]).astype(
                np.float16
            )
        ),
        "rounds_source": np.concatenate(
            [np.full(participations * len(one.labels), one.malicious) for one, _ in found]
        ),
    }
    for way in WAYS:
        features = np.concatenate(
            [one.features[way][:, :, -1].reshape(-1, len(columns)) for one, _ in found]
        ).astype(np.float32)
        for method in ROUND_METHODS:
            print(f"rounds, {way}, {method}", flush=True)
            arrays[f"rounds_{way}_{method}"] = coordinates(features, method)
    return arrays


def coordinates(features: np.ndarray, method: str) -> np.ndarray:
    """(n, 2) float16: three digits are more than a picture shows."""
    kind = "pca" if method == "pca" else "umap"
    return embed(features, kind, seed=SEED, **METHODS[method]).astype(np.float16)


if __name__ == "__main__":
    main()
