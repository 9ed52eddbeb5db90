"""Every aggregation rule and every level against harmful clients on real data.

Runs the grid, a line of JSON a run.

    python -m paper_repro.grid.run                        # the first grid; hours on two cores
    python -m paper_repro.grid.run --full                 # every axis; says how many hours before
                                                          # it starts
    python -m paper_repro.grid.run --full --rows FedAvg cumulative --malicious 2 4 --seeds 0
    python -m paper_repro.grid.run --larger --workers 14  # the first grid on the base model of 11 M
                                                          # parameters; minutes where there is a GPU
    python -m paper_repro.tables                          # the tables

It goes on where it stopped, also after a kill. Needs the datasets once; the probes are committed.
Refusal is measured on AdvBench's goals, none of which the base model or an attacker trained on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields, replace
from multiprocessing import connection
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from fedloop.client.training import quiet
from fedloop.errors import ConfigError
from fedloop.run.run import RunResult
from fedloop.run.simulate import simulate
from loraprobe.errors import DataError
from zoo.program import documented

from ..common.setting import make_files
from .cells import FIRST, FULL, LARGER, Axes, Cell, grid
from .lines import Line, append_line, cell_of, read_lines

PER_PROCESS = 20  # runs


def main() -> None:
    """Run every cell that has no line yet, or has one of another configuration."""
    options = parser().parse_args()
    chosen = {
        field.name: tuple(values)
        for field in fields(Axes)
        if (values := getattr(options, field.name))
    }
    try:
        make_files(options.data)
        axes = narrowed(FULL if options.full else LARGER if options.larger else FIRST, chosen)
    except (ConfigError, DataError) as error:
        raise SystemExit(str(error)) from None
    lines, cells = read_lines(), list(grid(axes))
    todo = missing(cells, lines)
    print(outlook(cells, todo, lines, options.workers), flush=True)
    if todo and not options.dry_run:
        run_all(todo, options.workers)


def parser() -> argparse.ArgumentParser:
    """The command line; one option an axis."""
    made = documented(__doc__, "data", "workers")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="the full grid instead of the first one")
    which.add_argument(
        "--larger", action="store_true", help="the first grid on the larger base model"
    )
    made.add_argument(
        "--dry-run", action="store_true", help="say what is to be done, and do nothing"
    )
    for axis in fields(Axes):
        values = list(dict.fromkeys(getattr(FULL, axis.name) + getattr(LARGER, axis.name)))
        made.add_argument(
            f"--{axis.name}", nargs="+", type=type(values[0]), choices=values, help="only these"
        )
    return made


def narrowed(axes: Axes, chosen: dict[str, tuple[Any, ...]]) -> Axes:
    """The axes with fewer values, in the order of the grid.

    Raises:
        ConfigError: a value is none of this grid.
    """
    kept = {}
    for name, values in chosen.items():
        if outside := set(values) - set(getattr(axes, name)):
            raise ConfigError(
                f"--{name}: got {', '.join(map(str, sorted(outside)))}; expected any of"
                f" {', '.join(map(str, getattr(axes, name)))}, or --full"
            )
        kept[name] = tuple(value for value in getattr(axes, name) if value in values)
    return replace(axes, **kept)


def missing(cells: Sequence[Cell], lines: Sequence[Line]) -> list[Cell]:
    """The cells without a line of their configuration."""
    done = {cell_of(line): line["config"] for line in lines}
    return [cell for cell in cells if done.get(cell) != cell.digest]


def outlook(
    cells: Collection[Cell], todo: Sequence[Cell], lines: Sequence[Line], workers: int
) -> str:
    """How much is to be done, and how long that takes by the seconds of the runs that were made."""
    text = f"{len(cells) - len(todo)} of {len(cells)} runs are there, {len(todo)} to do"
    if not todo or not lines:
        return text
    bases = {cell.base for cell in todo}
    lines = [line for line in lines if cell_of(line).base in bases] or lines
    took = {
        row: [sum(line["seconds"].values()) for line in lines if line["row"] == row]
        for row in {line["row"] for line in lines}
    }
    usual = mean(seconds for row in took.values() for seconds in row)
    total = sum(mean(took.get(cell.row, [usual])) for cell in todo)
    return (
        f"{text}: about {_duration(total / workers)} in {workers} processes,"
        f" {total / len(todo):.0f} s a run (by the seconds of the {len(lines)} runs that are"
        " written down, row by row)"
    )


def run_all(todo: Sequence[Cell], workers: int) -> None:
    """Run the cells, and write each down when it is finished.

    A run that fails ends this, with its name, and loses only those under way.
    """
    began = time.monotonic()
    for number, (cell, line) in enumerate(finished(todo, workers), start=1):
        append_line(line)
        each = (time.monotonic() - began) / number
        print(
            f"{number} of {len(todo)}, {_duration(each * (len(todo) - number))} left: {cell}:"
            f" refusal {line['metrics']['refusal_strict']:.1%}",
            flush=True,
        )


def finished(todo: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, Line]]:
    """The runs as they end. Fresh processes now and then give back what the libraries keep.

    Not by the executor's max_tasks_per_child: with Python 3.11 it stops for good when its processes
    have had their tasks (python/cpython issue 115634).
    """
    for first in range(0, len(todo), PER_PROCESS * workers):
        pool = processes(workers)
        jobs = {
            pool.submit(run, cell): cell for cell in todo[first : first + PER_PROCESS * workers]
        }
        try:
            for job in as_completed(jobs):
                try:
                    line = job.result()
                except Exception as error:
                    error.add_note(f"in the run {jobs[job]}")
                    raise
                yield jobs[job], line
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def processes(workers: int) -> ProcessPoolExecutor:
    """Processes for runs; none outlives a killed parent.

    They start with one thread for every library, whatever the shell says: how many share a sum
        decides how it is rounded.
    """
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )


def run(cell: Cell) -> Line:
    """One run, as the line that is kept of it."""
    quiet()
    torch.set_num_threads(1)  # one process a core is faster than one process on all of them
    result = simulate(cell.config)
    return {
        "row": cell.row,
        "malicious": cell.malicious,
        "share": cell.share,
        "seed": cell.seed,
        "source": cell.source,
        "benign": cell.benign,
        "base": cell.base,
        "config": cell.digest,
        "machine": machine(),
        "metrics": {name: round(value, 6) for name, value in result.metrics.items()},
        "factors": {role: mean_factors(result, role) for role in ("benign", "malicious")},
        "clients": {role: client_factors(result, role) for role in ("benign", "malicious")},
        "skipped": sum(record.skipped for record in result.records),
        "refused": sum(len(record.reasons) for record in result.records),
        "seconds": totals(result, "seconds"),
        "bytes": totals(result, "bytes"),
    }


def machine() -> str:
    """What decides how sums are rounded.

    The version of PyTorch, and the GPU, or the instructions it uses and the kind of processor.
    """
    if torch.cuda.is_available():
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    about = Path("/proc/cpuinfo")
    facts = (
        dict(
            re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", about.read_text(), re.MULTILINE)
        )
        if about.exists()
        else {}
    )
    kind = " ".join(facts.values()) or platform.processor() or platform.machine()
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {kind}"


def on_gpu(machine: str) -> bool:
    """Whether such a machine is a GPU: only of a processor the instructions are named."""
    return machine.count(", ") == 1


def mean_factors(result: RunResult, role: str) -> list[float]:
    """The mean security factor of a role's clients in every round; empty if there are none."""
    clients = _clients(result, role)
    return [
        round(sum(record.factors[client] for client in clients) / len(clients), 4)
        for record in result.records
        if clients
    ]


def client_factors(result: RunResult, role: str) -> list[float]:
    """The mean security factor over rounds of every client of a role, by client."""
    return [
        round(mean(record.factors[client] for record in result.records), 4)
        for client in _clients(result, role)
    ]


def totals(result: RunResult, what: str) -> dict[str, float]:
    """The ledger summed over rounds."""
    sums: dict[str, float] = {}
    for record in result.records:
        for phase, value in getattr(record, what).items():
            sums[phase] = round(sums.get(phase, 0) + value, 3)
    return sums


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(
            target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True
        ).start()


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"


def _clients(result: RunResult, role: str) -> list[str]:
    return [client for client, facts in result.roles.items() if facts["role"] == role]


if __name__ == "__main__":
    main()
