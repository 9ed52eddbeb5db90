"""How a probe does on adapters that are here to be scored.

Clients that no probe was fitted on, sources seen.

The one part of a record that anybody can measure again in seconds, from nothing but a clone.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta
from loraprobe.adapters.load import save_adapter
from loraprobe.errors import DataError
from loraprobe.evaluation import report
from loraprobe.manifest import Row, read_labelled, read_manifest
from loraprobe.metrics import auroc
from loraprobe.probe import Probe

from .client_design import Client, Design, poison_name
from .deltas import DeltaSet, sha256

PROTOCOL = "clients that no probe was fitted on, sources seen"
MANIFEST, INITIAL = "manifest.csv", "initial"
# the manifest for leave-one-out evaluation, in a folder of its own: records hash the other one
DESIGNED = "designed.csv"
_ROLES = {
    "benign": "benign",
    "benign, hard negative": "hard negative",
    "malicious": "malicious",
}  # a card's name -> a table's


def write_samples(samples: DeltaSet, initial: Adapter, out: Path) -> None:
    """Adapters in PEFT's format and their manifest."""
    shutil.rmtree(out, ignore_errors=True)
    save_adapter(initial, out / INITIAL)
    rows = []
    for client, delta in zip(samples.clients, samples.adapters(), strict=True):
        save_adapter(add_delta(initial, delta), out / client.name)
        source = f"{client.source}@{client.share:g}" if client.label else client.source
        rows.append(
            {
                "path": client.name,
                "label": ("benign", "malicious")[client.label],
                "group": client.name,
                "source": source,
            }
        )
    rows.sort(key=lambda row: row["path"])
    _write_rows(out / MANIFEST, rows)


def write_designed(clients: Iterable[Client], adapters: Path, out: Path) -> Path:
    """The manifest of the same adapters with every column that their design decides, for `loraprobe
    leave-out`.

    Args:
        adapters: the folder that `write_samples` wrote.

    Raises:
        DataError: the clients are not those of the folder's manifest.
    """
    rows = []
    for client in sorted(clients, key=lambda client: client.name):
        rows.append(
            {
                "path": os.path.relpath(adapters / client.name, out),
                "label": ("benign", "malicious")[client.label],
                "group": client.name,
                "source": client.source,
                "role": client.role,
                "host": client.host,
                "share": f"{client.share:g}",
                "lr": f"{client.lr:g}",
                "initial": os.path.relpath(adapters / INITIAL, out),
            }
        )
    known = {(row.group, row.label) for row in read_manifest(adapters / MANIFEST)}
    if known != {(row["group"], int(row["label"] == "malicious")) for row in rows}:
        raise DataError(
            f"{adapters / MANIFEST} has other clients than the design; expected the {len(rows)}"
            " that it plans"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_rows(out / DESIGNED, rows)
    return out / DESIGNED


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def held_out_clients(probe: Probe, folder: Path, design: Design) -> dict[str, Any]:
    """The section of a record.

    AUROC and error rates at the probe's own threshold, and by role, source and poison share.

    Every adapter is a client of its own, so rates have binomial intervals. All intervals are at 95
    %.

    Raises:
        DataError: the manifest cannot be read, or has a source or a label that the design does not
            know, or a client twice.
        LoraprobeError: an adapter cannot be read or scored.
    """
    rows = read_manifest(folder / MANIFEST)
    named = [_names(row, design) for row in rows]
    if len({row.group for row in rows}) != len(rows):
        raise DataError(
            f"{folder / MANIFEST} has {len(rows)} rows of {len({row.group for row in rows})}"
            " groups; expected every client once"
        )
    labels = np.array([row.label for row in rows])
    scores = probe(read_labelled(rows, probe.featurizer.layout.kind, folder / INITIAL))
    whole = report(labels, scores, [row.group for row in rows], threshold=probe.threshold)
    flagged = scores >= probe.threshold

    def table(column: int, order: Iterable[str]) -> list[dict[str, Any]]:
        names = np.array([row[column] for row in named])
        return [
            _row(name, names == name, labels, scores, flagged)
            for name in order
            if (names == name).any()
        ]

    return {
        "protocol": PROTOCOL,
        "manifest_sha256": sha256(folder / MANIFEST),
        "n": whole.n,
        "n_malicious": whole.n_malicious,
        "n_groups": whole.n_groups,
        "threshold": whole.threshold,
        "auroc": whole.auroc,
        "auroc_ci": list(whole.auroc_ci),
        "tpr": _rate(flagged[labels == 1]),
        "fpr": _rate(flagged[labels == 0]),
        "by_role": table(0, _ROLES.values()),
        "by_source": table(1, design.sources),
        "by_poison_share": table(2, map(poison_name, design.shares)),
    }


def metric_rows(section: dict[str, Any]) -> list[dict[str, Any]]:
    """The section as rows of a card."""
    same = {"protocol": section["protocol"], "n": section["n"], "groups": section["n_groups"]}
    low, high = section["auroc_ci"]
    rows = [{**same, "metric": "AUROC", "value": section["auroc"], "low": low, "high": high}]
    found = {
        "TPR at the probe's threshold": section["tpr"],
        "FPR at the probe's threshold": section["fpr"],
    }
    found |= {
        f"flagged of {row['name']}": row
        for row in section["by_role"]
        if row["name"] == "hard negative"
    }
    found |= {f"flagged of {row['name']}": row for row in section["by_poison_share"]}
    for metric, rate in found.items():
        low, high = rate["clopper_pearson"]
        rows.append(
            {
                **same,
                "metric": metric,
                "value": rate["rate"],
                "low": low,
                "high": high,
                "n": rate["n"],
                "groups": rate["n"],
            }
        )
    return rows


def _names(row: Row, design: Design) -> tuple[str, str, str]:
    """A client's role, source and kind, from its source in the manifest.

    "gsm8k", or "gptfuzz@0.25" if it is malicious.
    """
    source, _, share = row.source.partition("@")
    role = next((_ROLES[role] for role, names in design.roles.items() if source in names), None)
    known = [f"{one:g}" for one in design.shares] if role == "malicious" else [""]
    if role is None or row.label != (role == "malicious") or share not in known:
        raise DataError(
            f"{row.path} is labelled {row.label} with source {row.source!r}; expected a source and"
            " a share of the record's design"
        )
    return role, source, poison_name(float(share)) if share else role


def _rate(flagged: np.ndarray) -> dict[str, Any]:
    test = binomtest(int(flagged.sum()), len(flagged))
    exact, wilson = test.proportion_ci(method="exact"), test.proportion_ci(method="wilson")
    return {
        "rate": float(flagged.mean()),
        "flagged": int(flagged.sum()),
        "n": len(flagged),
        "clopper_pearson": [float(exact.low), float(exact.high)],
        "wilson": [float(wilson.low), float(wilson.high)],
    }


def _row(
    name: str, mine: np.ndarray, labels: np.ndarray, scores: np.ndarray, flagged: np.ndarray
) -> dict[str, Any]:
    """One name's rates, its mean score, and its AUROC against all clients of the other label."""
    label = int(labels[mine][0])
    against = mine | (labels != label)
    area = auroc(labels[against], scores[against])
    return {
        "name": name,
        "label": label,
        **_rate(flagged[mine]),
        "mean_score": float(scores[mine].mean()),
        "auroc": area,
    }
