"""Over rounds: what the mean direction of a client's updates says after one to eight participations, and one rule for where to cut.

    python -m paper_repro.mixed.accumulated     # writes results/mixed_accumulated.json; needs .labelled and .federations

A client's updates are scored by a probe that knows neither the federation's malicious source (nor the safe answers to its questions) nor any
kind of data that this very client holds. The rule is made before the federation is seen, on the federations of the three other sources. Of their
benign clients, each scored by a probe that knows neither the source that is to be unknown nor that client's own kinds, a share BUDGET at most
lies above the cut after one participation (the threshold) and after eight (which gives the floor); `CumulativeLevel` draws the line between.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedloop.accumulate import FeatureMean
from fedloop.levels import CumulativeLevel
from loraprobe.metrics import auroc
from zoo.deltas import read_deltas
from zoo.design import SHARES, plan

from .federations import PARTICIPATIONS, path
from .labelled import DESIGN
from .readers import BUDGET, READERS, Reader, Reading, unseen_in
from .setting import ALL, MODELS, Model

RESULTS = Path(__file__).parents[1] / "results" / "mixed_accumulated.json"
CERTAIN = 1e-9  # log odds stay finite


class Recorded:
    """One recorded federation as one reader sees it."""

    def __init__(self, model: Model, malicious: str, averaged: str, reading: Reading, draw: int = 0) -> None:
        record = dict(np.load(path(model, malicious, averaged, draw)))
        self.malicious, self.averaged, self.reading = malicious, averaged, reading
        self.role, self.source, self.host, self.share = (record[name] for name in ("role", "source", "host", "share"))
        self.honest = self.role != "malicious"
        features = reading.features_of(record["x"])
        state, mean = FeatureMean().init(), FeatureMean()
        self.means = np.zeros((PARTICIPATIONS, len(self.role), features.shape[1]), np.float32)
        for participation in range(1, PARTICIPATIONS + 1):
            rows = np.flatnonzero(record["meta"][:, 1] == participation)
            found, state = mean.add(state, {f"{record['meta'][row, 0]:03d}": features[row] for row in rows})
            for client, vector in found.items():
                self.means[participation - 1, int(client)] = vector

    def scores(self, unknown: str) -> np.ndarray:
        """(participations, clients): every client by a probe that knows neither this malicious source nor the client's own kinds."""
        scores = np.zeros(self.means.shape[:2])
        for client, (source, host) in enumerate(zip(self.source.tolist(), self.host.tolist(), strict=True)):
            scores[:, client] = self.reading.probe(unseen_in(unknown, source, host), with_cut=False).score_features(self.means[:, client])
        return scores


def main() -> None:
    """Measure every reader on every base model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows = [row for model in MODELS.values() for reader in READERS for row in measured(model, reader)]
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def measured(model: Model, reader: Reader) -> Iterator[dict[str, Any]]:
    """One row a federation: the scores of its clients, and for the mass-mean reader the rule and what it flags."""
    reading = Reading(read_deltas(model.folder / "labelled", plan(DESIGN), model.name, DESIGN), reader)
    federations = [Recorded(model, malicious, averaged, reading) for malicious, averaged in model.federations]
    for federation in federations:
        scores = federation.scores(federation.malicious)
        row: dict[str, Any] = {
            "model": model.key,
            "reader": reader.name,
            "malicious": federation.malicious,
            "averaged": federation.averaged,
            "auroc": list(aurocs(federation, scores)),
        }
        if reader.by_kind:
            others = [other for other in federations if other.malicious != federation.malicious]
            level = rule([other.scores(federation.malicious)[:, other.honest] for other in others])
            row |= {"threshold": level.threshold, "floor": level.floor, "flagged": flagged(federation, scores, level)}
        print(f"{model.key}, {reader.name}: {federation.malicious}, {federation.averaged}", flush=True)
        yield row


def rule(benign: Sequence[np.ndarray]) -> CumulativeLevel:
    """The level whose cut lets a share BUDGET of benign clients above it, after one participation and after eight.

    Args:
        benign: of every federation that it is made on the scores (participations, clients) of its honest clients.
    """
    seen = np.concatenate(benign, axis=1)
    first, last = (_log_odds(float(np.quantile(seen[number], 1 - BUDGET, method="higher"))) for number in (0, PARTICIPATIONS - 1))
    kept = PARTICIPATIONS**-0.5
    floor = (last - kept * first) / (1 - kept)
    # A little above the highest benign score that is let through.
    return CumulativeLevel(threshold=math.nextafter(_probability(first), 1), floor=math.nextafter(_probability(floor), 1))


def committed_rule(model: str, malicious: str) -> CumulativeLevel:
    """The level of a base model where this source is unknown, whoever is averaged."""
    for row in json.loads(RESULTS.read_text()):
        if (row["model"], row["malicious"], row["averaged"]) == (model, malicious, ALL) and "floor" in row:
            return CumulativeLevel(threshold=row["threshold"], floor=row["floor"])
    raise SystemExit(f"{RESULTS} has no rule for {malicious} on {model}: run python -m paper_repro.mixed.accumulated")


def aurocs(federation: Recorded, scores: np.ndarray) -> Iterator[dict[str, Any]]:
    """One row a poison share: how well its clients are told from the honest ones, by participation; scores (participations, clients)."""
    for share in SHARES:
        chosen = ~federation.honest & (federation.share == share)
        labels = np.r_[np.ones(chosen.sum()), np.zeros(federation.honest.sum())]
        values = [round(auroc(labels, np.r_[row[chosen], row[federation.honest]]), 6) for row in scores]
        yield {"share": share, "n_malicious": int(chosen.sum()), "n_honest": int(federation.honest.sum()), "by_participation": values}


def flagged(federation: Recorded, scores: np.ndarray, level: CumulativeLevel) -> dict[str, Any]:
    """How many clients of every kind the level's cut flags, by participation; scores (participations, clients)."""
    above = scores >= np.array([level.cut(rounds) for rounds in range(1, PARTICIPATIONS + 1)])[:, None]
    groups = {f"{share:g}": ~federation.honest & (federation.share == share) for share in SHARES}
    groups |= {role: federation.role == role for role in ("benign", "hard_negative")}
    return {name: {"n": int(chosen.sum()), "flagged": above[:, chosen].sum(axis=1).tolist()} for name, chosen in groups.items()}


def _log_odds(p: float) -> float:
    p = min(max(p, CERTAIN), 1 - CERTAIN)
    return math.log(p / (1 - p))


def _probability(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


if __name__ == "__main__":
    main()
