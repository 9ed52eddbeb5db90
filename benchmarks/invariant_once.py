"""The features of one adapter in this process: what they took, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from benchmarks.invariant import BASES, used
from loraprobe import load_adapter
from loraprobe.adapters.layout import Layout
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.invariant import Bases


def main() -> None:
    """Open the adapter, read its features, print what it took."""
    folder = Path(sys.argv[1])
    np.linalg.qr(np.ones((16, 16)))
    before = used()
    arrays = safetensors.numpy.load_file(folder / BASES)
    modules = sorted(name.partition(".")[2] for name in arrays if name.startswith("left."))
    left, right = ({m: arrays[f"{side}.{m}"] for m in modules} for side in ("left", "right"))
    recipe = FeatureRecipe.invariant()
    adapter = load_adapter(folder)
    featurizer = Featurizer(recipe, Layout.of(adapter), frozenset(adapter))
    bases = Bases(left, right, np.zeros(featurizer.num_features, np.float32))
    featurizer = Featurizer(recipe, featurizer.layout, featurizer.modules, bases)
    features = featurizer([adapter])
    after = used()
    print(
        json.dumps(
            {
                "cpu_seconds": after[0] - before[0],
                "mb_beyond_imports": after[1] - before[1],
                "features": features.shape[1],
            }
        )
    )


if __name__ == "__main__":
    main()
