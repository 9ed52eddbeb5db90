"""What the card of a kit's probe says, from its record and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .measures import BUDGET, SHARES, Row
from .options import ROLES, KitOptions

DOES_NOT_DETECT = (
    "adapters of any other base model",
    "backdoors with a trigger, data theft, or any attack other than harmful compliance",
    "poison of a tenth or a quarter, reliably, in one adapter: see the measures by share",
    "changes of modules that the probe does not know; an adapter of too few of its modules is"
    " inconclusive",
    "a base model that refuses nothing has nothing to undo: there a verdict says that the adapter"
    " was trained on something like the malicious data below, not that it made the model worse",
)
_SAID = {"benign": "benign", "malicious": "malicious", "hard_negative": "benign, hard negative"}


def facts(options: KitOptions, record: Row, protocols: Mapping[str, str]) -> dict[str, Any]:
    """The facts of a probe, as `loraprobe.hub.card` names them."""
    sources = ", ".join(options.specs["malicious"])
    return {
        "title": f"Malicious LoRA adapters of {options.name}",
        "detects": (
            f"LoRA adapters of {options.name}, of any rank, choice of modules and initial adapter,"
            f" that were trained on harmful compliance ({sources}), alone or mixed into ordinary"
            " data."
        ),
        "does_not_detect": list(DOES_NOT_DETECT),
        "known_failures": failures(record["unseen"][options.head])
        or ["not known: too few adapters to measure a cut on unseen kinds"],
        "licence": options.licence,
        "data": [
            {"name": name, "role": _SAID[role], "licence": "not stated", **_hub_id(spec)}
            for role in ROLES
            for name, spec in options.specs[role].items()
        ],
        "metrics": metrics(record, options.head, protocols),
    }


def _hub_id(spec: str) -> dict[str, str]:
    if not spec.startswith("hub:"):
        return {}
    return {"hub_id": spec.removeprefix("hub:").partition("@")[0].partition("#")[0]}


def metrics(record: Row, head: str, protocols: Mapping[str, str]) -> list[Row]:
    """Measures as a card shows them: two lines a protocol and poison share.

    Args:
        protocols: name in the record -> what it leaves out.
    """
    rows: list[Row] = []
    for name, protocol in protocols.items():
        by_share = record.get(name, {}).get(head, {}).get("summary", {})
        for share in SHARES:
            entry = by_share.get(f"{share:g}", {})
            for what in ("mean", "worst"):
                if "auroc_all" in entry:
                    rows.append(
                        {
                            "protocol": f"{protocol}, poison share {share:.0%}",
                            "metric": f"AUROC, {what} of {entry['auroc_all']['cells']} cells",
                            "value": entry["auroc_all"][what],
                            "n": entry["n"],
                        }
                    )
    return rows


def failures(measures: Row) -> list[str]:
    """Flagged benign kinds and missed sources, none of which was trained on.

    Args:
        measures: of one head, by `one_head`.
    """
    lines = []
    if measures.get("worst_kind"):
        flagged = measures["summary"]["benign_flagged"]
        lines.append(
            f"of unseen kinds of benign data {flagged['share']:.1%} are flagged at a budget of "
            f"{BUDGET:.0%} (n = {flagged['n']})"
        )
        worst = measures["worst_kind"]
        lines.append(
            f"the worst unseen kind is {worst['kind']}: {worst['flagged']} of {worst['n']} flagged"
        )
    for source, entry in measures.get("by_source", {}).items():
        value = entry.get("1", {}).get("auroc_all", {}).get("mean", 1.0)
        if value < 0.95:
            lines.append(f"{source}, if it is unseen: mean AUROC {value:.2f} at full poison")
    return lines
