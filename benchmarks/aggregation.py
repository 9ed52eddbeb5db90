"""Robust aggregation of 20 Llama-3.1-8B LoRA updates.

What median and trimmed mean cost beside sorting the same numbers.

    python -m benchmarks.aggregation        # table and benchmarks/results/aggregation.json

Twenty deltas of 3.4 M numbers (q_proj and v_proj of 32 layers, r = 8, fp32), random; time does not
depend on the values. The compared ways alternate within every repetition, so that a slow moment of
the machine hits all of them; quoted are medians and their ratios. Memory is that of a fresh process
that makes one delta at a time and streams the mean.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedloop.rules.rows import StreamingMean
from fedloop.rules.rule import AGGREGATORS

RESULTS = Path(__file__).parent / "results/aggregation.json"
CLIENTS, LENGTH, F = 20, 3_407_872, 4
RULES = ("mean", "median", "trimmed_mean", "krum", "geometric_median", "dnc")


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    times = time_rules(repetitions)
    result = {
        "machine": {
            "processor": platform.machine(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "repetitions": repetitions,
        "shape": [CLIENTS, LENGTH],
        "median_ms": times,
        "times_torch_sort": {rule: round(times[rule] / times["torch.sort"], 3) for rule in RULES},
        "one_delta_mib": round(LENGTH * 4 / 2**20, 1),
        "peak_memory_above_start_mib": {
            f"streaming mean of {n}": peak_memory(n) for n in (2, CLIENTS, 5 * CLIENTS)
        },
    }
    print(json.dumps(result, indent=2))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def time_rules(repetitions: int) -> dict[str, float]:
    """Median milliseconds of torch.sort and of every rule."""
    deltas, weights = torch.stack([delta(seed) for seed in range(CLIENTS)]), torch.ones(CLIENTS)
    tasks: dict[str, Callable[[], object]] = {"torch.sort": lambda: torch.sort(deltas, dim=0)}
    tasks |= {rule: partial(AGGREGATORS[rule], deltas, weights, f=F) for rule in RULES}
    return alternate(tasks, repetitions)


def delta(seed: int) -> Tensor:
    """One client's update, random."""
    return 1e-3 * torch.randn(LENGTH, generator=torch.Generator().manual_seed(seed))


def stream(clients: int) -> Tensor:
    """The mean of so many updates, of which one is in memory at a time."""
    mean = StreamingMean()
    for seed in range(clients):
        mean.add(delta(seed), 1 / clients)
    return mean.result()


def alternate(tasks: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of every task, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repetitions + 1):  # the first warms caches and is not counted
        for name, task in tasks.items():
            begun = time.perf_counter()
            task()
            times[name].append(1000 * (time.perf_counter() - begun))
    return {name: round(statistics.median(values[1:]), 1) for name, values in times.items()}


def peak_memory(clients: int) -> float:
    """MiB by which a fresh process grows at its peak: it streams the mean of so many clients."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (clients,))


def _grown(clients: int) -> float:
    before = _peak_kib()
    stream(clients)
    return round((_peak_kib() - before) / 1024, 1)


def _peak_kib() -> int:
    """The kernel's high-water mark of this process; getrusage's would include the parent's."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
