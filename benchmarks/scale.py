"""What one round costs a server with a hundred, a thousand and ten thousand clients.

Seconds and memory.

    python -m benchmarks.scale                  # all cases: minutes, up to 14 GB of disk
    python -m benchmarks.scale --clients 1000 --numbers 3407872     # one of them anew

Clients are simulated: random updates, scored by a random linear probe of the published recipe (B of
the first layer). What a server does with them is real, the round of `fedloop.run`: every update
goes to disk as it arrives, is checked, scored and weighed by `Defense`, and averaged, or put
through the median, out of the files. Every case runs in a process of its own. Memory is the peak of
the process's anonymous memory above what it had before the first update, sampled every 2 ms; pages
of mapped files are not in it, because the kernel takes them back when it needs them. "in memory"
keeps the updates as tensors instead: the control.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedloop.client.client import Trained
from fedloop.config import Config
from fedloop.defense.defense import Defense
from fedloop.defense.levels import ClientLevel, CumulativeLevel, Level
from fedloop.defense.types import ClientUpdate
from fedloop.rules.rule import AGGREGATORS
from fedloop.run.global_lora import GlobalLoRA
from fedloop.run.plan import plan_round
from fedloop.run.round import OpenRound
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, pack
from loraprobe.adapters.pair import LoRAPair
from zoo.markers import markdown
from zoo.program import documented

from . import common
from .common import fill, random_probe, write

PAGE = common.ROOT / "docs/scale.md"
RESULTS = common.RESULTS / "scale.json"
RANK = 8
LEVELS: dict[str, Level] = {
    "client": ClientLevel(),
    "cumulative": CumulativeLevel(),
    "cumulative, sketch of 1024": CumulativeLevel(sketch=1024),
}


class Shape(NamedTuple):
    """A model: layers whose q_proj (hidden, hidden) and v_proj (hidden / 4, hidden) carry LoRA."""

    layers: int
    hidden: int

    def adapter(self, seed: int) -> Adapter:
        """A random factor delta."""
        rng = torch.Generator().manual_seed(seed)
        sizes = {"q_proj": self.hidden, "v_proj": self.hidden // 4}
        return Adapter(
            {
                f"model.layers.{layer}.self_attn.{name}": LoRAPair(
                    1e-3 * torch.randn(RANK, self.hidden, generator=rng),
                    1e-3 * torch.randn(d_out, RANK, generator=rng),
                    2.0,
                )
                for layer in range(self.layers)
                for name, d_out in sizes.items()
            },
            kind="factor_delta",
        )


SMALL, LLAMA_8B = Shape(2, 1024), Shape(32, 4096)
CASES = (
    *((SMALL, clients, level, "mean", True) for clients in (100, 1000, 10_000) for level in LEVELS),
    *((SMALL, clients, "client", "median", True) for clients in (100, 1000, 10_000)),
    *((SMALL, clients, "client", "mean", False) for clients in (100, 1000, 10_000)),
    *((LLAMA_8B, clients, "client", "mean", True) for clients in (20, 100, 1000)),
    *((LLAMA_8B, clients, "client", "median", True) for clients in (20, 100)),
    *((LLAMA_8B, clients, "client", "mean", False) for clients in (20, 100)),
)


def main() -> None:
    """Measure, print and save."""
    parser = documented(__doc__)
    parser.add_argument("--clients", type=int, help="only the cases of so many clients")
    parser.add_argument("--numbers", type=int, help="only the cases of so many numbers an adapter")
    options = parser.parse_args()
    former = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else []
    rows = {key_of(row): row for row in former if "rule" in row}
    for case in CASES:
        numbers = Layout.of(case[0].adapter(0)).size
        if options.clients in (None, case[1]) and options.numbers in (None, numbers):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, case)
            print(json.dumps(row), flush=True)
            rows[key_of(row)] = row
    kept = {
        "command": "python -m benchmarks.scale",
        "machine": common.machine(threads=torch.get_num_threads()),
        "cases": sorted(rows.values(), key=key_of),
    }
    write(RESULTS, kept)
    fill(PAGE, "scale", table(), "benchmarks.scale")


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a case is told from others by, and the order of the table."""
    names = ("numbers_per_adapter", "updates", "rule", "level", "clients")
    return tuple(row[name] for name in names)


def table() -> str:
    """The page's table of what was measured."""
    measured = json.loads(RESULTS.read_text())
    columns = "numbers an adapter | clients | updates | level | rule | all updates, MiB"
    rows = [f"{columns} | peak memory, MiB | arrive, s | assess, s | aggregate, s"]
    for case in measured["cases"]:
        names = [case[name] for name in ("updates", "level", "rule")]
        sizes = [f"{case[name]:,}" for name in ("all_updates_mib", "peak_memory_mib")]
        seconds = [f"{case['seconds'][phase]:.1f}" for phase in ("arrive", "assess", "aggregate")]
        first = f"{case['numbers_per_adapter']:,} | {case['clients']:,}"
        rows.append(" | ".join([first, *names, *sizes, *seconds]))
    threads = measured["machine"]["threads"]
    return (
        f"{markdown(rows)}\nOne round a case, {threads} thread{'s' if threads > 1 else ''}, other"
        " work on the machine: read the times as orders of magnitude."
    )


def measure(shape: Shape, clients: int, level: str, rule: str, on_disk: bool) -> dict[str, Any]:
    """One round of so many clients: seconds of each phase, and peak memory."""
    first = shape.adapter(0)
    defense = Defense(random_probe(first, size=0.1), LEVELS[level], min_mean_factor=0.0)
    ids = [f"client-{number:05}" for number in range(clients)]
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, watched_memory() as memory:
        with timed(seconds, "make updates"):  # what would be the network
            for number in range(min(clients, 20)):
                shape.adapter(number)
        seconds["make updates"] *= clients / min(clients, 20)
        play = on_the_server if on_disk else in_memory
        play(shape, ids, rule, defense, Path(folder), seconds)
        seconds["arrive"] = max(0.0, seconds["arrive"] - seconds["make updates"])
    size = Layout.of(first).size
    return {
        "numbers_per_adapter": size,
        "clients": clients,
        "level": level,
        "rule": rule,
        "updates": "on disk" if on_disk else "in memory",
        "all_updates_mib": round(clients * size * 4 / 2**20),
        "peak_memory_mib": round(memory["peak"] / 1024),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def on_the_server(
    shape: Shape,
    ids: list[str],
    rule: str,
    defense: Defense,
    folder: Path,
    seconds: dict[str, float],
) -> None:
    """The round that every server of fedloop plays."""
    config = Config.of(
        {
            "model": {"base": "none"},
            "clients": {"count": len(ids), "benign": ["builtin:benign"]},
            "aggregation": {"rule": rule},
        }
    )
    initial = Adapter(dict(shape.adapter(0)), kind="weights")
    server = GlobalLoRA(initial, defense, config, folder=folder)
    with OpenRound(server, plan_round(config, 1), ids) as arriving:
        with timed(seconds, "arrive"):
            for number, client in enumerate(ids):
                update = ClientUpdate(client, 100, shape.adapter(number))
                spent = {"train": 0.0, "evidence": 0.0}
                arriving.receive(client, Trained(update, 1.0, spent, 0))
        played = arriving.close()
    if played.assessment.skipped or played.unusable:
        raise RuntimeError(f"expected a round that counts; got {played.record().note}")
    seconds["assess"] = played.assessment.seconds["assess"]
    seconds["aggregate"] = played.seconds["aggregate"]


def in_memory(
    shape: Shape,
    ids: list[str],
    rule: str,
    defense: Defense,
    folder: Path,
    seconds: dict[str, float],
) -> None:
    """The control: updates are kept as tensors and stacked."""
    with timed(seconds, "arrive"):
        updates = [
            ClientUpdate(client, 100, shape.adapter(number)) for number, client in enumerate(ids)
        ]
    with timed(seconds, "assess"):
        assessment = defense.assess(1, updates)
    with timed(seconds, "aggregate"):
        rows = torch.stack([pack(delta)[0] for delta in assessment.accepted.values()])
        AGGREGATORS[rule](rows, np.array([assessment.weights[c] for c in assessment.accepted]))


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block under a name."""
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun


@contextmanager
def watched_memory() -> Iterator[dict[str, int]]:
    """KiB of anonymous memory above what there was before: its peak over the block."""
    found, before, stop = {"peak": 0}, _anonymous(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            found["peak"] = max(found["peak"], _anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _anonymous() -> int:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
