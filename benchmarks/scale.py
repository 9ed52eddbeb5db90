"""What one round costs a server with a hundred, a thousand and ten thousand clients.

Seconds and memory.

    python -m benchmarks.scale          # benchmarks/results/scale.json and the table in
    docs/scale.md (minutes; up to 6 GB of disk)

Clients are simulated: random updates, scored by a random linear probe of the published recipe (B of
    the first layer). What a server does with
them is real: every update is written to a `Spool` as it arrives, checked, scored and weighed by
`Defense`, and averaged, or put through the median, out of the files. Every case runs in a process
of its own. Memory is the peak of the process's anonymous memory above what it had before the first
update, sampled every 2 ms; pages of mapped files are not in it, because the kernel takes them back
when it needs them. "in memory" keeps the updates as tensors instead: the control.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedloop.defense.defense import Defense
from fedloop.defense.levels import ClientLevel, CumulativeLevel, Level
from fedloop.defense.types import ClientUpdate
from fedloop.rules.rule import AGGREGATORS
from fedloop.run.spool import Spool
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, pack
from loraprobe.adapters.pair import LoRAPair
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.heads import LinearHead
from loraprobe.probe import Probe
from zoo.report import filled

PAGE = Path(__file__).parent.parent / "docs/scale.md"
RESULTS = Path(__file__).parent / "results/scale.json"
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
    *((SMALL, clients, level, True) for clients in (100, 1000, 10_000) for level in LEVELS),
    *((SMALL, clients, "client", False) for clients in (100, 1000, 10_000)),
    *((LLAMA_8B, clients, "client", True) for clients in (20, 100, 200)),
    *((LLAMA_8B, clients, "client", False) for clients in (20, 100)),
)


def main() -> None:
    """Measure, print and save."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    rows = []
    for case in CASES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, case))
        print(json.dumps(rows[-1]), flush=True)
    machine = {
        "processor": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    RESULTS.write_text(
        json.dumps(
            {"command": "python -m benchmarks.scale", "machine": machine, "cases": rows}, indent=1
        )
        + "\n"
    )
    PAGE.write_text(filled(PAGE.read_text(), "scale", table(), "benchmarks.scale"))


def table() -> str:
    """The page's table of what was measured."""
    measured = json.loads(RESULTS.read_text())
    columns = (
        "numbers an adapter",
        "clients",
        "updates",
        "level",
        "all updates, MiB",
        "peak memory, MiB",
        "arrive, s",
        "assess, s",
        "mean, s",
        "median, s",
    )
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for case in measured["cases"]:
        seconds = (
            f"{case['seconds'][phase]:.1f}" for phase in ("arrive", "assess", "mean", "median")
        )
        shown = (
            f"{case['numbers_per_adapter']:,}",
            f"{case['clients']:,}",
            case["updates"],
            case["level"],
            f"{case['all_updates_mib']:,}",
            f"{case['peak_memory_mib']:,}",
            *seconds,
        )
        lines.append(f"| {' | '.join(shown)} |")
    threads = measured["machine"]["threads"]
    return "\n".join(
        [
            *lines,
            "",
            (
                f"One round a case, {threads} thread{'s' if threads > 1 else ''}, other work on the"
                " machine: read the times as orders of magnitude."
            ),
        ]
    )


def measure(shape: Shape, clients: int, level: str, on_disk: bool) -> dict[str, Any]:
    """One round of so many clients: seconds of each phase, and peak memory."""
    first = shape.adapter(0)
    layout = Layout.of(first)
    defense = Defense(random_probe(first), LEVELS[level], layout=layout)
    ids = [f"client-{number:05}" for number in range(clients)]
    seconds: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Spool(folder, layout) as spool,
        watched_memory() as memory,
    ):
        with timed(seconds, "make updates"):  # what would be the network
            for number in range(min(clients, 20)):
                shape.adapter(number)
        seconds["make updates"] *= clients / min(clients, 20)
        held: dict[str, Adapter] = {}
        with timed(seconds, "arrive"):
            for number, client in enumerate(ids):
                if on_disk:
                    spool.add(client, shape.adapter(number))
                else:
                    held[client] = shape.adapter(number)
        seconds["arrive"] = max(0.0, seconds["arrive"] - seconds["make updates"])
        with timed(seconds, "assess"):
            record = defense.assess(
                1,
                [
                    ClientUpdate(client, 100, spool.adapter(client) if on_disk else held[client])
                    for client in ids
                ],
            )
        weights = dict.fromkeys(ids, 1 / clients) if record.skipped else record.weights
        counted = [client for client, weight in weights.items() if weight]
        with timed(seconds, "mean"):
            if on_disk:
                spool.mean(weights)
            else:
                AGGREGATORS["mean"](
                    torch.stack([pack(held[client])[0] for client in counted]),
                    np.array([weights[client] for client in counted]),
                )
        with timed(seconds, "median"):
            rows = (
                spool.rows(counted)
                if on_disk
                else torch.stack([pack(held[client])[0] for client in counted])
            )
            AGGREGATORS["median"](rows, np.ones(len(counted)))
    return {
        "numbers_per_adapter": layout.size,
        "clients": clients,
        "level": level,
        "updates": "on disk" if on_disk else "in memory",
        "all_updates_mib": round(clients * layout.size * 4 / 2**20),
        "peak_memory_mib": round(memory["peak"] / 1024),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def random_probe(like: Adapter) -> Probe:
    """A linear probe of the published recipe with random coefficients.

    What scoring costs does not depend on them.
    """
    featurizer = Featurizer.fit(FeatureRecipe.paper(), [like])
    return Probe(
        featurizer,
        LinearHead(
            np.random.default_rng(0).normal(size=featurizer.num_features).astype(np.float32), 0.0
        ),
    )


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
