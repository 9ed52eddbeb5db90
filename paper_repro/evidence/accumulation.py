"""Ways to read the recorded evidence, side by side.

One update, means over rounds, shadows, gradient signs.

    python -m paper_repro.evidence.accumulation  # writes results/accumulation.json; needs
                                                 # paper_repro.evidence.record
    python -m paper_repro.tables                 # the table

The probe of a federation never met its malicious source. AUROC and error rates are over the clients
of all recorded federations of one poison share, malicious against honest ones (hard negatives among
them).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fedloop.defense.accumulate import FeatureMean
from fedloop.defense.levels import CumulativeLevel
from loraprobe.metrics import auroc
from loraprobe.probe import Probe
from zoo.labelled.client_design import SHARES
from zoo.labelled.sources import MALICIOUS

from ..common.held_out import PROBES
from ..common.paths import FOLDER
from .record import path

RESULTS = FOLDER / "results" / "accumulation.json"
ROUNDS = (1, 3, 6)
THRESHOLD = CumulativeLevel().threshold
Evidence = dict[str, np.ndarray]


def accumulated(name: str, mean: FeatureMean) -> Callable[[Evidence, int], np.ndarray]:
    """The mean over the first rounds of one kind of evidence, client by client: (clients, p)."""

    def read(evidence: Evidence, rounds: int) -> np.ndarray:
        state, found = mean.init(), {}
        for number in range(rounds):
            rows = evidence[name][number].astype(np.float64)
            found, state = mean.add(
                state, {f"{client:02d}": row for client, row in enumerate(rows)}
            )
        return np.stack([found[client] for client in sorted(found)])

    return read


WAYS: dict[str, Callable[[Evidence, int], np.ndarray]] = {
    "this round's update": lambda evidence, rounds: evidence["update"][rounds - 1],
    "mean of updates": accumulated("update", FeatureMean(normalize=False)),
    "mean direction (cumulative)": accumulated("update", FeatureMean()),
    "mean direction, sketch of 1024": accumulated("update", FeatureMean(sketch=1024)),
    "mean direction, relative": accumulated("update", FeatureMean(relative=True)),
    "this round's shadow, last step": lambda evidence, rounds: evidence["shadow"][rounds - 1][
        :, -1
    ],
    "mean direction of gradient signs, 8 examples a round": accumulated(
        "gradient_8", FeatureMean()
    ),
    "mean direction of gradient signs, 2 examples a round": accumulated(
        "gradient_2", FeatureMean()
    ),
}


def main() -> None:
    """Score every way on every recorded federation."""
    rows = list(measured())
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def measured() -> Iterator[dict[str, Any]]:
    """One row a poison share, way and round."""
    for share in SHARES:
        recorded = [source for source in MALICIOUS if path(source, share).exists()]
        evidence = {source: dict(np.load(path(source, share))) for source in recorded}
        probes = {
            source: Probe.from_pretrained(PROBES / f"linear-without-{source}")
            for source in recorded
        }
        for way, read in WAYS.items() if recorded else ():
            for rounds in ROUNDS:
                features = {
                    source: read(evidence[source], rounds).astype(np.float32) for source in recorded
                }
                scores = {
                    source: probes[source].score_features(features[source]) for source in recorded
                }
                labels = {
                    source: (evidence[source]["role"] == "malicious").astype(int)
                    for source in recorded
                }
                every, which = (
                    np.concatenate(list(scores.values())),
                    np.concatenate(list(labels.values())),
                )
                yield {
                    "share": share,
                    "way": way,
                    "rounds": rounds,
                    "sources": recorded,
                    "n_malicious": int(which.sum()),
                    "n_honest": int((1 - which).sum()),
                    "auroc": {source: auroc(labels[source], scores[source]) for source in recorded},
                    "tpr": float((every[which == 1] >= THRESHOLD).mean()),
                    "fpr": float((every[which == 0] >= THRESHOLD).mean()),
                }


if __name__ == "__main__":
    main()
