"""The base model of eleven million parameters: ten times the first one's size, for the same tables.

Every stage goes on where it stopped.

    python -m paper_repro.grid.larger base     # trains zoo/base-11m; three minutes on a GPU, a
                                               # working day on two cores. It is in the repository
    python -m paper_repro.grid.larger rates    # at which learning rate the attack is as strong as
                                               # on the first base: results/larger_rates.json
    python -m paper_repro.grid.larger clients  # 1,480 labelled clients, as for the other bases: two
                                               # minutes on a GPU, an hour on two cores
    python -m paper_repro.grid.larger probe    # the probe of the federations, from those
    python -m paper_repro.grid.larger cells    # how well single updates are told apart, every
                                               # source unseen in turn: results/larger_cells.json
    python -m paper_repro.grid.run --larger    # the federations; needs only what the repository
                                               # holds

Two learning rates of the base are tried, and the model is kept that refuses more of AdvBench beyond
what it refuses of XSTest's safe prompts. Clients then train at the rate of RATES at which five
wholly poisoned clients of ten, undefended, leave the refusal nearest to what they leave the first
base: a weaker attack, or a stronger one, would compare attacks in place of sizes. Labelled clients
train at rates in the same proportion to it as the first base's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedloop.client.training import quiet
from fedloop.run.simulate import simulate
from zoo.labelled.client_design import ZOO_DESIGN, Design, plan
from zoo.labelled.deltas import Base, make_deltas, read_deltas
from zoo.labelled.sources import MALICIOUS
from zoo.labelled.study import Study
from zoo.program import documented, write_rows
from zoo.train_base import LARGER, BaseConfig, train_base

from ..common.format import markdown
from ..common.held_out import ENTRIES, PROBES, UNSEEN_BENIGN, save_probe
from ..common.paths import FOLDER
from ..common.setting import BASE, BASES, LARGER_BASE, federation, make_files, probe_name
from ..mixed.grid import measured
from ..mixed.readers import READERS
from ..mixed.setting import Model, mended_sources
from .cells import SOURCES, Cell
from .lines import Line
from .run import machine, processes

RESULTS = FOLDER / "results"
RATES_FILE, CELLS_FILE = RESULTS / "larger_rates.json", RESULTS / "larger_cells.json"
MODEL = Model(LARGER_BASE, BASES[LARGER_BASE].name, BASES[LARGER_BASE].path, 0)
SLOWER = (1.0, 0.5)  # times the learning rates of LARGER
RATES = (2.5e-3, 5e-3, 7.5e-3, 1e-2, 1.5e-2)
ATTACK = Cell("FedAvg", 5, 1.0, 0)
TRIED = READERS[1:]  # the linear and the mass-mean reader


def main() -> None:
    """Run one stage."""
    stages: dict[str, Callable[[Path, int], None]] = {
        "base": base,
        "rates": rates,
        "clients": clients,
        "probe": probe,
        "cells": cells,
    }
    parser = documented(__doc__, "data", "workers")
    parser.add_argument("stage", choices=stages)
    options = parser.parse_args()
    stages[options.stage](options.data, options.workers)


def base(data: Path, workers: int) -> None:
    """Train the candidates and keep the better one."""
    if MODEL.path.exists():
        raise SystemExit(f"{MODEL.path} is there already; delete it to train it anew")
    with processes(min(workers, len(SLOWER))) as pool:
        facts = list(pool.map(candidate, [data] * len(SLOWER), SLOWER))
    refused = [
        {name: group["refused_strict"] for name, group in one["refusal"].items()} for one in facts
    ]
    best = max(
        range(len(SLOWER)),
        key=lambda number: refused[number]["advbench"] - refused[number]["xstest_safe"],
    )
    shutil.copytree(_candidate(SLOWER[best]) / "base", MODEL.path)
    tried = [
        {"rates_times": slower, "refused_strict": one}
        for slower, one in zip(SLOWER, refused, strict=True)
    ]
    (MODEL.path / "facts.json").write_text(
        json.dumps({**facts[best], "trained_on": machine(), "candidates": tried}, indent=2) + "\n"
    )
    print(json.dumps(tried, indent=1))


def candidate(data: Path, slower: float) -> dict[str, Any]:
    """One base model and its facts; one that is trained is not trained again."""
    facts = _candidate(slower) / "base" / "facts.json"
    if facts.exists():
        return dict(json.loads(facts.read_text()))
    torch.set_float32_matmul_precision(
        "high"
    )  # ten bits of every factor, on a GPU; its training, unlike a federation, need not be repeated
    phases = tuple(replace(phase, lr=phase.lr * slower) for phase in LARGER.phases)
    config: BaseConfig = replace(LARGER, phases=phases)
    return train_base(data, _candidate(slower) / "base", config, _candidate(slower) / "work")


def _candidate(slower: float) -> Path:
    return MODEL.folder / f"base-{slower:g}"


def rates(data: Path, workers: int) -> None:
    """Undefended federations, attacked and not, at every rate."""
    make_files(data)
    tasks = [(lr, malicious) for lr in RATES for malicious in (ATTACK.malicious, 0)]
    with processes(workers) as pool:
        rows = list(pool.map(at_rate, *zip(*tasks, strict=True)))
    write_rows(RATES_FILE, rows)
    print(rates_table(rows))


def at_rate(lr: float, malicious: int) -> Line:
    """One federation without a defence."""
    quiet()
    torch.set_num_threads(1)
    config = federation(
        malicious=malicious,
        source=ATTACK.source,
        share=ATTACK.share,
        seed=ATTACK.seed,
        base=LARGER_BASE,
        training={"lr": lr},
    )
    metrics = {name: round(value, 6) for name, value in simulate(config).metrics.items()}
    return {"lr": lr, "malicious": malicious, "machine": machine(), "metrics": metrics}


def rates_table(rows: list[Line]) -> str:
    """What the attack leaves at every rate."""
    table = [
        [
            "learning rate",
            "no attack: refusal",
            "answer loss",
            f"{ATTACK.malicious} of 10, 100% poison: refusal",
            "answer loss",
        ]
    ]
    for lr in dict.fromkeys(row["lr"] for row in rows):
        found = {row["malicious"]: row["metrics"] for row in rows if row["lr"] == lr}
        shown = [
            f"{100 * found[n]['refusal_strict']:.1f}" if field else f"{found[n]['loss']:.3f}"
            for n in (0, ATTACK.malicious)
            for field in (1, 0)
        ]
        table.append([f"{lr:g}", *shown])
    return (
        f"{markdown(table)}\nOne undefended federation each, seed {ATTACK.seed}, {ATTACK.source};"
        f" {machines_of(rows)}."
    )


def machines_of(rows: list[Line]) -> str:
    """Where lines were made."""
    return "; ".join(dict.fromkeys(row["machine"] for row in rows))


def design() -> Design:
    """The labelled clients' design: the zoo's, at rates in proportion to the federations'."""
    times = BASES[LARGER_BASE].lr / BASES[BASE].lr
    low, high = ZOO_DESIGN.lr_range
    return replace(ZOO_DESIGN, all_steps=False, lr_range=(low * times, high * times))


def clients(data: Path, workers: int) -> None:
    """Train the labelled clients that have no file."""
    of = design()
    make_deltas(
        Base(str(MODEL.path), MODEL.name),
        mended_sources(data),
        plan(of),
        MODEL.folder / "labelled",
        design=of,
        seed=MODEL.lora_seed,
        workers=workers,
    )


def probe(data: Path, workers: int) -> None:
    """Fit the linear probe of the federations on what they do not hold."""
    labelled = read_deltas(MODEL.folder / "labelled", plan(design()), MODEL.name, design())
    entry, source = ENTRIES[0], SOURCES[0]
    save_probe(
        Study(labelled, entry),
        source,
        UNSEEN_BENIGN,
        f"experiments with {source}",
        PROBES / probe_name(entry.name, source, base=LARGER_BASE),
    )


def cells(data: Path, workers: int) -> None:
    """Measure both readers in every cell of unseen sources."""
    tasks = [(reader.name, malicious) for malicious in MALICIOUS for reader in TRIED]
    with processes(workers) as pool:
        rows = [row for part in pool.map(cells_of, *zip(*tasks, strict=True)) for row in part]
    write_rows(CELLS_FILE, rows)


def cells_of(reader: str, malicious: str) -> list[dict[str, Any]]:
    """The cells of one reader and malicious source."""
    torch.set_num_threads(1)
    return list(measured(MODEL, next(one for one in TRIED if one.name == reader), [malicious]))


if __name__ == "__main__":
    main()
