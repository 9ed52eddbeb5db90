"""Trivial detectors that every probe has to beat."""

from __future__ import annotations

from dataclasses import replace

from ..featurizer import FeatureRecipe


def baseline_recipes(recipe: FeatureRecipe) -> dict[str, tuple[FeatureRecipe, str]]:
    """name -> (recipe, head) of the baselines to compare a probe of `recipe` with.

    norm_only: how large the update is. a_only: the A factors alone, of the same layers, which in
    LoRA move least. cosine: one direction, the mean of the benign updates (reported to beat spectra
    by an independent study).
    """
    slices = replace(
        recipe, features=("slices",), normalize="l2", pool=False, k=None, min_coverage=None
    )
    norms = replace(
        FeatureRecipe.norm_only(),
        layers=recipe.layers,
        modules=recipe.modules,
        factors=recipe.factors,
    )
    return {
        "norm_only": (norms, "linear"),
        "a_only": (replace(slices, factors=("A",)), "linear"),
        "cosine": (slices, "cosine"),
    }
