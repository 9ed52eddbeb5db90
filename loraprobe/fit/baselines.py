"""Trivial detectors that every probe has to beat, as probes of their own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from ..adapters.adapter import Adapter
from ..featurizer import FeatureRecipe
from ..probe import Probe, fit_probe


def baseline_recipes(recipe: FeatureRecipe) -> dict[str, tuple[FeatureRecipe, str]]:
    """name -> (recipe, head) of the baselines to compare a probe of `recipe` with.

    norm_only: how large the update is. a_only: the A factors alone, of the same layers, which in
    LoRA move least. cosine: one direction, the mean of the benign updates (reported to beat spectra
    by an independent study).
    """
    slices = replace(recipe, features=("slices",), normalize="l2", pool=False)
    return {
        "norm_only": (
            replace(
                FeatureRecipe.norm_only(),
                layers=recipe.layers,
                modules=recipe.modules,
                factors=recipe.factors,
            ),
            "linear",
        ),
        "a_only": (replace(slices, factors=("A",)), "linear"),
        "cosine": (slices, "cosine"),
    }


def fit_baselines(
    adapters: Sequence[Adapter],
    labels: Sequence[int] | np.ndarray,
    recipe: FeatureRecipe,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, Probe]:
    """Every baseline, fitted on the same labelled adapters as the probe it stands beside.

    Raises:
        As `fit_probe`.
    """
    return {
        name: fit_probe(adapters, labels, head, own, groups, seed=seed)
        for name, (own, head) in baseline_recipes(recipe).items()
    }
