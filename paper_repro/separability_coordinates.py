"""Two-dimensional coordinates of the updates for the figures, so that those can be drawn anew without training.

    python -m paper_repro.separability_coordinates      # writes results/separability_coordinates.npz, about three minutes

UMAP with a fixed seed at several numbers of neighbours, and PCA beside it; neither sees a label. They are pictures: no
number of this project rests on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from loraprobe.embed import embed
from loraprobe.featurizer import FeatureRecipe, Featurizer
from zoo.deltas import DeltaSet

from .separability import RECIPES, zoo_deltas
from .separability_drift import ROUNDS, SHARES, federation
from .separability_drift import SOURCES as MALICIOUS
from .separability_rounds import columns_of, recorded

COORDINATES = Path(__file__).parent / "results" / "separability_coordinates.npz"
SEED = 0
NEIGHBOURS = (5, 15, 50)
METHODS = {"pca": {}, **{f"umap{count}": {"n_neighbors": count} for count in NEIGHBOURS}}
SHORT = {"paper (B, first layer)": "paper", "all B": "all_b"}
ROUND_METHODS = ("pca", "umap15")
ROUND_WAYS = ("client", "shadow")


def main() -> None:
    """Embed the zoo's updates and those of the recorded federations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/zoo"), help="what `make zoo` kept: replicate-0 holds the labelled updates")
    deltas = zoo_deltas(parser.parse_args().work)
    arrays = {**zoo_arrays(deltas), **round_arrays(deltas)}
    with COORDINATES.open("wb") as file:
        np.savez_compressed(file, seed=np.array(SEED), **arrays)


def zoo_arrays(deltas: DeltaSet) -> dict[str, np.ndarray]:
    """Of every client of the zoo after its last local step: who it is, and (n, 2) float16 for each recipe and method."""
    clients = deltas.clients
    arrays = {
        "zoo_source": np.array([client.source for client in clients]),
        "zoo_host": np.array([client.host for client in clients]),
        "zoo_role": np.array([client.role for client in clients]),
        "zoo_share": np.array([client.share for client in clients], np.float16),
    }
    for name, view in RECIPES.items():
        features = view.features(deltas)
        for method in METHODS:
            print(f"zoo, {name}, {method}", flush=True)
            arrays[f"zoo_{SHORT[name]}_{method}"] = coordinates(features, method)
    return arrays


def round_arrays(deltas: DeltaSet) -> dict[str, np.ndarray]:
    """Of every client and round of the recorded federations, B of all layers: the submitted update and the shadow, in one picture each."""
    columns = np.flatnonzero(columns_of(Featurizer.fit(FeatureRecipe.all_b(), deltas.adapters()[:1]), deltas))
    jobs = [(number, malicious, share) for number, malicious in enumerate(MALICIOUS) for share in SHARES]
    federations = [(share, recorded(number, malicious, share, columns)) for number, malicious, share in jobs]
    clients = [client for _, malicious, share in jobs for _ in range(ROUNDS) for client in federation(malicious, share)]
    arrays = {
        "rounds_round": np.concatenate([np.repeat(np.arange(1, ROUNDS + 1), len(one.labels)) for _, one in federations]).astype(np.int8),
        "rounds_label": np.array([client.label for client in clients], np.int8),
        "rounds_source": np.array([client.source for client in clients]),
        "rounds_share": np.concatenate([np.full(ROUNDS * len(one.labels), share) for share, one in federations]).astype(np.float16),
    }
    for way in ROUND_WAYS:
        features = np.concatenate([one.features[way][:, :, -1].reshape(-1, len(columns)) for _, one in federations]).astype(np.float32)
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
