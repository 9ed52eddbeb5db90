"""Run the studies behind records again, from the kept deltas of all clients, and compare.

What was measured so far is kept in work/again, so that an interrupted run goes on; it is deleted
when all of it was compared, so that the next run measures anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from loraprobe.errors import LoraprobeError

from .client_design import Design, plan
from .deltas import DeltaSet, duration, read_deltas
from .diff_records import Comparison
from .measure import SECTIONS, jobs, measured, same_rounding
from .pipeline import folder_of
from .records import Record, calibration_facts, fitted_facts
from .study import BASELINES, Entry, Study


@dataclass(frozen=True)
class Task:
    """One entry's study on one replicate, and what its record says came out."""

    entry: Entry
    said: Record
    record: Record

    @property
    def title(self) -> str:
        """What its lines begin with."""
        return f"{self.entry.name}, replicate {self.said['replicate']}"

    @property
    def is_published(self) -> bool:
        """Whether the probe itself was fitted on this replicate."""
        return self.entry.name == self.record["probe"] and self.said is self.record["replicates"][0]


def again(
    records: Mapping[str, Record],
    work: Path,
    only: Sequence[str] | None,
    tolerance: float,
    threads: int | None,
) -> list[str]:
    """Fit the probes and run their studies again; one line a difference.

    Args:
        only: names of probes and baselines; all if None.
        tolerance: of two numbers, see `Comparison`.
        threads: that share a sum (`same_rounding`); as many as the record says if None.
    """
    lines: list[str] = []
    began, tasks = time.monotonic(), _tasks(records, only)
    for number, task in enumerate(tasks, start=1):
        print(f"[{number} of {len(tasks)}] {task.title}", flush=True)
        comparison = Comparison(tolerance)
        try:
            with same_rounding(threads or task.record["threads"]):
                _compare(task, _deltas(task, work), _kept(task, work), comparison)
        except LoraprobeError as error:
            comparison.lines.append(f"{task.title}: {error}. Run {task.record['command']} first")
        print(
            f"{task.title}: {comparison.outcome()}; {duration(time.monotonic() - began)} so far",
            flush=True,
        )
        lines += comparison.lines
    for task in tasks:
        (_kept(task, work) / f"{task.entry.name}.jsonl").unlink(missing_ok=True)
    return lines


def _kept(task: Task, work: Path) -> Path:
    return folder_of(work / "again", task.said["replicate"])


def _tasks(records: Mapping[str, Record], only: Sequence[str] | None) -> list[Task]:
    """Replicate by replicate, since each has deltas of its own to read."""
    tasks = [
        Task(Entry.from_dict(name, record), said, record)
        for name, record in records.items()
        for said in record["replicates"]
    ]
    studied = {
        json.dumps(record["baselines"], sort_keys=True): record for record in records.values()
    }  # the zoo's own share theirs
    for record in studied.values():
        tasks += [
            Task(baseline, said, record)
            for baseline in BASELINES
            for said in record["baselines"][baseline.name]
        ]
    chosen = [task for task in tasks if only is None or task.entry.name in only]
    return sorted(chosen, key=lambda task: task.said["replicate"])


def _deltas(task: Task, work: Path) -> DeltaSet:
    design = Design.from_dict(task.record["data"]["design"])
    folder = folder_of(work, task.said["replicate"]) / "deltas"
    return read_deltas(
        folder, plan(design, task.said["clients_seed"]), task.record["base_model"], design
    )


def _compare(task: Task, deltas: DeltaSet, kept: Path, comparison: Comparison) -> None:
    study = Study(deltas, task.entry)
    sections = [section for section in SECTIONS if section in task.said]
    if task.is_published:
        _fit_again(task, study, sections, comparison)
    found = measured(study, kept, task.title, sections)
    for section, value in found.items():
        comparison.add(
            f"{task.title}: {section}", task.said[section], json.loads(json.dumps(value))
        )


def _fit_again(task: Task, study: Study, sections: Sequence[str], comparison: Comparison) -> None:
    """The probe: threshold, calibration and out-of-fold scores.

    It also shows how long the studies will take.
    """
    began = time.monotonic()
    probe = study.probe(np.ones(len(study.clients), bool))
    fits, seconds = study.fits_of_a_probe, time.monotonic() - began
    left = sum(job.fits for job in jobs(study, sections))
    print(
        f"{task.title}: fitted again, {seconds:.0f} s; the studies take {left} fits: about"
        f" {duration(seconds / fits * left)}",
        flush=True,
    )
    said: dict[str, Any] = task.record["fitted"]
    found = {
        "threshold": probe.threshold,
        "benign_below": probe.benign_below,
        "calibration": calibration_facts(probe),
    }
    comparison.add(f"{task.title}: fitted", {name: said[name] for name in found}, found)
    with TemporaryDirectory() as folder:
        heads = fitted_facts(probe, probe.save_pretrained(folder))["sha256"]
    print(
        f"{task.title}: the head is {'' if heads == said['sha256'] else 'not '}the published one"
        " bit for bit",
        flush=True,
    )
    comparison.add(
        f"{task.title}: score_distribution",
        task.record["score_distribution"],
        study.score_distribution(probe),
    )
