"""What a record holds: what was measured of a probe, on what, and how anybody can measure it again.

A probe's facts, and so its card, follow from its record and nothing else: a claim on the card that
the record does not hold cannot be made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from loraprobe.errors import DataError
from loraprobe.fit.calibration import budget_of
from loraprobe.probe import Probe

from .client_design import Design
from .deltas import DeltaSet, digest, sha256
from .held_out import held_out_clients, metric_rows
from .sources import Source
from .study import Entry, Study

Record = dict[str, Any]
MEASURED_AGAIN_BY = {
    "python -m zoo.verify": [
        "base_model",
        *Entry.FIELDS,
        "fitted",
        "held_out_clients",
        "the clients of data",
        "unseen_sources from cells",
    ],
    "the record's own command (needs the datasets, or what it kept)": [
        "data",
        "replicates",
        "baselines",
        "score_distribution",
    ],
}


def data_facts(
    design: Design, deltas: DeltaSet, sources: Mapping[str, Source], licences: Mapping[str, str]
) -> Record:
    """What the clients trained on: counts, digests and licences, no text."""
    roles = [client.role for client in deltas.clients]
    return {
        "clients": {role: roles.count(role) for role in sorted(set(roles))},
        "sources": {role: list(names) for role, names in design.roles.items()},
        "examples": {
            name: {
                "count": len(sources[name].for_clients),
                "sha256": digest(sources[name].for_clients),
            }
            for name in design.sources
        },
        "licences": {name: licences[name] for name in design.sources},
        "design": json.loads(json.dumps(design.to_dict())),
    }


def fit_and_record(
    deltas: DeltaSet, entry: Entry, record: Record, adapters: Path, folder: Path
) -> Record:
    """Fit a probe on all clients, measure it on held-out ones, save it with its card, and complete
    its record.

    Args:
        record: what was studied: probe, command, base_model, about, data, threads, adapters,
            replicates, baselines.
        adapters: the folder of the held-out clients' adapters.
        folder: where the probe is saved.
    """
    study = Study(deltas, entry)
    probe = study.probe(np.ones(len(deltas.clients), bool))
    record = {
        **{name: record[name] for name in ("probe", "command", "base_model")},
        "measured_again_by": MEASURED_AGAIN_BY,
        **entry.to_dict(),
        **{name: record[name] for name in ("about", "data", "threads", "adapters")},
        "held_out_clients": held_out_clients(probe, adapters, deltas.design),
        "score_distribution": study.score_distribution(probe),
        **{name: record[name] for name in ("replicates", "baselines")},
    }
    return save_recorded(probe, record, folder)


def save_recorded(probe: Probe, record: Record, folder: Path) -> Record:
    """Save a probe with the facts of its record, and return the record with what the folder then
    holds.
    """
    probe = replace(probe, facts={**facts_of(record), "training": probe.facts["training"]})
    probe.save_pretrained(folder)
    return {**record, "fitted": fitted_facts(probe, folder), "figure_drawn_with": drawn_with()}


def fitted_facts(probe: Probe, folder: Path) -> Record:
    """What was learnt, as the probe's folder holds it.

    A probe whose threshold was moved is another probe.
    """
    return {
        "sha256": {path.name: sha256(path) for path in sorted(folder.glob("head.*"))},
        "num_features": probe.head.num_features,
        "threshold": probe.threshold,
        "benign_below": probe.benign_below,
        "calibration": calibration_facts(probe),
        "training": json.loads(json.dumps(probe.facts["training"])),
    }


def calibration_facts(probe: Probe) -> Record | None:
    """A probe's calibration as JSON has it."""
    return json.loads(json.dumps(asdict(probe.calibration))) if probe.calibration else None


def drawn_with() -> str:
    """Which matplotlib draws the card's figure here: another one may give other bytes."""
    from importlib.metadata import version

    return f"matplotlib {version('matplotlib')}"


def read_record(path: Path) -> Record:
    """A record.

    Raises:
        DataError: the file is missing or is not a JSON object.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the record {path}: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{path} holds {type(record).__name__}; expected a JSON object")
    return record


def write_record(record: Record, path: Path) -> None:
    """Write a record where `read_record` finds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def facts_of(record: Mapping[str, Any]) -> Record:
    """The facts of a record's probe, all but how it was trained."""
    data = record["data"]
    shares = [row["share"] for row in record["replicates"][0]["unseen_sources"]]
    worst = [
        min(replicate["unseen_sources"][index]["auroc_worst"] for replicate in record["replicates"])
        for index in range(len(shares))
    ]
    return {
        **record["about"],
        "known_failures": _failures(record),
        "data": [
            {"name": name, "role": role, "licence": data["licences"][name]}
            for role, names in data["sources"].items()
            for name in names
        ],
        "metrics": _metrics(record),
        "headline": (
            f"{' / '.join(f'{value:.2f}' for value in worst)} at"
            f" {' / '.join(f'{share:.0%}' for share in shares)} poison, {len(record['replicates'])}"
            f" {'replicate' if len(record['replicates']) == 1 else 'replicates'}"
        ),
        "score_distribution": record["score_distribution"],
    }


def _metrics(record: Mapping[str, Any]) -> list[Record]:
    inside = record["replicates"][0]["in_distribution"]
    low, high = inside["auroc_ci"]
    rows = [
        {
            "protocol": "in distribution, out of fold by client",
            "metric": "AUROC",
            "value": inside["auroc"],
            "low": low,
            "high": high,
            "n": inside["n"],
            "groups": inside["n_groups"],
        }
    ]
    rows += metric_rows(record["held_out_clients"])
    for result in record["replicates"]:
        for row in result["unseen_sources"]:
            protocol = (
                f"malicious and benign source unseen, poison share {row['share']:.0%}, replicate"
                f" {result['replicate']}"
            )
            rows += [
                {
                    "protocol": protocol,
                    "metric": f"AUROC, {what} of {row['cells']} cells",
                    "value": row[f"auroc_{what}"],
                    "n": row["n"],
                }
                for what in ("mean", "worst")
            ]
    return rows


def _failures(record: Mapping[str, Any]) -> list[str]:
    """Where the studies show the probe wrong, one line a kind of failure and replicate."""
    rule = record["threshold"]
    budget = f", where the budget was {budget_of(rule, 'fpr'):.1%}" if isinstance(rule, str) else ""
    lines = []
    for result in record["replicates"]:
        number = result["replicate"]
        cells = [cell for cell in result["cells"] if cell["share"] == 1.0]
        means = {
            name: np.mean([c["auroc"] for c in cells if c["malicious"] == name])
            for name in dict.fromkeys(c["malicious"] for c in cells)
        }
        hardest = min(means, key=lambda name: means[name])
        lines.append(
            f"replicate {number}: {hardest}, the hardest malicious source if it is unseen, is told"
            f" unmixed from unseen benign kinds with a mean AUROC of {means[hardest]:.2f}"
        )
        if result["unseen_hard_negatives"]:
            hard = max(result["unseen_hard_negatives"], key=lambda row: row["flagged"])
            lines.append(
                f"replicate {number}: {hard['flagged']:.0%} of clients with {hard['hard_negative']}"
                " are flagged if that kind was not trained on"
            )
        if "fpr_worst" in (row := result["unseen_sources"][0]):
            lines.append(
                f"replicate {number}: of an unseen kind of benign data {row['fpr_mean']:.1%} are"
                f" flagged on average over kinds, {row['fpr_worst']:.0%} of the worst kind{budget}"
            )
    return lines
