"""The stages of a probe that reads one initial adapter: deltas, studies, probe, card and record.

Everything expensive is kept under a folder and not made twice:

    work/replicate-N/deltas     one file a client (zoo.labelled.deltas)
    work/replicate-N/studies    one file a probe or baseline (zoo.labelled.measure)
    work/replicate-0/samples    the deltas of held-out clients
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .client_design import Design, plan
from .deltas import Base, DeltaSet, check_sources, make_deltas, read_initial
from .held_out import write_samples
from .measure import check_entry, measured, same_rounding, sections_of
from .records import Record, data_facts, fit_and_record, write_record
from .sources import Source
from .study import BASELINES, Entry, Row, Study


@dataclass(frozen=True)
class Replicate:
    """One whole repetition.

    Another initial adapter, and where the build wants it another base model or other clients.
    """

    number: int
    base: Base
    initial_seed: int
    clients_seed: int


def folder_of(work: Path, replicate: int) -> Path:
    """Where a replicate's files are kept."""
    return work / f"replicate-{replicate}"


def labelled_deltas(
    replicate: Replicate, sources: Mapping[str, Source], design: Design, work: Path, workers: int
) -> DeltaSet:
    """The deltas of all clients of a replicate; what is missing is trained."""
    out = folder_of(work, replicate.number) / "deltas"
    return make_deltas(
        replicate.base,
        sources,
        plan(design, replicate.clients_seed),
        out,
        design=design,
        seed=replicate.initial_seed,
        workers=workers,
    )


def held_out_adapters(
    replicate: Replicate,
    sources: Mapping[str, Source],
    sample: Design,
    seed: int,
    work: Path,
    workers: int,
    out: Path,
) -> None:
    """Train clients that no probe is fitted on, from the replicate's initial adapter, and write
    them as PEFT adapters.

    Args:
        sample: the design with as many clients as are wanted.
        seed: of these clients, unlike that of any replicate's.
    """
    kept = folder_of(work, replicate.number) / "samples"
    samples = make_deltas(
        replicate.base,
        sources,
        plan(sample, seed),
        kept,
        design=sample,
        seed=replicate.initial_seed,
        workers=workers,
    )
    write_samples(samples, read_initial(kept, replicate.base.name, sample), out)


def studies(
    deltas: DeltaSet, entries: Sequence[Entry], replicate: Replicate, work: Path, twins_of: str
) -> dict[str, Row]:
    """Entry or baseline -> its measurements on one replicate.

    Args:
        twins_of: the entry that is also studied with the safe twins left in training.
    """
    results = {}
    kept = folder_of(work, replicate.number) / "studies"
    for entry in (*entries, *BASELINES):
        path = kept / f"{entry.name}.json"
        if not path.exists():
            study = Study(deltas, entry)
            sections = sections_of(study, baseline=entry in BASELINES, twins=entry.name == twins_of)
            result = measured(study, kept, f"replicate {replicate.number}, {entry.name}", sections)
            _write_json(path, {"entry": entry.to_dict(), **result})
        result = json.loads(path.read_text())
        check_entry(path, result.pop("entry"), entry)
        seeds = {"initial_seed": replicate.initial_seed, "clients_seed": replicate.clients_seed}
        results[entry.name] = {"replicate": replicate.number, **seeds, **result}
    return results


def smaller(design: Design, per_source: int) -> Design:
    """The same sources with few clients of each, to hold out."""
    return replace(design, per_source=per_source, per_cell=1, per_hard_cell=1)


def make_probe(
    entry: Entry,
    base: Base,
    design: Design,
    sources: Mapping[str, Source],
    out: Path,
    *,
    seeds: Sequence[int],
    held_out: int,
    work: Path,
    about: Mapping[str, Any],
    licences: Mapping[str, str],
    command: str,
) -> Record:
    """A probe of the zoo's kinds on any base: OUT/probe, OUT/adapters and OUT/record.json.

    Args:
        seeds: one a replicate, of its initial adapter and its clients; the first is published.
        held_out: clients of every source that are fitted on by no probe.
        work: what is kept between runs.
        about: what the card says that no study measures.

    Raises:
        DataError: a source is too small, or what is kept is of another design.
        FitError: too few clients for the studies or the threshold.
    """
    check_sources(sources, design)
    results = []
    for number, seed in enumerate(seeds):
        replicate = Replicate(number, base, seed, seed)
        deltas = labelled_deltas(replicate, sources, design, work, workers=1)
        if number == 0:
            published, sample = deltas, smaller(design, held_out)
            apart, to = max(seeds) + 1, out / "adapters"
            held_out_adapters(replicate, sources, sample, apart, work, 1, to)
        with same_rounding(1):
            results.append(studies(deltas, [entry], replicate, work, twins_of=entry.name))
    record = {
        "probe": entry.name,
        "command": command,
        "base_model": base.name,
        "about": dict(about),
        "adapters": "adapters",
        "data": data_facts(design, published, sources, licences),
        "threads": 1,
        "replicates": [result[entry.name] for result in results],
        "baselines": {one.name: [result[one.name] for result in results] for one in BASELINES},
    }
    with same_rounding(1):
        record = fit_and_record(published, entry, record, out / "adapters", out / "probe")
    write_record(record, out / "record.json")
    return record


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    part.replace(path)
