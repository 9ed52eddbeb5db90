"""Ten clients of a round, and which cut drops whom: zoo/smollm2/records/cohorts.json.

    python -m zoo.smollm2.cohorts out/clients/safe zoo/adapters/smollm2-135m-safe

Cohorts are drawn from adapters whose malicious source and benign kinds no fit has seen (the folds
of `zoo.smollm2.folds.pairs`); hard negatives are among the honest. Every cut is fixed before: on
benign kinds that were left out of the fold's training, or on the cohort alone. One participation.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from fedloop.defense.cumulative import edge_of_cohort
from fedloop.defense.trust import sigmoid
from fedloop.kit.features import Study
from fedloop.kit.measures import Row, cut_at, held_out_scores, scores_of
from fedloop.kit.rounds import gap_of, watch_of
from loraprobe import Adapter, load_adapter
from loraprobe.adapters.pair import LoRAPair
from zoo.program import documented
from zoo.smollm2.folds import Fold, Mask, Table, benign_groups, pairs, read_all

CLIENTS = 10
DRAWS = 12  # cohorts of a fold and cell
CELLS = ((0, 1.0), *((count, share) for share in (1.0, 0.5, 0.25, 0.1) for count in (3, 5)))
SURE = 0.8  # clients with P(low component) of this and more are kept (the rival's)
LEAVES = ("q_proj", "v_proj")
Cut = Callable[[np.ndarray, np.ndarray], np.ndarray]  # scores, left-out benign -> dropped


def fixed(scores: np.ndarray, benign: np.ndarray) -> np.ndarray:
    """At and above the point that 2 % of left-out benign scores reach."""
    cut = cut_at(benign)
    return np.asarray(scores >= (np.inf if cut is None else cut))


def mixture(scores: np.ndarray, benign: np.ndarray) -> np.ndarray:
    """Two components always; kept are those of the lower one with P >= 0.8."""
    return _upper(_fitted(scores, 2), scores)


def by_bic(scores: np.ndarray, benign: np.ndarray) -> np.ndarray:
    """Two components where the BIC prefers them to one."""
    two = _fitted(scores, 2)
    if two.bic(scores[:, None]) < _fitted(scores, 1).bic(scores[:, None]):
        return _upper(two, scores)
    return np.zeros(len(scores), bool)


def fixed_or_bic(scores: np.ndarray, benign: np.ndarray) -> np.ndarray:
    """The fixed cut, and what the BIC splits off above the floor."""
    above = scores >= watch_of(benign)
    return np.asarray(fixed(scores, benign) | (by_bic(scores, benign) & above))


def fixed_or_apart(scores: np.ndarray, benign: np.ndarray) -> np.ndarray:
    """The fixed cut, and whoever stands apart from the cohort: what the `CumulativeLevel` does."""
    odds = np.array([sigmoid(score) for score in scores])
    edge = edge_of_cohort(odds.tolist(), gap_of(benign), sigmoid(watch_of(benign)))
    return np.asarray(fixed(scores, benign) | (odds >= (np.inf if edge is None else edge)))


CUTS: dict[str, Cut] = {
    "fixed": fixed,
    "two components": mixture,
    "two components by BIC": by_bic,
    "fixed, or BIC above a floor": fixed_or_bic,
    "fixed, or apart from the cohort": fixed_or_apart,
}


def _fitted(scores: np.ndarray, components: int) -> GaussianMixture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return GaussianMixture(components, random_state=0, n_init=2).fit(scores[:, None])


def _upper(fitted: GaussianMixture, scores: np.ndarray) -> np.ndarray:
    low = int(np.argmin(fitted.means_[:, 0]))
    dropped: np.ndarray = fitted.predict_proba(scores[:, None])[:, low] < SURE
    return dropped


def direction_scores(adapters: Sequence[Adapter], reference: int) -> np.ndarray:
    """Sum over the modules of q and v of cos(B A, the reference's B A): (n,).

    Source: the independent reproduction of Safe-FedLLM and its own method, whose reference is one
    harmful fine-tune; here B starts at zero, so B A is the change of a round.
    """
    fixed_one = {n: p for n, p in adapters[reference].items() if n.endswith(LEAVES)}
    found = []
    for adapter in adapters:
        shared = [(adapter[name], pair) for name, pair in fixed_one.items() if name in adapter]
        found.append(sum(_cosine(one, two) for one, two in shared))
    return np.array(found)


def _cosine(one: LoRAPair, two: LoRAPair) -> float:
    b1, a1, b2, a2 = (np.asarray(m, np.float64) for pair in (one, two) for m in (pair.B, pair.A))
    inner = float(np.vdot(b1.T @ b2, a1 @ a2.T))
    sizes = float(np.vdot(b1.T @ b1, a1 @ a1.T)) * float(np.vdot(b2.T @ b2, a2 @ a2.T))
    return inner / sizes**0.5 if sizes > 0 else 0.0


def reference_of(table: Table, train: Mask) -> int:
    """The first fully poisoned training adapter of MaliciousGen; of another source without one."""
    able = np.flatnonzero(train & (table.label == 1) & (table.share == 1.0))
    return int(min(able, key=lambda row: (table.source[row] != "maliciousgen", row)))


def draw(rng: np.random.Generator, pool: np.ndarray, count: int) -> np.ndarray:
    """Rows of a pool; one comes twice only where the pool is smaller than `count`."""
    return rng.choice(pool, count, replace=len(pool) < count)


def measure(table: Table, adapters: Sequence[Adapter]) -> Row:
    """Detector -> cut -> cell -> honest and malicious clients dropped, [hits, n] a fold."""
    invariant, groups = Study(adapters, LEAVES), benign_groups(table)
    tallies: dict[tuple[str, str, str], list[list[int]]] = {}
    for fold in pairs(table):
        x = invariant.features(fold.train)
        scored = {
            head: (
                scores_of(head, x, table, fold.train),
                held_out_scores(head, x, table, fold.train, groups),
            )
            for head in ("mass_mean", "linear")
        }
        cosines = direction_scores(adapters, reference_of(table, fold.train))
        scored["one harmful direction"] = (cosines, cosines[fold.train & (table.label == 0)])
        for cell, rows in cohorts_of(table, fold):
            honest = table.label[rows] == 0
            for detector, (scores, benign) in scored.items():
                for name, cut in CUTS.items():
                    dropped = np.array([cut(scores[one], benign) for one in rows])
                    counts = [dropped[honest].sum(), honest.sum()]
                    counts += [dropped[~honest].sum(), (~honest).sum()]
                    tallies.setdefault((detector, name, cell), []).append([int(c) for c in counts])
    return _told(tallies)


def cohorts_of(table: Table, fold: Fold) -> list[tuple[str, np.ndarray]]:
    """Cell -> rows of its cohorts, (DRAWS, CLIENTS); cells without two malicious are left out."""
    rng = np.random.default_rng(list(fold.name.encode()))
    honest = np.flatnonzero(fold.test & (table.label == 0))
    found = []
    for count, share in CELLS:
        own = np.flatnonzero(fold.test & (table.label == 1) & (table.share == share))
        if count and len(own) < 2:
            continue
        rows = [
            np.concatenate([draw(rng, honest, CLIENTS - count), draw(rng, own, count)])
            if count
            else draw(rng, honest, CLIENTS)
            for _ in range(DRAWS)
        ]
        name = f"{count} at {share:.0%}" if count else "nobody attacks"
        found.append((name, np.array(rows)))
    return found


def _told(tallies: dict[tuple[str, str, str], list[list[int]]]) -> Row:
    found: Row = {}
    for (detector, cut, cell), rows in tallies.items():
        counts = np.array(rows)
        entry: Row = {"folds": len(counts), "cohorts": len(counts) * DRAWS}
        entry["honest"] = _share(counts[:, :2])
        if counts[:, 3].any():
            entry["malicious"] = _share(counts[:, 2:])
        found.setdefault(detector, {}).setdefault(cut, {})[cell] = entry
    return found


def _share(counts: np.ndarray) -> Row:
    """Share with a 95 % interval by resampling folds."""
    rng = np.random.default_rng(0)
    picks = counts[rng.integers(0, len(counts), (2000, len(counts)))].sum(axis=1)
    low, high = np.quantile(picks[:, 0] / picks[:, 1], (0.025, 0.975))
    hits, n = counts.sum(axis=0).tolist()
    return {
        "hits": hits,
        "n": n,
        "share": round(hits / n, 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def main() -> None:
    """The command line."""
    parser = documented(__doc__)
    parser.add_argument("clients", type=Path, nargs="+", help="folders of zoo.smollm2.clients")
    parser.add_argument("--out", type=Path, default=Path("zoo/smollm2/records/cohorts.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = read_all(options.clients)
    found = measure(table, [load_adapter(path) for path in table.path])
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
