"""From one base model to the other.

Probes that read nothing which depends on a base model's dimensions, fitted on one and tried on the
other.

    python -m paper_repro.mixed.bases  # writes results/mixed_bases.json; minutes; needs
                                       # paper_repro.mixed.labelled

Spectra and norms pooled over layers are as long on every base model. No source is unseen here: what
does not carry over with all of them known does not carry over. Beside it the same features on the
base that they were fitted on, out of fold by client.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold

from loraprobe.featurizer import FeatureRecipe
from loraprobe.fit.fit import fit_features
from loraprobe.metrics import auroc, auroc_ci
from zoo.labelled.client_design import SHARES, plan
from zoo.labelled.deltas import read_deltas
from zoo.program import documented, write_rows

from ..common.paths import FOLDER
from .labelled import DESIGN
from .readers import Reader, Reading
from .setting import MODELS

RESULTS = FOLDER / "results" / "mixed_bases.json"
RECIPES = {
    "spectra and norms, pooled": FeatureRecipe.spectral(),
    "norms, pooled": FeatureRecipe.norm_only(),
}
# Head -> options: the linear head's usual C is for thousands of features, and does not converge on
# these few.
HEADS: dict[str, dict[str, Any]] = {"linear": {"C": 1.0}, "mass_mean": {}, "xgboost": {}}
FOLDS = 5


def main() -> None:
    """Measure every recipe and head, from every base to every base."""
    documented(__doc__).parse_args()
    rows = [row for name, recipe in RECIPES.items() for row in measured(name, recipe)]
    write_rows(RESULTS, rows)


def measured(name: str, recipe: FeatureRecipe) -> Iterator[dict[str, Any]]:
    """One row a head, pair of bases and poison share."""
    readings = {
        model.key: Reading(
            read_deltas(model.folder / "labelled", plan(DESIGN), model.name, DESIGN),
            Reader(name, recipe, ""),
        )
        for model in MODELS.values()
    }
    for head in HEADS:
        for fitted, own in readings.items():
            for tried, other in readings.items():
                scores = (
                    _out_of_fold(own, head)
                    if tried == fitted
                    else _fit(own, head, np.arange(len(own.labels))).score_features(other.features)
                )
                for share in SHARES:
                    chosen = np.array(
                        [not client.label or client.share == share for client in other.clients]
                    )
                    labels, values = other.labels[chosen], scores[chosen]
                    low, high = auroc_ci(labels, values, None)
                    yield {
                        "features": name,
                        "head": head,
                        "fitted_on": fitted,
                        "tried_on": tried,
                        "share": share,
                        "auroc": round(auroc(labels, values), 6),
                        "auroc_ci": [round(low, 6), round(high, 6)],
                        "n_malicious": int(labels.sum()),
                        "n_benign": int((1 - labels).sum()),
                    }
                print(f"{name}, {head}: {fitted} to {tried}", flush=True)


def _fit(reading: Reading, head: str, rows: np.ndarray) -> Any:
    return fit_features(
        reading.featurizer,
        reading.features[rows],
        reading.labels[rows],
        head=head,
        threshold=0.5,
        head_options=HEADS[head],
    )


def _out_of_fold(reading: Reading, head: str) -> np.ndarray:
    scores = np.zeros(len(reading.labels))
    for known, unknown in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(
        reading.features, reading.labels
    ):
        scores[unknown] = _fit(reading, head, known).score_features(reading.features[unknown])
    return scores


if __name__ == "__main__":
    main()
