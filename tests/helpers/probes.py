"""Small labelled adapters and tiny probes fitted on them, for the tests of probes, their format,
cards and the Hub.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sklearn.linear_model  # noqa: F401  # loads the BLAS and OpenMP libraries whose threads are limited below
import threadpoolctl

from loraprobe import Adapter, FeatureRecipe, LoRAPair, Probe, fit_probe
from tests.helpers import make

# on a busy machine two threads on a 32 x 32 problem wait for each other
threadpoolctl.threadpool_limits(1)

BASE = "org/base"
RECIPES = {
    "paper": FeatureRecipe.paper(),
    "all_b": FeatureRecipe.all_b(),
    "all_a": FeatureRecipe.all_a(),
    "norm_only": FeatureRecipe.norm_only(),
    "spectral": FeatureRecipe.spectral(),
}
HEAD_OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear_paper": {"max_epochs": 40},
    "mlp": {"hidden": (8,), "max_epochs": 60},
    "xgboost": {"n_estimators": 12},
    "cosine": {},
    "mass_mean": {},
}
"""Head names, with what makes them quick to fit."""


class Labelled(NamedTuple):
    """Adapters with the class and the client of each."""

    adapters: list[Adapter]
    labels: np.ndarray
    groups: list[str]


def labelled_adapter(
    seed: int, malicious: bool = False, signal: float = 1.0, **options: Any
) -> Adapter:
    """Gaussian factors of rank 2, shifted against a fixed direction, those of a malicious one along
    it and twice as far.

    Args:
        options: passed to `make.adapter`.
    """
    options = {"r": 2, "kind": "factor_delta", "base_model": BASE, **options}
    # seed 0 is the direction
    noise, direction = (make.adapter(seed=seed + 1, **options), make.adapter(**options))
    shift = signal * (2.0 if malicious else -1.0)
    pairs = {
        name: LoRAPair(
            pair.A + shift * direction[name].A, pair.B + shift * direction[name].B, pair.scaling
        )
        for name, pair in noise.items()
    }
    start, labelled = initial(options), make.with_pairs(noise, pairs)
    if labelled.kind == "factor_delta":
        return labelled.since(start)
    moved = {
        name: LoRAPair(pair.A + start[name].A, pair.B, pair.scaling) for name, pair in pairs.items()
    }
    return make.with_pairs(labelled, moved)


def initial(options: dict[str, Any]) -> Adapter:
    """The adapter that all labelled ones started from: a large A, and a B of zero."""
    start = make.adapter(seed=77, **{**options, "kind": "weights"})
    pairs = {name: LoRAPair(8 * pair.A, 0 * pair.B, pair.scaling) for name, pair in start.items()}
    return make.with_pairs(start, pairs)


def labelled(groups: int = 16, rows: int = 2, *, seed: int = 0, **options: Any) -> Labelled:
    """`rows` adapters of each of `groups` clients; every second client is malicious."""
    numbers = np.repeat(np.arange(groups), rows)
    labels = numbers % 2
    adapters = [
        labelled_adapter(10_000 * seed + row, bool(label), **options)
        for row, label in enumerate(labels)
    ]
    return Labelled(adapters, labels, [f"client-{seed}-{number}" for number in numbers])


@cache
def training_data(signal: float = 1.0) -> Labelled:
    """What `tiny_probe` is fitted on."""
    return labelled(signal=signal)


@cache
def new_data() -> Labelled:
    """Other clients of the same two kinds, close enough to the cut that no score is saturated."""
    return labelled(12, seed=1, signal=0.4)


@cache
def tiny_probe(
    head: str = "linear",
    recipe: str = "paper",
    calibration: str | None = None,
    threshold: float | str = 0.8,
    signal: float = 1.0,
) -> Probe:
    """A probe of one kind; frozen, so tests can share it.

    With a signal of 0.2 the classes overlap.
    """
    data = training_data(signal)
    return fit_probe(
        data.adapters,
        data.labels,
        head=head,
        recipe=RECIPES[recipe],
        groups=data.groups,
        threshold=threshold,
        calibration=calibration,
        head_options=HEAD_OPTIONS[head],
    )


def scores_of(folder: Path) -> bytes:
    """The scores of the probe in a folder, to the last bit."""
    return Probe.from_pretrained(folder)(new_data().adapters).tobytes()
