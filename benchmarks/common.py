"""What several benchmarks share."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.heads import LinearHead
from loraprobe.probe import Probe
from zoo.markers import filled

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"


def random_probe(
    like: Adapter,
    recipe: FeatureRecipe | None = None,
    base_model: str | None = None,
    intercept: float = 0.0,
    size: float = 1.0,
) -> Probe:
    """A linear probe with random coefficients, which what scoring costs does not depend on.

    Args:
        recipe: B of the first layer, as published, if None.
        size: of the coefficients; small ones and an intercept below 0 find everybody benign.
    """
    featurizer = Featurizer.fit(recipe or FeatureRecipe.paper(), [like])
    coef = np.random.default_rng(0).standard_normal(featurizer.num_features) * size
    head = LinearHead(coef.astype(np.float32), intercept)
    return Probe(featurizer, head, base_model=base_model)


def machine(**more: Any) -> dict[str, Any]:
    """What a result was measured on."""
    return {"processor": platform.machine(), "torch": torch.__version__, **more}


def summary(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least and most."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def write(path: Path, result: dict[str, Any], indent: int = 1) -> None:
    """A result as JSON."""
    path.write_text(json.dumps(result, indent=indent) + "\n", encoding="utf-8")


def fill(page: Path, name: str, table: str, module: str) -> None:
    """A table between its marks on a page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(filled(text, name, table, module), encoding="utf-8")
