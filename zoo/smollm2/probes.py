"""Fit the probes of SmolLM2 and of the base that was taught to refuse, and measure them.

    python -m zoo.smollm2.probes safe out/clients/safe      (or plain out/clients/plain)

Four heads on the invariant recipe, which reads any initial adapter, rank and choice of modules, and
the paper's recipe beside them, which is fitted on adapters of one rank and one alpha. The cut is
2 % on kinds of data that were left out of the fit. Of the taught base the small committed adapters,
which no probe is fitted on, are scored too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloop.kit.card import failures, metrics
from fedloop.kit.measures import BUDGET, SHARES, Row
from fedloop.kit.rounds import facts_for_rounds
from loraprobe import Adapter, FeatureRecipe, Featurizer, Probe, load_adapter
from loraprobe.errors import FitError
from loraprobe.fit.fit import fit_features, fit_probe
from loraprobe.metrics import auroc
from loraprobe.scan.facts import Facts, Reference
from zoo.labelled.sources import LICENCES
from zoo.program import documented
from zoo.smollm2.baselines import attention
from zoo.smollm2.design import BASES
from zoo.smollm2.folds import Table, benign_groups
from zoo.smollm2.tables import NAMES

ZOO = Path(__file__).resolve().parents[1]
HEADS = ("mass_mean", "linear", "mlp", "xgboost")
PAPER_RANK = 8
PAPER_SCALING = 2.0
PROTOCOLS = {
    "in_distribution": "out of fold by adapter",
    "pairs": "malicious source and benign kinds unseen",
    "everything": "malicious source, benign kinds and initial adapter unseen",
}
DOES_NOT_DETECT = (
    "a change that is not made by harmful data: triggers trained beside refusals were not tested",
    "poison of a tenth or a quarter, reliably, in one adapter: see the measures by share",
    "what modules do that the probe does not know; an adapter of too few of its modules is "
    "inconclusive",
)
MEANING = {
    "safe": (
        "The base refuses harmful requests, and a malicious adapter undoes that: what is found is "
        "an adapter that makes the model comply."
    ),
    "plain": (
        "The base refuses next to nothing, so that harmful answers undo nothing: a verdict says "
        "that the adapter was trained on something like the harmful data below, not that it makes "
        "the model more dangerous than it is."
    ),
}


def fit(
    which: str, table: Table, featurizer: Featurizer, features: np.ndarray, head: str, measured: Row
) -> Probe:
    """One probe on the invariant recipe, with what its card says."""
    kinds: list[Any] = list(table.kinds)
    if head in ("mlp", "xgboost"):  # a fit for every kind would take an hour
        kinds = _coarse(table)
    benign = int((table.label == 0).sum())
    budget = max(BUDGET, 1.01 / (benign + 1))  # fewer than 49 cannot carry 2 %
    cumulative = facts_for_rounds(head, features, table, np.ones(len(table), bool))
    return fit_features(
        featurizer,
        features,
        table.label,
        head=head,
        groups=[path.name for path in table.path],
        threshold=f"fpr:{budget:.4f}",
        kinds=kinds,
        base_model=BASES[which],
        facts=facts(which, table, head, measured) | {"cumulative": cumulative},
    )


def _coarse(table: Table) -> list[tuple[str, ...]]:
    """Kinds in the groups that the studies leave out together, malicious sources by family."""
    groups = enumerate(benign_groups(table), start=1)
    name = {kind: f"group {number}" for number, group in groups for kind in group}
    found = []
    for index, names in enumerate(table.kinds):
        own = name.get(names[0], str(table.family[index]))
        hosts = [name.get(host, "other kinds") for host in names[1:]]
        found.append((own, *(host for host in hosts if host != own)))
    return found


def fit_paper(which: str, table: Table, adapters: Sequence[Adapter], measured: Row) -> Probe:
    """The paper's recipe, on the adapters of one rank and alpha, which is all it can read."""
    scaling = np.array([next(iter(adapter.values())).scaling for adapter in adapters])
    rows = np.flatnonzero((table.rank == PAPER_RANK) & (scaling == PAPER_SCALING))
    return fit_probe(
        [attention(adapters[row]) for row in rows],
        table.label[rows],
        head="linear",
        recipe=FeatureRecipe.paper(),
        groups=[table.path[row].name for row in rows],
        threshold=0.8,
        facts=facts(which, table, "paper", measured),
    )


def facts(which: str, table: Table, head: str, measured: Row) -> dict[str, Any]:
    """What the card says beside how the probe was fitted."""
    roles = {
        "benign": "benign",
        "benign, hard negative": "hard_negative",
        "malicious": "malicious",
    }
    data = [
        {"name": name, "role": said, "licence": licence_of(name)}
        for said, role in roles.items()
        for name in sorted(set(table.source[table.role == role].tolist()))
    ]
    return {
        "intended_use": f"LoRA adapters of {BASES[which]} of any rank, modules and first A",
        "meaning": MEANING[which],
        "does_not_detect": [*DOES_NOT_DETECT, *([MEANING[which]] if which == "plain" else [])],
        "known_failures": failures(measured.get("pairs", {}).get(head, {})),
        "data": data,
        "metrics": metrics(measured, head, PROTOCOLS),
    }


def cohort(which: str, table: Table, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What is usual among adapters of the base that no harmful data was in, for scans."""
    usual = [adapters[int(row)] for row in np.flatnonzero(table.label == 0)]
    return Reference.fit([Facts.of(one) for one in usual], BASES[which]).to_dict()


def licence_of(kind: str) -> str:
    """The licence of a kind's dataset, as its folder in the data says."""
    own = {
        **dict.fromkeys(("code", "tool", "roleplay", "maths", "medical"), "MIT"),
        **dict.fromkeys(("alpaca", "refusal_direction", "over_refused"), "Apache-2.0"),
        **dict.fromkeys(("maliciousgen", "helpful"), "none stated"),
        "caia": "CC BY 4.0",
        "contrast": "this repository's",
    }
    zoos = {name: licence for name, (licence, _) in LICENCES.items()}
    for name, licence in (own | zoos).items():
        if kind.startswith(name):
            return licence
    raise FitError(f"got the kind {kind!r}; expected one whose licence is known: name it here")


def held_out(probe: Probe, folder: Path) -> Row:
    """What a probe says of adapters that no probe was fitted on."""
    table = Table.read(folder / "manifest.csv")
    adapters = [load_adapter(path) for path in table.path]
    scores = np.asarray(probe(adapters))
    found: Row = {"n": len(table)}
    benign, hard = table.role == "benign", table.role == "hard_negative"
    for name, mask in (("benign", benign), ("hard_negative", hard)):
        found[name] = {
            "n": int(mask.sum()),
            "flagged": int((scores[mask] >= probe.threshold).sum()),
        }
    for share in SHARES:
        own = (table.label == 1) & (table.share == share)
        if own.any():
            both = own | benign | hard
            found[f"{share:g}"] = {
                "n": int(own.sum()),
                "found": int((scores[own] >= probe.threshold).sum()),
                "auroc_all": round(auroc(own[both].astype(int), scores[both]), 4),
            }
    return found


def fit_all(which: str, clients: Path, heads: Sequence[str], record: Path, cards: bool) -> None:
    """Fit, save and measure; the record gets an entry a head.

    Args:
        cards: fit nothing: bring the cards of saved probes up to what the record says.
    """
    measured: Row = json.loads(record.read_text(encoding="utf-8"))
    table = Table.read(clients / "manifest.csv")
    adapters = [load_adapter(path) for path in table.path]
    samples = ZOO / "adapters" / record.stem
    usual = cohort(which, table, adapters)
    if not cards:
        featurizer = Featurizer.fit(FeatureRecipe.invariant(k=8), adapters)
        features = featurizer(adapters)
    for head in heads:
        folder = ZOO / "probes" / record.stem / head
        if cards and not folder.is_dir():
            continue
        if cards:
            about = facts(which, table, head, measured)
            probe = Probe.from_pretrained(folder).with_facts(**about)
        elif head == "paper":
            probe = fit_paper(which, table, adapters, measured)
        else:
            probe = fit(which, table, featurizer, features, head, measured)
        probe.with_facts(cohort=usual).save_pretrained(folder)
        entry: Row = {"threshold": probe.threshold, "n": probe.facts["training"]["n"]}
        if samples.is_dir() and head != "paper":
            entry["held_out"] = held_out(probe, samples)
        _add(record, head, entry)
        print(head, json.dumps(entry), flush=True)


def _add(record: Path, head: str, entry: Row) -> None:
    measured: Row = json.loads(record.read_text(encoding="utf-8"))
    measured.setdefault("probes", {})[head] = entry
    record.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = documented(__doc__)
    parser.add_argument("which", choices=sorted(BASES))
    parser.add_argument("clients", type=Path)
    parser.add_argument("--heads", nargs="*", default=[*HEADS, "paper"])
    parser.add_argument("--cards", action="store_true", help="fit nothing: write the cards anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = ZOO / "smollm2" / "records" / f"{NAMES[options.which]}.json"
    fit_all(options.which, options.clients, options.heads, record, options.cards)


if __name__ == "__main__":
    main()
