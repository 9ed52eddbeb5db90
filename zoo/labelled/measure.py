"""Run a study's protocols one cell after the other, keep what was measured, and say how long the
rest will take.

A study is hundreds of fits. Every cell's rows go to a file as soon as they are there, so that an
interrupted study goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import threadpoolctl
import torch

from loraprobe.errors import DataError

from .client_design import twin_of
from .deltas import duration
from .study import IN_DISTRIBUTION_FOLDS, Entry, Row, Study, by_share

SECTIONS = ("in_distribution", "cells", "unseen_hard_negatives", "twin_kept")
BASELINE_SECTIONS = SECTIONS[:2]
_SILENCE = 20.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Job:
    """One thing to measure: rows of a section, and how many fits they take."""

    section: str
    key: str
    fits: int
    rows: Callable[[], list[Row]]


@contextmanager
def same_rounding(threads: int) -> Iterator[None]:
    """Inside, sums are shared by this many threads, which decides how they are rounded.

    With as many as a record says, its probe comes out bit for bit on the same kind of processor. On
    a machine that is busy, two threads may take ten times as long as one: they wait for each other.
    """
    import sklearn.linear_model  # noqa: F401  # loads the BLAS whose threads are set

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpoolctl.threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


def jobs(study: Study, sections: Iterable[str]) -> list[Job]:
    """What there is to do for these sections, the quickest first."""
    design, entry = study.design, study.entry
    cut = study.fits_of_a_probe
    cell = cut if entry.cuts_in_cells else 1
    pairs = [(malicious, benign) for malicious in design.malicious for benign in design.benign]
    found = [
        Job("in_distribution", "all", IN_DISTRIBUTION_FOLDS, lambda: [study.in_distribution()])
    ]
    found += [
        Job("unseen_hard_negatives", kind, cut, partial(study.hard_negative, kind))
        for kind in design.hard_negative
    ]
    found += [Job("cells", f"{m} in {b}", cell, partial(study.cell, m, b)) for m, b in pairs]
    found += [
        Job("twin_kept", f"{m} in {b}", cell, partial(study.cell, m, b, keep_twin=True))
        for m, b in pairs
    ]
    return [job for job in found if job.section in sections]


def measured(study: Study, folder: Path, title: str, sections: Iterable[str]) -> Row:
    """The sections' rows, as a record holds them; those kept in the folder are not measured again.

    Args:
        title: what lines of progress begin with.
    """
    path = folder / f"{study.entry.name}.jsonl"
    kept = _kept(path, study.entry)
    todo = jobs(study, sections)
    done, began, told = 0, time.monotonic(), -_SILENCE
    left = sum(job.fits for job in todo if (job.section, job.key) not in kept)
    if left:
        print(
            f"{title}: {left} fits, {sum(job.fits for job in todo) - left} kept from before",
            flush=True,
        )
    for job in todo:
        if (job.section, job.key) in kept:
            continue
        started = time.monotonic()
        kept[job.section, job.key] = rows = _plain(job.rows())
        _append(
            path,
            {
                "section": job.section,
                "key": job.key,
                "fits": job.fits,
                "seconds": round(time.monotonic() - started, 3),
                "rows": rows,
            },
        )
        done, now = done + job.fits, time.monotonic() - began
        if now - told >= _SILENCE or done == left:
            print(
                f"{title}: {done} of {left} fits, {now / done:.2g} s each,"
                f" {duration(now / done * (left - done))} left",
                flush=True,
            )
            told = now
    rows_of = {
        section: [row for job in todo if job.section == section for row in kept[section, job.key]]
        for section in sections
    }
    return _as_recorded(rows_of)


def sections_of(study: Study, baseline: bool = False, twins: bool = False) -> tuple[str, ...]:
    """What is measured of a probe (all, or without the kept twins) and of a baseline."""
    if baseline:
        return BASELINE_SECTIONS
    has_twin = any(
        twin_of(malicious) in study.design.hard_negative for malicious in study.design.malicious
    )
    return SECTIONS if twins and has_twin else SECTIONS[:3]


def _as_recorded(rows: dict[str, list[Row]]) -> Row:
    result: Row = {}
    if "in_distribution" in rows:
        result["in_distribution"] = rows["in_distribution"][0]
    if "cells" in rows:
        result |= {"unseen_sources": by_share(rows["cells"]), "cells": rows["cells"]}
    if "unseen_hard_negatives" in rows:
        result["unseen_hard_negatives"] = rows["unseen_hard_negatives"]
    if "twin_kept" in rows:
        result["twin_kept"] = by_share(rows["twin_kept"])
    return result


def _plain(rows: list[Row]) -> list[Row]:
    """As they will be read back."""
    plain: list[Row] = json.loads(json.dumps(rows, allow_nan=False))
    return plain


def _append(path: Path, line: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _kept(path: Path, entry: Entry) -> dict[tuple[str, str], list[Row]]:
    """What was measured before.

    A last line that is not whole was being written when the run ended.
    """
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    if not whole:
        path.unlink(missing_ok=True)
        _append(path, {"entry": entry.to_dict()})
        return {}
    first, *lines = map(json.loads, whole.splitlines())
    check_entry(path, first["entry"], entry)
    path.write_text(whole + "\n")
    return {(line["section"], line["key"]): line["rows"] for line in lines}


def check_entry(path: Path, found: Row, entry: Entry) -> None:
    """Whether what is kept was measured of the same probe.

    Raises:
        DataError: it was not.
    """
    if found != entry.to_dict():
        raise DataError(
            f"{path} was measured of {found}; expected {entry.to_dict()}. Delete the file, or use"
            " another folder"
        )
