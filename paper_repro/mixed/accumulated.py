"""Over rounds: what the mean direction of a client's updates says after one to eight
participations, and one rule for where to cut.

    python -m paper_repro.mixed.accumulated  # writes results/mixed_accumulated.json; needs
                                             # .labelled and .federations

A client's updates are scored by a probe that knows neither the federation's malicious source (nor
the safe answers to its questions) nor any kind of data that this very client holds. The rule is
made before the federation is seen, on the federations of the three other sources. Of their benign
clients, each scored by a probe that knows neither the source that is to be unknown nor that
client's own kinds, a share BUDGET at most lies above the cut after one participation (the
threshold) and after eight (which gives the floor); `CumulativeLevel` draws the line between.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from fedloop.defense.accumulate import FeatureMean
from fedloop.defense.levels import CumulativeLevel
from loraprobe.metrics import auroc
from zoo.labelled.client_design import SHARES, plan
from zoo.labelled.deltas import read_deltas
from zoo.program import documented, write_rows

from ..common.paths import FOLDER
from .cuts import Scored, above, rule
from .federations import PARTICIPATIONS, path
from .labelled import DESIGN
from .readers import READERS, Reader, Reading, unseen_in
from .setting import ALL, MODELS, Model

RESULTS = FOLDER / "results" / "mixed_accumulated.json"


class Recorded:
    """One recorded federation as one reader sees it."""

    def __init__(
        self, model: Model, malicious: str, averaged: str, reading: Reading, draw: int = 0
    ) -> None:
        record = dict(np.load(path(model, malicious, averaged, draw)))
        self.malicious, self.averaged, self.reading = malicious, averaged, reading
        self.role, self.source, self.host, self.share = (
            record[name] for name in ("role", "source", "host", "share")
        )
        features = reading.features_of(record["x"])
        state, mean = FeatureMean().init(), FeatureMean()
        self.means = np.zeros((PARTICIPATIONS, len(self.role), features.shape[1]), np.float32)
        self.singles = np.zeros_like(self.means)
        for participation in range(1, PARTICIPATIONS + 1):
            rows = np.flatnonzero(record["meta"][:, 1] == participation)
            members = record["meta"][rows, 0]
            found, state = mean.add(
                state,
                {f"{member:03d}": features[row] for member, row in zip(members, rows, strict=True)},
            )
            for member, vector in found.items():
                self.means[participation - 1, int(member)] = vector
            self.singles[participation - 1, members] = features[rows] / np.linalg.norm(
                features[rows], axis=1, keepdims=True
            )

    def scored(self, unknown: str) -> Scored:
        """Every member by a probe that knows neither this malicious source nor the member's own
        kinds.
        """
        mean, single = np.zeros((2, *self.means.shape[:2]))
        kinds = [
            frozenset(own) for own in zip(self.source.tolist(), self.host.tolist(), strict=True)
        ]
        for member, own in enumerate(kinds):
            probe = self.reading.probe(unseen_in(unknown, *own), with_cut=False)
            mean[:, member], single[:, member] = (
                probe.score_features(self.means[:, member]),
                probe.score_features(self.singles[:, member]),
            )
        return Scored(mean, single, self.role, self.share, kinds)


def main() -> None:
    """Measure every reader on every base model."""
    documented(__doc__).parse_args()
    rows = [
        row for model in MODELS.values() for reader in READERS for row in measured(model, reader)
    ]
    write_rows(RESULTS, rows)


def measured(model: Model, reader: Reader) -> Iterator[dict[str, Any]]:
    """One row a federation.

    The scores of its clients, and for the mass-mean reader the rule and what it flags.
    """
    reading = Reading(
        read_deltas(model.folder / "labelled", plan(DESIGN), model.name, DESIGN), reader
    )
    federations = [
        Recorded(model, malicious, averaged, reading) for malicious, averaged in model.federations
    ]
    for federation in federations:
        scored = federation.scored(federation.malicious)
        row: dict[str, Any] = {
            "model": model.key,
            "reader": reader.name,
            "malicious": federation.malicious,
            "averaged": federation.averaged,
            "auroc": list(aurocs(scored)),
        }
        if reader.by_kind:
            others = [
                other.scored(federation.malicious)
                for other in federations
                if other.malicious != federation.malicious
            ]
            level = rule([other.mean[:, other.honest] for other in others])
            row |= {
                "threshold": level.threshold,
                "floor": level.floor,
                "flagged": counted(scored, above(scored.mean, level)),
            }
        print(
            f"{model.key}, {reader.name}: {federation.malicious}, {federation.averaged}", flush=True
        )
        yield row


def committed_rule(model: str, malicious: str) -> CumulativeLevel:
    """The level of a base model where this source is unknown, whoever is averaged."""
    for row in json.loads(RESULTS.read_text()):
        if (row["model"], row["malicious"], row["averaged"]) == (
            model,
            malicious,
            ALL,
        ) and "floor" in row:
            return CumulativeLevel(threshold=row["threshold"], floor=row["floor"])
    raise SystemExit(
        f"{RESULTS} has no rule for {malicious} on {model}: run python -m"
        " paper_repro.mixed.accumulated"
    )


def aurocs(scored: Scored) -> Iterator[dict[str, Any]]:
    """One row a poison share.

    How well its clients are told from the honest ones, by participation.
    """
    for share in SHARES:
        chosen = (scored.role == "malicious") & (scored.share == share)
        labels = np.r_[np.ones(chosen.sum()), np.zeros(scored.honest.sum())]
        values = [
            round(auroc(labels, np.r_[row[chosen], row[scored.honest]]), 6) for row in scored.mean
        ]
        yield {
            "share": share,
            "n_malicious": int(chosen.sum()),
            "n_honest": int(scored.honest.sum()),
            "by_participation": values,
        }


def counted(scored: Scored, flagged: np.ndarray) -> dict[str, Any]:
    """How many clients of every kind are flagged, by participation.

    Flagged (participations, members).
    """
    groups = {
        f"{share:g}": (scored.role == "malicious") & (scored.share == share) for share in SHARES
    }
    groups |= {role: scored.role == role for role in ("benign", "hard_negative")}
    return {
        name: {"n": int(chosen.sum()), "flagged": flagged[:, chosen].sum(axis=1).tolist()}
        for name, chosen in groups.items()
    }


if __name__ == "__main__":
    main()
