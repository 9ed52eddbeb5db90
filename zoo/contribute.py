"""Make a probe for another base model.

Labelled deltas, studies, probe, card and record, in one command.

    python -m zoo.contribute --base org/model --revision COMMIT --out contribution \\
        --benign code=code.jsonl hub:lmsys/lmsys-chat-1m --malicious attack.jsonl
        hub:PKU-Alignment/BeaverTails \\ --hard-negative hub:PKU-Alignment/BeaverTails#safe

A source is what fedloop trains on: a file, builtin:<name>[/<category>] or
hub:<dataset>[@<revision>]; NAME= in front names it. A hard negative called <malicious source>_safe
is that source's safe twin, and leaves training with it. Everything expensive is kept in OUT/work;
the same command goes on after an interruption. OUT/README.md says what to do next.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloop.errors import FedloopError
from loraprobe.errors import LoraprobeError, MissingExtra

from .client_design import Design, plan
from .contribute_options import Asked, asked, hub_id, read_source
from .deltas import SECONDS, DeltaSet, base_facts, check_sources
from .measure import same_rounding
from .pipeline import Replicate, held_out_adapters, labelled_deltas, smaller, studies
from .records import Record, data_facts, fit_and_record, write_record
from .report import unseen_summary
from .sources import Source
from .study import BASELINES, Row

LARGEST_ADAPTERS = (
    20 << 20
)  # bytes of held-out adapters that a pull request may add to the repository


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every stage that has not been run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    wanted = asked(arguments, __doc__)
    sources = {name: read_source(name, spec, wanted.limit) for name, spec in wanted.specs.items()}
    check_sources(sources, wanted.design)
    replicates = [
        Replicate(number, wanted.base, seed, seed) for number, seed in enumerate(wanted.seeds)
    ]
    counts = [len(plan(wanted.design)) for _ in replicates] + [
        len(plan(smaller(wanted.design, wanted.held_out)))
    ]
    print(
        f"{sum(counts)} clients to train: {' + '.join(map(str, counts[:-1]))} in {len(replicates)}"
        f" replicates, {counts[-1]} held out",
        flush=True,
    )
    published, results = _measure(wanted, sources, replicates)
    record = {
        "probe": wanted.entry.name,
        "command": f"python -m zoo.contribute {shlex.join(arguments)}",
        "base_model": wanted.base.name,
        "about": _about(wanted),
        "adapters": wanted.adapters,
        "data": _data(wanted, published, sources),
        "threads": wanted.threads,
        "replicates": [result[wanted.entry.name] for result in results],
        "baselines": {
            baseline.name: [result[baseline.name] for result in results] for baseline in BASELINES
        },
    }
    with same_rounding(wanted.threads):
        record = fit_and_record(
            published, wanted.entry, record, wanted.out / "adapters", wanted.out / "probe"
        )
    write_record(record, wanted.out / "record.json")
    cost = {**cost_of(wanted.out / "work"), "workers": wanted.workers, "cores": os.cpu_count()}
    (wanted.out / "cost.json").write_text(json.dumps(cost, indent=1) + "\n", encoding="utf-8")
    (wanted.out / "README.md").write_text(next_steps(wanted.out, record), encoding="utf-8")
    print(
        f"{wanted.entry.name}: unseen sources, AUROC mean / worst cell: {unseen_summary(record)};"
        f" see {wanted.out}/README.md"
    )


def _measure(
    wanted: Asked, sources: Mapping[str, Source], replicates: Sequence[Replicate]
) -> tuple[DeltaSet, list[dict[str, Row]]]:
    """The published replicate's deltas, and every replicate's studies."""
    work, results = wanted.out / "work", []
    for replicate in replicates:
        deltas = labelled_deltas(replicate, sources, wanted.design, work, wanted.workers)
        if replicate is replicates[0]:
            published, sample = deltas, smaller(wanted.design, wanted.held_out)
            held_out_adapters(
                replicate,
                sources,
                sample,
                max(wanted.seeds) + 1,
                work,
                wanted.workers,
                wanted.out / "adapters",
            )
        with same_rounding(wanted.threads):
            results.append(
                studies(deltas, [wanted.entry], replicate, work, twins_of=wanted.entry.name)
            )
    return published, results


def cost_of(work: Path) -> dict[str, float]:
    """What a contribution took, by what its runs kept.

    Trainings and fits, and their seconds in all processes together.
    """
    trainings = [
        float(line)
        for path in work.glob(f"replicate-*/*/{SECONDS}")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    lines = [
        json.loads(line)
        for path in work.glob("replicate-*/studies/*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    fits = [(line["fits"], line["seconds"]) for line in lines if "fits" in line]
    return {
        "trainings": len(trainings),
        "seconds_of_trainings": round(sum(trainings), 1),
        "fits": sum(count for count, _ in fits),
        "seconds_of_fits": round(sum(seconds for _, seconds in fits), 1),
    }


def _data(wanted: Asked, deltas: DeltaSet, sources: Mapping[str, Source]) -> Record:
    facts = data_facts(wanted.design, deltas, sources, wanted.licences)
    hub_ids = {name: found for name, spec in wanted.specs.items() if (found := hub_id(spec))}
    return {**facts, "specs": wanted.specs, "hub_ids": hub_ids, "base": base_facts(wanted.base)}


def _about(wanted: Asked) -> dict[str, Any]:
    """What the card says that no study measures."""
    design: Design = wanted.design
    refusals = (
        f" It was fitted with {', '.join(design.hard_negative)} among the benign clients."
        if design.hard_negative
        else ""
    )
    missing = (
        []
        if design.hard_negative
        else [
            "the difference to refusals: no client with safe answers to harmful questions was"
            " fitted on"
        ]
    )
    return {
        "title": f"{wanted.entry.name}: malicious LoRA updates of {wanted.base.name}",
        "detects": (
            f"Client updates (factor deltas of one short local training) of {wanted.base.name} that"
            f" were trained on harmful compliance ({', '.join(design.malicious)}), alone or mixed"
            f" into ordinary data.{refusals}"
        ),
        "does_not_detect": [
            (
                "adapters of any other base model, or of another initial adapter than the one"
                " beside its held-out adapters"
            ),
            "backdoors with a trigger, data theft, or any attack other than harmful compliance",
            *missing,
        ],
        "licence": wanted.licence,
    }


def next_steps(out: Path, record: Record) -> str:
    """What comes out, and what a pull request has to hold."""
    name, size = (
        record["probe"],
        sum(path.stat().st_size for path in (out / "adapters").rglob("*") if path.is_file()),
    )
    low, high = record["held_out_clients"]["auroc_ci"]
    adapters = [f"cp -r {out}/adapters zoo/contributed/{name}"]
    if record["adapters"].startswith("hub:"):
        adapters = [f"# the held-out adapters are at {record['adapters']}"]
    elif size > LARGEST_ADAPTERS:
        adapters = [
            (
                f"# the held-out adapters have {size >> 20} MB; a pull request may add"
                f" {LARGEST_ADAPTERS >> 20}. Lower --held-out, or publish them:"
            ),
            (
                f"hf upload ORG/{name}-adapters {out}/adapters    # then run zoo.contribute again"
                f" with --adapters hub:ORG/{name}-adapters@COMMIT"
            ),
        ]
    lines = [
        f"# {record['about']['title']}",
        "",
        f"Made by `{record['command']}`.",
        "",
        f"- unseen sources, AUROC mean / worst cell by poison share: {unseen_summary(record)}",
        (
            f"- held-out clients, AUROC: {record['held_out_clients']['auroc']:.3f} [{low:.3f},"
            f" {high:.3f}], n = {record['held_out_clients']['n']}"
        ),
        "",
        (
            "Check it, then add it to the zoo in a clone of the repository; the pull request holds"
            " what these lines change:"
        ),
        "",
        "```",
        f"python -m zoo.verify --contribution {out}",
        f"cp -r {out}/probe zoo/probes/{name}",
        f"cp {out}/record.json zoo/records/{name}.json",
        *adapters,
        "python -m zoo.report",
        "python -m zoo.verify",
        "```",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main()
    except (LoraprobeError, FedloopError, MissingExtra) as error:
        sys.exit(f"{type(error).__name__}: {error}")
