"""Every study of the labelled adapters of SmolLM2, as one JSON.

    python -m zoo.smollm2.study out/clients/safe --out zoo/records/smollm2-135m-safe.json

Invariant features (`loraprobe.features.invariant`) of q and v with bases learnt on each fold's
training adapters; heads as the zoo's. Trivial and published detectors beside them. A cut of 2 %
comes from benign kinds that were left out of the fold's training one group after the other.
"""

from __future__ import annotations

import fcntl
import json
import random
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloop.kit.features import Study, coordinates
from fedloop.kit.measures import (
    Row,
    cell,
    counts,
    cut_of,
    one_head,
    scores_of,
    summary,
)
from loraprobe import Adapter, load_adapter
from zoo.program import documented
from zoo.smollm2 import baselines
from zoo.smollm2.folds import (
    Fold,
    Table,
    benign_groups,
    in_distribution,
    joined,
    pairs,
    read_all,
    settings,
)

LEAVES = ("q_proj", "v_proj")
QUICK = ("mass_mean", "linear")
SLOW = ("mlp", "xgboost")
NAMES = (
    "in_distribution",
    "pairs",
    "everything",
    "settings",
    "baselines",
    "kinds_curve",
    "roundings",
)
Maker = Callable[[np.ndarray], np.ndarray]


class Studies:
    """The studies of one base model's adapters, by name."""

    def __init__(self, table: Table, adapters: Sequence[Adapter], rounded: dict[str, Path]) -> None:
        self.table = table
        self.adapters = adapters
        self.rounded = rounded
        self.invariant = Study(adapters, LEAVES)
        self.cache: dict[bytes, np.ndarray] = {}

    def features(self, train: np.ndarray) -> np.ndarray:
        """Invariant features as coordinates with the same inner products: (n, n)."""
        key = train.tobytes()
        if key not in self.cache:
            x = self.invariant.features(train).astype(np.float64)
            self.cache[key] = coordinates(x @ x.T)
        return self.cache[key]

    def run(self, name: str) -> Row:
        """One study: see `NAMES`."""
        table, quick = self.table, self.features
        if name == "in_distribution":
            folds = list(in_distribution(table))
            found = _heads(table, folds, quick, QUICK)
            return found | _heads(table, folds, self.invariant.features, SLOW)
        if name == "pairs":
            found = _heads(table, list(pairs(table)), quick, QUICK, QUICK, True)
            some = list(pairs(table))[::3]  # they take minutes a fold
            slow = _heads(table, some, self.invariant.features, SLOW, (), True)
            return found | slow
        if name == "everything":
            folds = list(pairs(table, initials=2))
            return _heads(table, folds, quick, QUICK, QUICK[:1], True)
        if name == "settings":
            return {
                what: _heads(table, folds, quick, QUICK) for what, folds in settings(table).items()
            }
        if name == "baselines":
            return _baselines(table, self.adapters, list(pairs(table)))
        if name == "kinds_curve":
            return {"mass_mean": kinds_curve(table, quick)}
        return roundings(table, self.adapters, self.rounded)


def _heads(
    table: Table,
    folds: Sequence[Fold],
    features: Maker,
    heads: Sequence[str],
    cuts: Sequence[str] = (),
    by_source: bool = False,
) -> Row:
    """Head -> summary and cells; flagged kinds where there are cuts."""
    return {head: one_head(table, folds, features, head, head in cuts, by_source) for head in heads}


def _baselines(table: Table, adapters: Sequence[Adapter], folds: Sequence[Fold]) -> Row:
    """Detectors beside the probes, on the folds in which source and benign kinds are unseen."""
    sizes, spread = baselines.norms(adapters), baselines.norm_spread(adapters)
    ten = baselines.spectral(adapters, LEAVES)
    twenty = baselines.spectral(adapters)
    raw = {
        f"{factor} of {'the first layer' if first else 'all layers'}": baselines.factors(
            adapters, factor, first
        )
        for factor, first in (("B", False), ("B", True), ("A", False))
    }
    makers: dict[str, tuple[Maker, str]] = {
        "norm only": (lambda train: baselines.standardised(sizes, train), "linear"),
        "norm spread (2605.30189)": (lambda t: baselines.standardised(spread, t), "linear"),
        "10 spectral numbers of q, v": (lambda t: baselines.standardised(ten, t), "linear"),
    }
    for name, rows in raw.items():
        makers[f"{name}, mass-mean"] = (lambda train, x=rows: x, "mass_mean")  # type: ignore[misc]
    makers["B of the first layer, linear (paper)"] = (
        lambda t: raw["B of the first layer"],
        "linear",
    )
    makers["B of all layers, cosine"] = (lambda train: raw["B of all layers"], "cosine")
    found = {
        name: one_head(table, folds, maker, head, cut=False, by_source=True)["summary"]
        for name, (maker, head) in makers.items()
    }
    there = ~np.isnan(twenty).any(axis=1)
    four = [
        Fold(f.name, f.train & there, f.test & there)
        for f in folds
        if (f.test & there & (table.label == 0)).any()
    ]
    filled = np.nan_to_num(twenty)
    row = one_head(table, four, lambda t: baselines.standardised(filled, t), "linear", False, True)
    found["20 spectral numbers of q, k, v, o (2602.15195)"] = {
        "adapters": int(there.sum()),
        **row["summary"],
    }
    return found


def kinds_curve(table: Table, features: Maker) -> list[Row]:
    """Ranking and cut against how many benign kinds were trained on.

    Tested on a group of benign kinds and a family of malicious sources, both unseen; hard negatives
    stay in training. The bases are those of the fold with all other kinds.
    """
    families = sorted(set(table.family[table.label == 1].tolist()))
    benign = set(table.source[table.role == "benign"].tolist())
    found = []
    for count in (5, 10, 15, 20, 25):
        cells = []
        for number, group in enumerate(benign_groups(table)):
            left = sorted(benign - set(group))
            for draw in range(3 if count < len(left) else 1):
                family = families[(number + draw) % len(families)]
                kept = random.Random(100 * number + draw).sample(left, min(count, len(left)))
                whole = ~table.touches(group) & (table.family != family)
                train = whole & ~table.touches(set(left) - set(kept))
                own = (table.label == 1) & (table.family == family)
                test = own | ((table.label == 0) & np.isin(table.source, group))
                x = features(whole)
                fold = Fold(f"group {number + 1}, draw {draw + 1}", train, test)
                cut = cut_of("mass_mean", x, table, train, [kept[at::5] for at in range(5)])
                cells.append(cell(table, fold, scores_of("mass_mean", x, table, train), cut))
        found.append({"kinds": count, **summary(cells)})
    return found


def roundings(table: Table, adapters: Sequence[Adapter], rounded: dict[str, Path]) -> Row:
    """Trained on clients of the base, tested on clients of other roundings, and the other way; then
    between two roundings, where no client of the test has a twin in training.
    """
    found: Row = {}
    for name, folder in rounded.items():
        other = Table.read(folder / "manifest.csv")
        both = joined(table, other)
        here = np.arange(len(both)) < len(table)
        everything = [*adapters, *map(load_adapter, other.path)]
        invariant = Study(everything, LEAVES)
        folds = [Fold(f"to {name}", here, ~here), Fold(f"from {name}", ~here, here)]
        found[name] = _heads(both, folds, invariant.features, QUICK)
    for (one, first), (two, second) in combinations(rounded.items(), 2):
        tables = [Table.read(folder / "manifest.csv") for folder in (first, second)]
        both = joined(*tables)
        here = np.arange(len(both)) < len(tables[0])
        turn = np.concatenate([np.arange(len(own)) * 2 // len(own) for own in tables])  # of a plan
        folds = [
            Fold(f"{a} to {b}, {half}", side & (turn == half), ~side & (turn != half))
            for a, b, side in ((one, two, here), (two, one, ~here))
            for half in (0, 1)
        ]
        invariant = Study([load_adapter(path) for path in both.path], LEAVES)
        found[f"{one} and {two}"] = _heads(both, folds, invariant.features, QUICK)
    return found


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    """The command line."""
    parser = documented(__doc__)
    parser.add_argument("clients", type=Path, nargs="+", help="folders of zoo.smollm2.clients")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounded", type=Path, nargs="*", default=[], help="folders of clients")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = read_all(options.clients)
    rounded = {folder.name: folder for folder in options.rounded}
    studies = Studies(table, [load_adapter(path) for path in table.path], rounded)
    for name in options.only:
        if name == "roundings" and not rounded:
            continue
        _say(name)
        found: dict[str, Any] = {"adapters": counts(table), name: studies.run(name)}
        _merge(options.out, {"command": "python -m zoo.smollm2.study", **found})
    _say("done")


def _merge(path: Path, found: dict[str, Any]) -> None:
    """Add to a JSON file; two processes may each do some of the studies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        whole = {**(json.loads(text) if text else {}), **found}
        file.truncate(0)
        file.write(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
