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
from .deltas import Base, DeltaSet, make_deltas, read_initial
from .held_out import write_samples
from .measure import check_entry, measured, sections_of
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


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    part.replace(path)
