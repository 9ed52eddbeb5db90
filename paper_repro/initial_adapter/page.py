"""page.md from results/cells.jsonl: nothing on it is typed by hand but what it says in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from zoo.markers import markdown
from zoo.program import read_lines

from .cells import BUDGET, NEGATIVES, Row, share_name
from .clients import SHARES, STARTS, plan
from .features import MISSING

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cells.jsonl"
PAGE, WORDS = HERE / "page.md", HERE / "words.md"
_RESAMPLES = 2000
MAIN = ("product and gram", 8, "mass_mean", "mean")


def write_page() -> None:
    """The words of words.md, with every {{table}} in them made from the results."""
    PAGE.write_text(rendered(), encoding="utf-8")


def rendered() -> str:
    """What the page should be."""
    rows = [row for row in read_lines(RESULTS) if row["variant"]]
    text = WORDS.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        text = text.replace(f"{{{{{name}}}}}", table(rows))
    return text


def _chosen(rows: Iterable[Row], question: str, variant: Sequence[object] = ()) -> list[Row]:
    return [
        row
        for row in rows
        if row["question"] == question and (not variant or row["variant"] == list(variant))
    ]


def _variants(rows: Iterable[Row], question: str) -> list[tuple[object, ...]]:
    return list(dict.fromkeys(tuple(row["variant"]) for row in rows if row["question"] == question))


def _area(rows: Sequence[Row], share: float) -> str:
    """Mean AUROC over cells with its interval, and the worst cell."""
    name = f"{share_name(share)} against all"
    kept = [row for row in rows if name in row["auroc"]]
    if not kept:
        return "–"
    values = np.array([row["auroc"][name] for row in kept])
    if len({row["seed"] for row in kept}) == 1:
        return f"{values.mean():.3f} / {values.min():.2f}"
    low, high = interval(values, [row["seed"] for row in kept])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}] / {values.min():.2f}"


def interval(values: np.ndarray, seeds: Sequence[int]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, initial adapters drawn whole."""
    rng = np.random.default_rng(0)
    groups = [values[np.array(seeds) == seed] for seed in dict.fromkeys(seeds)]
    means = [
        np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]).mean()
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _rate(rows: Sequence[Row], name: str) -> str:
    """Share flagged of all clients of a group, pooled over cells, with its interval."""
    flagged = sum(row["flagged"][name] for row in rows)
    n = sum(row["n"][name] for row in rows)
    if not n:
        return "–"
    found = binomtest(flagged, n).proportion_ci()
    return f"{flagged} of {n} = {flagged / n:.1%} [{found.low:.1%}, {found.high:.1%}]"


def _worst(rows: Sequence[Row], key: str, name: str = "benign") -> str:
    """The largest share flagged of a group, over the values of a key."""
    shares = {}
    for value in dict.fromkeys(row[key] for row in rows):
        mine = [row for row in rows if row[key] == value]
        n = sum(row["n"][name] for row in mine)
        if n:
            shares[value] = sum(row["flagged"][name] for row in mine) / n
    value = max(shares, key=lambda value: shares[value])
    return f"{shares[value]:.1%} ({value})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown([header, *rows]).rstrip("\n")


def _named(variant: Sequence[object]) -> list[str]:
    features, k, head, missing = map(str, variant)
    return [features, "" if k == "None" else k, head.replace("_", "-"), missing]


def starts_table(rows: list[Row]) -> str:
    """Every initial adapter, and how its clients are told apart with everything unseen."""
    mine = _chosen(rows, "everything unseen", MAIN)
    lines = []
    for start in STARTS:
        own = [row for row in mine if row["seed"] == start.seed]
        if own:
            areas = [_area(own, share) for share in (1.0, 0.25)]
            facts = [start.modules, str(start.rank), f"{start.alpha / start.rank:g}"]
            rates = [_rate(own, name) for name in (share_name(1.0), "benign")]
            lines.append([str(start.seed), *facts, *areas, *rates])
    header = ("start", "modules", "rank", "α / r", "AUROC 100 %", "25 %", "found, 100 %", "benign")
    return _table((*header[:-1], "benign flagged"), lines)


def beside_b_table(rows: list[Row]) -> str:
    """B and the product, within one initial adapter and on another."""
    lines = []
    for variant in _variants(rows, "same start"):
        cells = [
            _area(_chosen(rows, question, variant), share)
            for question in ("same start", "another start")
            for share in (1.0, 0.25)
        ]
        features, k, head, _ = _named(variant)
        lines.append([features, k, head, *cells])
    header = ("features", "k", "head", "same start, 100 %", "25 %", "another start, 100 %", "25 %")
    return _table(header, lines)


def unseen_table(rows: list[Row]) -> str:
    """Every variant with everything unseen: how clients are ranked."""
    lines = []
    for variant in _variants(rows, "everything unseen"):
        mine = _chosen(rows, "everything unseen", variant)
        lines.append([*_named(variant), *(_area(mine, share) for share in SHARES), str(len(mine))])
    header = ("features", "k", "head", "missing modules", *map(share_name, SHARES), "cells")
    return _table(header, lines)


def cuts_table(rows: list[Row]) -> str:
    """What a cut fixed beforehand finds and flags, with everything unseen."""
    lines = []
    for variant in _variants(rows, "everything unseen"):
        mine = [row for row in _chosen(rows, "everything unseen", variant) if "flagged" in row]
        if mine:
            found = [_rate(mine, name) for name in map(share_name, SHARES)]
            flagged = [_rate(mine, name) for name in NEGATIVES]
            lines.append([*_named(variant), *found, *flagged, _worst(mine, "family")])
    shares = [f"found, {name}" for name in map(share_name, SHARES)]
    negatives = ("benign flagged", "hard negatives flagged", "worst family")
    return _table(("features", "k", "head", "missing modules", *shares, *negatives), lines)


def _by(question: str, key: str, every: bool) -> Callable[[list[Row]], str]:
    def table(rows: list[Row]) -> str:
        lines = []
        for value in dict.fromkeys(row[key] for row in rows):
            for variant in _variants(rows, question):
                mine = [row for row in _chosen(rows, question, variant) if row[key] == value]
                if mine and (every or variant[3] == MISSING[0]):
                    areas = [_area(mine, share) for share in SHARES]
                    rates = [
                        _rate(mine, name) if "flagged" in mine[0] else "–"
                        for name in (share_name(1.0), "benign")
                    ]
                    lines.append([str(value), *_named(variant), *areas, *rates, str(len(mine))])
        variant_names = ("features", "k", "head", "missing modules")
        header = (key, *variant_names, *map(share_name, SHARES), "found, 100%", "benign flagged")
        return _table((*header, "cells"), lines)

    return table


def heads_table(rows: list[Row]) -> str:
    """The heads on the same features and cells."""
    lines = []
    for variant in _variants(rows, "heads"):
        mine = _chosen(rows, "heads", variant)
        areas = [_area(mine, share) for share in SHARES]
        lines.append([str(variant[2]).replace("_", "-"), *areas, str(len(mine))])
    return _table(("head", *map(share_name, SHARES), "cells"), lines)


def sources_table(rows: list[Row]) -> str:
    """Every malicious source, as one that nothing was learnt of."""
    mine = _chosen(rows, "everything unseen", MAIN)
    lines = []
    for source in dict.fromkeys(row["malicious"] for row in mine):
        own = [row for row in mine if row["malicious"] == source]
        areas = [_area(own, share) for share in SHARES]
        lines.append([source, *areas, *(_rate(own, name) for name in map(share_name, SHARES))])
    found = [f"found, {name}" for name in map(share_name, SHARES)]
    return _table(("unseen source", *map(share_name, SHARES), *found), lines)


def coverage_table(rows: list[Row]) -> str:
    """All linear modules of which a few at random are kept."""
    mine = _chosen(rows, "part of the modules")
    lines = []
    for count in dict.fromkeys(row["modules"] for row in mine):
        for missing in MISSING[:2]:
            own = [row for row in mine if row["modules"] == count and row["variant"][3] == missing]
            areas = [_area(own, share) for share in (1.0, 0.25)]
            rates = [_rate(own, name) for name in (share_name(1.0), "benign")]
            lines.append([str(count), missing, *areas, *rates, str(len(own))])
    header = ("modules kept", "missing modules", "100 %", "25 %", "found, 100 %", "benign flagged")
    return _table((*header, "cells"), lines)


def probe_table(_: list[Row]) -> str:
    """What the published probe says of the zoo's held-out adapters."""
    found = json.loads((RESULTS.parent / "probe.json").read_text(encoding="utf-8"))
    lines = [
        [kind, f"{rate['flagged']} of {rate['n']}", f"{rate['ci'][0]:.1%} to {rate['ci'][1]:.1%}"]
        for kind, rate in found["flagged"].items()
    ]
    low, high = found["auroc_ci"]
    area = f"AUROC over all {found['n']}: {found['auroc']:.3f} [{low:.3f}, {high:.3f}]."
    return f"{_table(('clients', 'flagged', '95 %'), lines)}\n\n{area}"


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "starts": starts_table,
    "beside_b": beside_b_table,
    "unseen": unseen_table,
    "cuts": cuts_table,
    "heads": heads_table,
    "sources": sources_table,
    "ranks": _by("learnt on rank 8", "start", every=False),
    "modules": _by("learnt on all linear modules", "start", every=True),
    "coverage": coverage_table,
    "probe": probe_table,
    "budget": lambda rows: f"{BUDGET:.0%}",
    "starts_count": lambda rows: str(len({row["seed"] for row in rows})),
    "clients": lambda rows: str(sum(len(plan(start)) for start in STARTS)),
}
