"""A client that returns under a new id each round, and what a probation costs honest clients.

    python -m paper_repro.attackers.newcomers     # writes results/newcomers.json (seconds)
    python -m paper_repro.tables                  # the page

Verdicts are those of `cumulative` in results/mixed_fresh.json: federations of 28 honest clients and
5 poisoned ones, 8 rounds, everything unseen. Who returns under a new id has the verdict of a first
participation in every round. Weights are the defence's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedloop.defense.probation import on_probation
from fedloop.defense.weights import aggregation_weights

from ..common.format import markdown, page_with
from ..common.paths import FOLDER

SOURCE = FOLDER / "results" / "mixed_fresh.json"
RESULTS = FOLDER / "results" / "newcomers.json"
PAGE = Path(__file__).with_name("NEWCOMERS.md")
OPTIONS: tuple[tuple[int, float | None], ...] = (
    (0, None),
    (3, None),
    (7, None),
    (0, 0.05),
    (3, 0.05),
)
SHARES = ("1", "0.5", "0.25", "0.1")
ROUNDS = 8
DRAWS = 2000
Verdicts = Sequence[Mapping[str, float]]


def weights(
    verdicts: Iterable[Mapping[str, float]], options: tuple[int, float | None]
) -> list[dict[str, float]]:
    """Client -> weight, round by round; {} for a round that is skipped. All send one count."""
    played: dict[str, int] = {}
    found = []
    for factors in verdicts:
        counts = dict.fromkeys(factors, 1)
        tried = on_probation(factors, counts, played, *options).factors
        weighed = None if tried is None else aggregation_weights(tried, counts, 0.0)
        found.append(weighed or {})
        trusted = [client for client, factor in factors.items() if factor > 0]
        played |= {client: played.get(client, 0) + 1 for client in trusted}
    return found


def verdicts(cell: Mapping[str, Any], share: str, *, fresh: bool) -> Verdicts:
    """Client -> factor, round by round."""
    flagged = cell["flagged"]
    rounds = []
    for at in range(ROUNDS):
        factors = {
            f"{kind}-{row}": float(row >= flagged[kind]["flagged"][at])
            for kind in ("benign", "hard_negative")
            for row in range(flagged[kind]["n"])
        }
        bad = flagged[share]
        for row in range(bad["n"]):
            name = f"poisoned-{row}-{at}" if fresh else f"poisoned-{row}"
            factors[name] = float(row >= bad["flagged"][0 if fresh else at])
        rounds.append(factors)
    return rounds


def counted(
    cell: Mapping[str, Any], share: str, options: tuple[int, float | None], *, fresh: bool
) -> float:
    """What the poisoned clients weigh, in parts of what they would weigh undefended."""
    bad = int(cell["flagged"][share]["n"])
    honest = int(cell["flagged"]["benign"]["n"]) + int(cell["flagged"]["hard_negative"]["n"])
    found = weights(verdicts(cell, share, fresh=fresh), options)
    sums = [
        math.fsum(w for client, w in one.items() if client.startswith("poisoned")) for one in found
    ]
    return float(np.mean(sums)) * (honest + bad) / bad


def interval(cells: Sequence[Mapping[str, Any]], values: np.ndarray) -> list[float]:
    """95 % bootstrap over base and malicious source; (cells,) or the ratio of (cells, 2)."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row, cell in enumerate(cells):
        groups.setdefault((cell["model"], cell["malicious"]), []).append(row)
    rows = list(groups.values())
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        chosen = [row for at in rng.integers(len(rows), size=len(rows)) for row in rows[at]]
        drawn.append(_mean(values[chosen]))
    return [float(q) for q in np.nanquantile(drawn, (0.025, 0.975))]


def _mean(values: np.ndarray) -> float:
    mean = values.mean(axis=0)
    return float(mean if mean.ndim == 0 else mean[0] / mean[1] if mean[1] else np.nan)


def attackers() -> list[dict[str, Any]]:
    """One row a poison share and option: how much poisoned clients count."""
    cells = [cell for cell in json.loads(SOURCE.read_text()) if cell["averaged"] == "all"]
    rows = []
    for share in SHARES:
        for options in OPTIONS:
            pairs = np.array(
                [
                    [counted(c, share, options, fresh=fresh) for fresh in (True, False)]
                    for c in cells
                ]
            )
            row: dict[str, Any] = {
                "share": float(share),
                "probation": options[0],
                "newcomer_share": options[1],
                "federations": len(cells),
                "poisoned": sum(cell["flagged"][share]["n"] for cell in cells),
            }
            for at, name in enumerate(("fresh", "staying")):
                row[name] = _mean(pairs[:, at])
                row[f"{name}_interval"] = interval(cells, pairs[:, at])
            row["ratio"] = _mean(pairs)
            row["ratio_interval"] = interval(cells, pairs)
            rows.append(row)
    return rows


def cohorts(kind: str, seed: int) -> list[list[str]]:
    """Who takes part in each round, of 100 honest clients."""
    rng = np.random.default_rng(seed)
    if kind == "each once":
        order = rng.permutation(100)
        return [[str(client) for client in part] for part in np.split(order, 5)]
    if kind == "one round in five":
        return [[str(c) for c in rng.choice(100, 20, replace=False)] for _ in range(40)]
    return [[str(client) for client in range(90 if at < 4 else 100)] for at in range(ROUNDS)]


def honest() -> list[dict[str, Any]]:
    """One row a way of taking part and option: what nobody but honest clients lose."""
    rows = []
    for kind in ("each once", "one round in five", "always, a tenth from round 5"):
        for options in OPTIONS:
            moved, first, skipped = [], [], 0
            seeds = 20
            for seed in range(seeds):
                rounds = cohorts(kind, seed)
                found = weights([dict.fromkeys(one, 1.0) for one in rounds], options)
                seen: set[str] = set()
                skipped += sum(not one for one in found)
                for number, (clients, one) in enumerate(zip(rounds, found, strict=True)):
                    fair = 1 / len(clients)
                    lost = [max(0.0, fair - one.get(client, 0.0)) for client in clients]
                    moved.append(math.fsum(lost))
                    new = [client for client in clients if client not in seen and number]
                    first += [one.get(client, 0.0) / fair for client in new]
                    seen |= set(clients)
            rows.append(
                {
                    "kind": kind,
                    "probation": options[0],
                    "newcomer_share": options[1],
                    "runs": seeds,
                    "rounds": len(moved),
                    "skipped": skipped / len(moved),
                    "moved": float(np.mean(moved)),
                    "first": float(np.mean(first)),
                    "n_first": len(first),
                }
            )
    return rows


def _named(row: Mapping[str, Any]) -> str:
    parts = [f"probation {row['probation']}"] if row["probation"] else []
    if row["newcomer_share"] is not None:
        parts.append(f"share {row['newcomer_share']:g}")
    return ", ".join(parts) or "off"


def rendered() -> str:
    """The page with its tables made anew."""
    found = json.loads(RESULTS.read_text())

    def spread(row: Mapping[str, Any], name: str) -> str:
        low, high = row[f"{name}_interval"]
        return f"{row[name]:.2f} [{low:.2f}, {high:.2f}]"

    attack = [
        {
            "poison share": f"{row['share']:.0%}",
            "options": _named(row),
            "new id each round": spread(row, "fresh"),
            "one id": spread(row, "staying"),
            "ratio": spread(row, "ratio"),
        }
        for row in found["attackers"]
    ]
    cost = [
        {
            "honest clients take part": row["kind"],
            "options": _named(row),
            "weight moved": f"{row['moved']:.1%}",
            "a first participation counts": f"{row['first']:.2f} (n = {row['n_first']})",
            "rounds skipped": f"{row['skipped']:.0%} of {row['rounds']}",
        }
        for row in found["honest"]
    ]
    tables = {
        name: markdown([list(rows[0]), *(list(row.values()) for row in rows)])
        for name, rows in (("attackers", attack), ("honest", cost))
    }
    return page_with(PAGE, tables)


def main() -> None:
    """Replay everything."""
    rows = {"attackers": attackers(), "honest": honest()}
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
