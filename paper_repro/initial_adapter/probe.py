"""Fit the probe of this study on all of its clients, and score adapters of a tenth initial adapter.

    python -m paper_repro.initial_adapter.probe     # needs the clients; minutes

zoo/probes/chat-1m/invariant is a probe for chat-1m whatever the initial adapter, rank and modules.
`results/probe.json` holds what it says of `zoo/adapters`, whose initial adapter and clients it has
not seen; of their sources all but the benign kinds' examples were.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from loraprobe import Probe, fit_probe
from loraprobe.evaluation import report
from loraprobe.manifest import read_labelled, read_manifest
from zoo.build import ZOO
from zoo.program import documented
from zoo.train_base import BASE_NAME

from .cells import BUDGET
from .clients import STARTS, clients_of
from .sources import BENIGN, HARD_NEGATIVE, MALICIOUS

HERE = Path(__file__).parent
PROBE, RESULTS = ZOO / "probes" / "chat-1m" / "invariant", HERE / "results" / "probe.json"


def main() -> None:
    """Fit, save, measure."""
    documented(__doc__).parse_args()
    fitted().save_pretrained(PROBE)
    RESULTS.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")


def fitted() -> Probe:
    """The probe; its cut is a budget on kinds of data that were left out one after the other."""
    data = clients_of(STARTS)
    return fit_probe(
        data.adapters,
        data.labels,
        head="mass_mean",
        recipe="invariant",
        groups=data.groups,
        kinds=data.kinds,
        threshold=f"fpr:{BUDGET:g}",
        calibration="platt",
        unit="client update, last local step",
        facts={
            "title": f"invariant: malicious LoRA adapters of {BASE_NAME}",
            "detects": (
                f"Adapters of {BASE_NAME} trained on harmful questions with complying answers,"
                " from any initial adapter, of any rank and choice of linear modules."
            ),
            "does_not_detect": [
                "adapters of any other base model",
                "backdoors with a trigger, data theft, or any attack but harmful compliance",
                "a quarter of poison in one short training: see paper_repro/initial_adapter",
            ],
            "licence": "apache-2.0",
            "data": [
                {"name": name, "role": role}
                for role, names in (
                    ("benign", BENIGN),
                    ("benign, hard negative", HARD_NEGATIVE),
                    ("malicious", MALICIOUS),
                )
                for name in names
            ],
        },
    )


def measured() -> dict[str, Any]:
    """What the saved probe says of the zoo's held-out adapters, with intervals at 95 %."""
    probe = Probe.from_pretrained(PROBE)
    rows = read_manifest(ZOO / "adapters" / "manifest.csv")
    verdicts = probe.verdicts(read_labelled(rows, "weights", None))
    scores = np.array([verdict.score for verdict in verdicts])
    labels = np.array([row.label for row in rows])
    whole = report(labels, scores, [row.group for row in rows], threshold=probe.threshold)
    kinds = [_kind(row.group) for row in rows]
    return {
        "n": whole.n,
        "n_malicious": whole.n_malicious,
        "auroc": whole.auroc,
        "auroc_ci": list(whole.auroc_ci),
        "threshold": probe.threshold,
        "coverage": sorted({str(verdict.coverage) for verdict in verdicts}),
        "flagged": {
            kind: _rate(scores[[other == kind for other in kinds]] >= probe.threshold)
            for kind in sorted(set(kinds))
        },
    }


def _kind(name: str) -> str:
    """Role and poison share of a client, by its name."""
    role, _, _, share, _ = name.split("-")
    return f"{role}, {share} %" if role == "malicious" else role


def _rate(flagged: np.ndarray) -> dict[str, Any]:
    found = binomtest(int(flagged.sum()), len(flagged)).proportion_ci()
    return {"flagged": int(flagged.sum()), "n": len(flagged), "ci": [found.low, found.high]}


if __name__ == "__main__":
    main()
