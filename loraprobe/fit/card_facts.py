"""What the card of a probe that somebody trained says: their figures, their data, their limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..evaluation import EvalReport, GroupRow

_FEW = 20
_MISSED = 0.5
_FLAGGED = 0.05


def card_facts(
    report: EvalReport,
    protocol: str,
    baselines: Mapping[str, float],
    base_model: str | None,
    licence: str,
) -> dict[str, Any]:
    """Facts for `loraprobe.hub.card`, from held-out scores at the probe's own threshold.

    Args:
        report: with a row a source (`by`).
        protocol: how they were held out, in a word or two.
        baselines: trivial detector -> its AUROC on the same rows.
    """
    sizes = {"n": report.n, "groups": report.n_groups}
    rates = [
        ("AUROC", report.auroc, report.auroc_ci),
        ("TPR at the probe's threshold", report.tpr, report.tpr_ci),
        ("FPR at the probe's threshold", report.fpr, report.fpr_ci),
    ]
    return {
        "title": f"Malicious LoRA adapters of {base_model or 'a model that was not named'}",
        "detects": "P(malicious) of LoRA adapters of one base model, from their weights alone.",
        "licence": licence,
        "metrics": [
            {
                "protocol": protocol,
                "metric": name,
                "value": value,
                "low": low,
                "high": high,
                **sizes,
            }
            for name, value, (low, high) in rates
        ],
        "data": [
            {"name": row.name, "role": f"{_LABELS[row.label]}, {row.n} adapters", "licence": "-"}
            for row in report.by
        ],
        "known_failures": list(_failures(report, protocol, baselines)),
        "does_not_detect": [
            "Adapters of another base model: they are refused.",
            "Sources of data that are not in the table of data: nothing here was measured on"
            " others. `loraprobe leave-out` does that.",
            "Adapters that somebody made knowing this probe, and poison behind a trigger.",
        ],
    }


_LABELS = {0: "benign", 1: "malicious", None: "both"}


def _failures(report: EvalReport, protocol: str, baselines: Mapping[str, float]) -> Iterable[str]:
    for row in report.by:
        if line := _failure(row):
            yield f"{line} ({protocol})."
    better = [f"{name} {area:.3f}" for name, area in baselines.items() if area >= report.auroc]
    if better:
        yield f"It ranks no better (AUROC {report.auroc:.3f}) than {', '.join(better)}."
    few = min(report.n_malicious, report.n - report.n_malicious)
    if few < _FEW:
        yield f"Fitted on {few} adapters of the smaller class: every figure here is a rough one."


def _failure(row: GroupRow) -> str:
    flagged = round(row.flagged * row.n)
    if row.label == 1 and row.flagged < _MISSED:
        return f"Finds {flagged} of {row.n} malicious adapters of {row.name}"
    if row.label == 0 and row.flagged > _FLAGGED:
        return f"Flags {flagged} of {row.n} benign adapters of {row.name}"
    return ""
