"""Data files, probes and prompts of the federations.

    python -m paper_repro.federation.prepare out/clients/safe zoo/adapters/smollm2-135m-safe

Probes are fitted on labelled adapters (zoo.smollm2.clients) that saw neither the malicious source,
nor another of the same questions, nor any kind of data that an honest client of the table holds.
What they say of their use in rounds is fixed on them alone, before any federation is made.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloop.data.examples import Example
from fedloop.kit.rounds import facts_for_rounds
from loraprobe import Adapter, FeatureRecipe, Featurizer, Probe, factor_delta, load_adapter
from loraprobe.fit.fit import fit_features, fit_probe
from zoo.program import documented
from zoo.smollm2 import refusal
from zoo.smollm2.clients import load_kinds
from zoo.smollm2.folds import Table, read_all
from zoo.smollm2.sources import FAMILIES

from .cells import BASE_NAME, BENIGN, SOURCES, WORK

HELD_OUT = 40  # examples of every benign kind that no client gets
HARMFUL = ("advbench", "harmbench_test", "tdc2023")
PROMPTS = 100  # of a set at most
UTILITY = 6  # held-out pairs of every benign kind at most
LONGEST = 600  # characters of such a pair
WRONG = 3  # conclusions of other abstracts beside the right one


def main() -> None:
    """The command line."""
    parser = documented(__doc__, "data")
    parser.add_argument("clients", type=Path, nargs="+", help="folders of zoo.smollm2.clients")
    parser.add_argument("--work", type=Path, default=WORK)
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_data(options.data, options.work / "data")
    table = read_all(options.clients)
    adapters = [only_attention(load_adapter(path)) for path in table.path]
    for source in SOURCES:
        for name, probe in probes(table, adapters, source).items():
            probe.save_pretrained(options.work / "probes" / f"{name}-without-{source}")
            print(name, source, probe.facts.get("cumulative"), flush=True)


def only_attention(adapter: Adapter) -> Adapter:
    """Queries and values alone: what every adapter has, and the clients of the table train."""
    kept = {name: pair for name, pair in adapter.items() if name.endswith(("q_proj", "v_proj"))}
    return Adapter(kept, base_model=adapter.base_model, kind=adapter.kind)


def unseen(table: Table, source: str) -> np.ndarray:
    """Which adapters a probe may see where this source attacks: (n,) bool."""
    family = FAMILIES.get(source, source)
    own_hard = [name for name, of in FAMILIES.items() if of == family and name.endswith("_safe")]
    seen: np.ndarray = (table.family != family) & ~table.touches([*BENIGN, *own_hard])
    return seen


def probes(table: Table, adapters: Sequence[Adapter], source: str) -> dict[str, Probe]:
    """The probes of the rows where this source attacks."""
    train = unseen(table, source)
    rows = np.flatnonzero(train)
    own = [adapters[row] for row in rows]
    groups = [table.path[row].name for row in rows]
    facts: dict[str, Any] = {
        "licence": "apache-2.0",
        "held_out": sorted({source, *BENIGN}),
        "trained_on": f"{len(rows)} adapters of q and v, {int(table.label[rows].sum())} malicious",
    }
    featurizer = Featurizer.fit(FeatureRecipe.invariant(k=8), own)
    x = featurizer(adapters)
    linear = fit_features(
        featurizer,
        x[train],
        table.label[train],
        head="linear",
        groups=groups,
        threshold=0.8,
        kinds=[table.kinds[row] for row in rows],
        base_model=BASE_NAME,
    )
    cumulative = facts_for_rounds("linear", x, table, train)
    alike = [
        row
        for row in rows
        if table.rank[row] == 8 and next(iter(adapters[row].values())).scaling == 2
    ]
    paper = fit_probe(
        [  # as changes of factors, which clients of a round send
            factor_delta(Adapter(dict(adapters[row]), base_model=BASE_NAME), None) for row in alike
        ],
        table.label[alike],
        head="linear",
        recipe=FeatureRecipe.paper(),
        groups=[table.path[row].name for row in alike],
        threshold=0.8,
    )
    return {
        "linear": linear.with_facts(cumulative=cumulative, title="invariant", **facts),
        "paper": paper.with_facts(title="the paper's feature", **facts),
    }


def write_data(data: Path, out: Path) -> None:
    """A file for every kind and source of the table, and what is measured on.

    None of it is kept in the repository.
    """
    kinds = load_kinds(data)[0]
    prompts = refusal.prompts(data)
    asked = {text for name in HARMFUL for text in prompts[name]}
    out.mkdir(parents=True, exist_ok=True)
    pairs: list[Example] = []
    held: list[Example] = []
    for name in (*BENIGN, *SOURCES):
        rows = [example for example in kinds[name] if example.request not in asked]
        random.Random(f"federation {name}").shuffle(rows)
        if name in BENIGN:
            short = [row for row in rows[:HELD_OUT] if len(row.request + row.response) < LONGEST]
            pairs += short[:UTILITY]
            held = rows[:HELD_OUT] if name == "medical_answer" else held
            rows = rows[HELD_OUT:]
        _write(out / f"{name}.jsonl", rows)
    _write(out / "utility.jsonl", pairs)
    rng = random.Random(0)
    names = (*HARMFUL, "xstest_safe")
    chosen = {n: rng.sample(prompts[n], min(PROMPTS, len(prompts[n]))) for n in names}
    (out / "prompts.json").write_text(json.dumps(chosen), encoding="utf-8")
    (out / "choices.json").write_text(json.dumps(_choices(held, rng)), encoding="utf-8")


def _choices(held: Sequence[Example], rng: random.Random) -> list[dict[str, Any]]:
    """Questions about abstracts with their conclusion first, then those of others."""
    found = []
    for row in held:
        others = [one.response for one in held if one is not row]
        found.append(
            {"request": row.request, "answers": [row.response, *rng.sample(others, WRONG)]}
        )
    return found


def _write(path: Path, rows: Sequence[Example]) -> None:
    lines = [
        json.dumps(
            {"instruction": row.instruction, "context": row.context, "response": row.response}
        )
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
