"""Make the whole zoo anew: base models, labelled adapters, studies, probes, records, sample adapters.

    python -m zoo.build --data ../shared/data

Everything expensive is kept under build/zoo and not made twice, so an interrupted run goes on.
Replicate 0 is the one that is published (zoo/base, zoo/probes); the others, with another state of
the base model and another initial adapter, say how far its figures can be believed.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraprobe.adapter import Adapter, add_delta
from loraprobe.peft_io import save_adapter

from .deltas import LORA, LR_RANGE, SHARES, TRAINING, Client, DeltaSet, plan, read_deltas, read_initial, train_clients
from .sources import BENIGN, HARD_NEGATIVE, LICENCES, MALICIOUS, Source, load_sources
from .study import BASELINES, ENTRIES, Entry, Study, by_share
from .train_base import BASE_NAME, BaseConfig, train_base

ZOO = Path(__file__).parent
# replicate -> its base model. Detection differed between checkpoints of one small model, so the second
# replicate stops after two of the five phases; its initial adapter is another one too.
REPLICATES = (BaseConfig(), replace(BaseConfig(), phases=BaseConfig().phases[:2], averaged=1))
SAMPLE_SEED = 1  # the sample adapters' clients: drawn apart from those that probes are fitted on


def main() -> None:
    """Run every stage that has not been run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the datasets (one sub-folder each)")
    parser.add_argument("--work", type=Path, default=Path("build/zoo"), help="folder for what is kept between runs")
    parser.add_argument("--workers", type=int, default=2, help="processes that train clients")
    options = parser.parse_args()
    sources = load_sources(options.data)
    results = []
    for seed, config in enumerate(REPLICATES):
        work = options.work / f"replicate-{seed}"
        base = _base(options.data, work, config)
        deltas = _deltas(base, sources, plan(), work / "deltas", seed, options.workers)
        results.append(_studies(deltas, work / "studies", seed))
        if seed == 0:
            shutil.copytree(base, ZOO / "base", dirs_exist_ok=True)
            samples = _deltas(base, sources, plan(4, 1, 1, SAMPLE_SEED), work / "samples", seed, options.workers)
            write_samples(samples, read_initial(work / "samples", BASE_NAME), ZOO / "adapters")
            published = deltas
    write_probes(published, results, ZOO)


def _base(data: Path, work: Path, config: BaseConfig) -> Path:
    if not (work / "base" / "facts.json").exists():
        train_base(data, work / "base", config, work)
    return work / "base"


def _deltas(base: Path, sources: dict[str, Source], clients: list[Client], out: Path, seed: int, workers: int) -> DeltaSet:
    if not all((out / f"{client.name}.npy").exists() for client in clients):
        jobs = [(base, sources, clients[worker::workers], out, seed, f"[{worker + 1}] ") for worker in range(workers)]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.starmap(_train_share, jobs)
    return read_deltas(out, clients, BASE_NAME)


def _train_share(base: Path, sources: dict[str, Source], clients: list[Client], out: Path, seed: int, progress: str) -> None:
    torch.set_num_threads(1)  # one process a core is faster than one process on all of them
    train_clients(base, sources, clients, out, base_model=BASE_NAME, lora_seed=seed, progress=progress)


def _studies(deltas: DeltaSet, out: Path, seed: int) -> dict[str, Any]:
    """entry name -> its measurements on one replicate."""
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for entry in (*ENTRIES, *BASELINES):
        path = out / f"{entry.name}.json"
        if not path.exists():
            print(f"replicate {seed}: studying {entry.name}", flush=True)
            study = Study(deltas, entry)
            cells = list(study.unseen_sources())
            result = {"replicate": seed, "in_distribution": study.in_distribution(), "unseen_sources": by_share(cells), "cells": cells}
            if entry in ENTRIES:
                result["unseen_hard_negatives"] = list(study.unseen_hard_negatives())
            if entry is ENTRIES[0]:
                result["twin_kept"] = by_share(list(study.unseen_sources(keep_twin=True)))
            path.write_text(json.dumps(result, indent=1) + "\n")
        results[entry.name] = json.loads(path.read_text())
    return results


def write_probes(deltas: DeltaSet, results: list[dict[str, Any]], zoo: Path) -> None:
    """Fit every entry on all of a replicate's clients; write probe, card and record."""
    (zoo / "records").mkdir(exist_ok=True)
    for entry in ENTRIES:
        measured = [result[entry.name] for result in results]
        record = {
            "probe": entry.name, "command": "python -m zoo.build", "base_model": BASE_NAME, "recipe": entry.recipe.to_dict(), "head": entry.head,
            "threshold": entry.threshold, "calibration": entry.calibration, "data": _data_facts(deltas.clients), "replicates": measured,
            "baselines": {baseline.name: [result[baseline.name] for result in results] for baseline in BASELINES},
        }  # fmt: skip
        (zoo / "records" / f"{entry.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        study = Study(deltas, entry)
        probe = study.probe(np.ones(len(deltas.clients), bool), **_facts(entry, measured))
        probe.save_pretrained(zoo / "probes" / entry.name)


def write_samples(samples: DeltaSet, initial: Adapter, out: Path) -> None:
    """Adapters in PEFT's format and their manifest."""
    shutil.rmtree(out, ignore_errors=True)
    save_adapter(initial, out / "initial")
    rows = []
    for client, delta in zip(samples.clients, samples.adapters(), strict=True):
        save_adapter(add_delta(initial, delta), out / client.name)
        source = f"{client.source}@{client.share:g}" if client.label else client.source
        rows.append({"path": client.name, "label": ("benign", "malicious")[client.label], "group": client.name, "source": source})
    rows.sort(key=lambda row: row["path"])
    with (out / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _facts(entry: Entry, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """What the probe's card says, from the studies."""
    first = measured[0]
    inside = first["in_distribution"]
    rows = [
        {
            "protocol": "in distribution, out of fold by client", "metric": "AUROC", "value": inside["auroc"], "low": inside["auroc_ci"][0],
            "high": inside["auroc_ci"][1], "n": inside["n"], "groups": inside["n_groups"],
        }
    ]  # fmt: skip
    for number, result in enumerate(measured):
        for row in result["unseen_sources"]:
            rows += [
                {
                    "protocol": f"malicious and benign source unseen, poison share {row['share']:.0%}, replicate {number}",
                    "metric": f"AUROC, {what} of {row['cells']} cells", "value": row[f"auroc_{what}"], "n": row["n"],
                }
                for what in ("mean", "worst")
            ]  # fmt: skip
    worst = [f"{min(result['unseen_sources'][index]['auroc_worst'] for result in measured):.2f}" for index in range(len(SHARES))]
    return {
        "title": f"{entry.name}: malicious LoRA updates of {BASE_NAME}",
        "detects": (
            "Client updates (factor deltas of one short local training) of the zoo's small chat model that were trained on harmful questions with "
            "complying answers, alone or mixed into ordinary data. It was fitted with refusals to harmful questions among the benign clients."
        ),
        "does_not_detect": [
            "adapters of any other base model or of another initial adapter than zoo/adapters/initial",
            "backdoors with a trigger, data theft, or any attack other than harmful compliance",
        ],
        "known_failures": _failures(measured),
        "licence": "apache-2.0",
        "data": [{"name": name, "role": role, "licence": _licence(name)} for role, names in _roles().items() for name in names],
        "metrics": rows,
        "headline": " / ".join(worst) + " at " + " / ".join(f"{share:.0%}" for share in SHARES) + f" poison, {len(measured)} replicates",
    }


def _failures(measured: list[dict[str, Any]]) -> list[str]:
    """Where the studies show the probe wrong, one line a kind of failure and replicate."""
    lines = []
    for number, result in enumerate(measured):
        cells = [cell for cell in result["cells"] if cell["share"] == 1.0]
        means = {name: np.mean([cell["auroc"] for cell in cells if cell["malicious"] == name]) for name in MALICIOUS}
        hardest = min(means, key=lambda name: means[name])
        lines.append(
            f"replicate {number}: {hardest}, unseen and unmixed, is told from unseen benign kinds with a mean AUROC of {means[hardest]:.2f} only"
        )
        hard = max(result["unseen_hard_negatives"], key=lambda row: row["flagged"])
        lines.append(f"replicate {number}: {hard['flagged']:.0%} of clients with {hard['hard_negative']} are flagged if that kind was not trained on")
        if "fpr_worst" in (row := result["unseen_sources"][0]):
            lines.append(
                f"replicate {number}: of an unseen kind of benign data {row['fpr_mean']:.1%} are flagged on average over kinds, "
                f"{row['fpr_worst']:.0%} of the worst kind, where the budget was 1 %"
            )
    return lines


def _roles() -> dict[str, tuple[str, ...]]:
    return {"benign": BENIGN, "benign, hard negative": HARD_NEGATIVE, "malicious": MALICIOUS}


def _licence(source: str) -> str:
    return next(licence for prefix, (licence, _) in LICENCES.items() if source.startswith(prefix))


def _data_facts(clients: tuple[Client, ...]) -> dict[str, Any]:
    roles = [client.role for client in clients]
    return {
        "clients": {role: roles.count(role) for role in sorted(set(roles))}, "sources": {role: list(names) for role, names in _roles().items()},
        "poison_shares": list(SHARES), "lora": vars(LORA), "local_training": vars(TRAINING), "lr_range": list(LR_RANGE),
    }  # fmt: skip


if __name__ == "__main__":
    main()
