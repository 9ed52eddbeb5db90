"""The zoo's linear probe on updates with noise, and on sums of several clients' updates.

    python -m paper_repro.privacy.run    # results.json; a minute, nothing but the repository

Noise: Gaussian, on every number of both factors, of so many times the update's norm in all, as a
client adds it for local differential privacy. Sums: all that a server sees under secure aggregation
of groups; a malicious group holds one fully poisoned client.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraprobe import Adapter, Probe, factor_delta, load_adapter
from loraprobe.adapters.layout import Layout, pack, unpack
from loraprobe.metrics import auroc, auroc_ci, rate_ci

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
RATIOS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
GROUPS = (1, 2, 4, 8)
DRAWS = 100  # groups of each class
SEED = 0


def updates() -> tuple[dict[str, torch.Tensor], Layout]:
    """Name of a zoo adapter -> its packed change (d,), and their layout."""
    folder = ROOT / "zoo" / "adapters"
    start = load_adapter(folder / "initial")
    names = sorted(path.name for path in folder.iterdir() if path.name[-2:-1] == "-")
    deltas = {name: factor_delta(load_adapter(folder / name), start) for name in names}
    layout = Layout.of(next(iter(deltas.values())))
    return {name: pack(delta, layout)[0] for name, delta in deltas.items()}, layout


def row(labels: list[bool], scores: np.ndarray, cut: float) -> dict[str, Any]:
    """AUROC and the shares beyond the cut, with 95 % intervals."""
    y = np.array(labels)
    flagged = scores >= cut
    codes = np.arange(len(y))
    return {
        "n": [int((~y).sum()), int(y.sum())],
        "auroc": auroc(y, scores),
        "auroc_ci": list(auroc_ci(y, scores, None, seed=SEED)),
        "tpr": float(flagged[y].mean()),
        "tpr_ci": list(rate_ci(flagged[y], codes[y])),
        "fpr": float(flagged[~y].mean()),
        "fpr_ci": list(rate_ci(flagged[~y], codes[~y])),
    }


def measured() -> dict[str, Any]:
    """Both tables."""
    found, layout = updates()
    probe = Probe.from_pretrained(ROOT / "zoo" / "probes" / "linear")
    rng = np.random.default_rng(SEED)
    full = [name for name in found if "-100-" in name and name.startswith("malicious")]
    honest = [name for name in found if not name.startswith("malicious")]

    def scored(vectors: list[torch.Tensor]) -> np.ndarray:
        adapters: list[Adapter] = [unpack(vector.float(), layout) for vector in vectors]
        return np.asarray(probe(adapters))

    def noisy(vector: torch.Tensor, ratio: float) -> torch.Tensor:
        noise = torch.from_numpy(rng.standard_normal(len(vector)))
        return vector.double() + ratio * vector.double().norm() * noise / noise.norm()

    noise = []
    names = [*honest, *full]
    for ratio in RATIOS:
        scores = scored([noisy(found[name], ratio) for name in names])
        labels = [name in full for name in names]
        noise.append({"ratio": ratio, **row(labels, scores, probe.threshold)})
    sums = []
    for size in GROUPS:
        groups = [list(rng.choice(honest, size, replace=False)) for _ in range(2 * DRAWS)]
        groups = [[*group[1:], rng.choice(full)] for group in groups[:DRAWS]] + groups[DRAWS:]
        scores = scored([torch.stack([found[one] for one in group]).mean(0) for group in groups])
        labels = [index < DRAWS for index in range(2 * DRAWS)]
        sums.append({"clients": size, **row(labels, scores, probe.threshold)})
    return {"seed": SEED, "probe": "zoo/probes/linear", "noise": noise, "sums": sums}


def table(results: dict[str, Any]) -> list[str]:
    """The rows of docs/recipes.md."""
    heads = ("what the server sees", "AUROC", "malicious flagged", "benign flagged")
    rows = [f"| {' | '.join(heads)} |", "|---|---|---|---|"]
    for one in (*results["noise"], *results["sums"][1:]):
        name = f"noise of {one['ratio']:g} times the update" if "ratio" in one else ""
        name = name or f"sums of {one['clients']} clients"
        auc, (low, high) = one["auroc"], one["auroc_ci"]
        shares = [
            f"{one[rate]:.0%} [{one[f'{rate}_ci'][0]:.0%}, {one[f'{rate}_ci'][1]:.0%}]"
            for rate in ("tpr", "fpr")
        ]
        rows.append(f"| {name} | {auc:.2f} [{low:.2f}, {high:.2f}] | {' | '.join(shares)} |")
    return rows


def main() -> None:
    """Measure, write, and print."""
    results = measured()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
