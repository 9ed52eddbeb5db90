"""Labelled deltas: many short client trainings over many kinds of data, for probes to learn from.

One file a client holds the packed factor deltas after every local step, so that an interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fedloop.client.training import attach_lora, load_base, local_steps, quiet, read_adapter
from fedloop.data.examples import Example
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, pack, unpack
from loraprobe.errors import DataError

from .client_design import ZOO_DESIGN, Client, Design
from .sources import Source

INITIAL, MADE_FROM = "initial.pt", "made_from.json"
_FIRST_ESTIMATE = 5  # clients, after which it is said how long the others will take


@dataclass(frozen=True)
class Base:
    """A base model: where it is loaded from and how, and what adapters and probes call it.

    Attributes:
        path: a folder or a Hub id.
        dtype: "float32", "bfloat16" or "float16"; the LoRA itself is trained in float32.
        quantization: "none", or "8bit" or "4bit", which need a GPU.
    """

    path: str
    name: str
    revision: str | None = None
    dtype: str = "float32"
    quantization: str = "none"


@dataclass(frozen=True)
class DeltaSet:
    """Every client and what its training did.

    ``steps`` (n, kept local steps, d) float32 packed deltas; ``initial`` is what they are counted
    from, where it is known.
    """

    clients: tuple[Client, ...]
    steps: np.ndarray
    layout: Layout
    base_model: str
    design: Design = ZOO_DESIGN
    initial: Adapter | None = None

    def adapters(self, step: int = -1) -> list[Adapter]:
        """The factor deltas after one local step, the last by default."""
        deltas = [
            unpack(torch.from_numpy(row), self.layout, base_model=self.base_model)
            for row in self.steps[:, step]
        ]
        return deltas if self.initial is None else [delta.since(self.initial) for delta in deltas]


def check_sources(sources: Mapping[str, Source], design: Design) -> None:
    """Whether every source has what a client holds.

    Raises:
        DataError: one has too few examples, or is not there.
    """
    for name in design.sources:
        found = len(sources[name].for_clients) if name in sources else 0
        if found < design.examples:
            raise DataError(
                f"source {name} has {found} examples; a client holds {design.examples} (steps x"
                " batch size). Give it more, or train fewer steps"
            )


def examples_of(client: Client, sources: Mapping[str, Source], count: int) -> list[Example]:
    """The client's seeded sample: round(share * count) of its source, the rest of its host."""
    rng = random.Random(client.seed)
    main = round(client.share * count)
    chosen = rng.sample(sources[client.source].for_clients, main)
    if client.share < 1.0:
        chosen += rng.sample(sources[client.host].for_clients, count - main)
    rng.shuffle(chosen)
    return chosen


def make_deltas(
    base: Base,
    sources: Mapping[str, Source],
    clients: Sequence[Client],
    out: Path,
    *,
    design: Design = ZOO_DESIGN,
    seed: int = 0,
    workers: int = 1,
) -> DeltaSet:
    """The deltas of all clients, after training those that have none yet.

    Args:
        seed: of the initial adapter.
        workers: processes; each holds the base model. With one, this process trains, on all of its
            threads.

    Raises:
        DataError: a source has too few examples, or the base model cannot be loaded.
    """
    check_sources(sources, design)
    _claim(out, made_from(base, sources, clients, design, seed))
    missing = [client for client in clients if not (out / f"{client.name}.npy").exists()]
    if missing:
        print(f"{out}: {len(missing)} of {len(clients)} clients to train", flush=True)
    jobs = [
        (base, sources, missing[worker::workers], out, design, seed, f"[{worker + 1}] ")
        for worker in range(workers)
    ]
    if missing and workers == 1:
        train_clients(*jobs[0][:-1])
    elif missing:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.starmap(_train_share, jobs)
    return read_deltas(out, clients, base.name, design)


def made_from(
    base: Base, sources: Mapping[str, Source], clients: Sequence[Client], design: Design, seed: int
) -> dict[str, Any]:
    """Everything that decides what deltas come out, in short."""
    whole = json.dumps(
        sorted([asdict(client) for client in clients], key=lambda client: client["name"])
    )
    return {
        "base": base_facts(base),
        "initial_seed": seed,
        "lora": asdict(design.lora),
        "local_training": asdict(design.training),
        "all_steps": design.all_steps,
        "sources": {name: digest(sources[name].for_clients) for name in design.sources},
        "clients": hashlib.sha256(whole.encode()).hexdigest(),
    }


def base_facts(base: Base) -> dict[str, Any]:
    """What the base model is.

    Of a local folder with the hashes of its weights, since a path says nothing.
    """
    return {
        **asdict(base),
        "weights": {
            path.name: sha256(path) for path in sorted(Path(base.path).glob("*.safetensors"))
        },
    }


def _claim(out: Path, facts: dict[str, Any]) -> None:
    """Deltas of other clients, data or weights must not pass for those of an interrupted run."""
    path, facts = out / MADE_FROM, json.loads(json.dumps(facts))
    found = json.loads(path.read_text()) if path.exists() else {}
    if not found and not any(out.glob("*.npy")):
        _write(path, lambda file: file.write((json.dumps(facts, indent=1) + "\n").encode()))
    elif different := sorted(name for name in facts if found.get(name) != facts[name]):
        raise DataError(
            f"{out} holds deltas made from other {', '.join(different)}. Delete {out.parent}, or"
            " use another folder"
        )


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of a source's examples in their order."""
    lines = (
        json.dumps([example.instruction, example.response, example.context]) for example in examples
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _train_share(
    base: Base,
    sources: Mapping[str, Source],
    clients: Sequence[Client],
    out: Path,
    design: Design,
    seed: int,
    progress: str,
) -> None:
    torch.set_num_threads(1)  # one process a core is faster than one process on all of them
    train_clients(base, sources, clients, out, design, seed, progress)


def train_clients(
    base: Base,
    sources: Mapping[str, Source],
    clients: Sequence[Client],
    out: Path,
    design: Design = ZOO_DESIGN,
    seed: int = 0,
    progress: str = "",
) -> None:
    """Train every client that has no file in `out` yet, and write the initial adapter's layout."""
    quiet()
    causal_lm, tokenizer = load_base(
        base.path,
        dtype=getattr(torch, base.dtype),
        revision=base.revision,
        quantization=base.quantization,
    )
    model = attach_lora(causal_lm, design.lora, seed)
    start = read_adapter(model, base.name)
    _write(out / INITIAL, lambda file: torch.save(start.state_dict(), file))
    spent: list[float] = []
    for client in clients:
        path = out / f"{client.name}.npy"
        if path.exists():
            continue
        began, data = time.monotonic(), examples_of(client, sources, design.examples)
        training = replace(design.training, lr=client.lr)
        rows = [
            pack(step.delta)[0].numpy()
            for step in local_steps(model, tokenizer, data, start, training, client.seed)
        ]
        kept = np.stack(rows if design.all_steps else rows[-1:])
        _write(path, partial(np.save, arr=kept))
        spent.append(time.monotonic() - began)
        if len(spent) == _FIRST_ESTIMATE or len(spent) % 25 == 0:
            each, left = sum(spent) / len(spent), len(clients) - len(spent)
            print(
                f"{progress}{len(spent)} of {len(clients)} clients, {each:.2g} s each,"
                f" {duration(each * left)} left",
                flush=True,
            )


def _write(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """A file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        save(file)
    part.replace(path)


def duration(seconds: float) -> str:
    """A time as people say it."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def read_initial(out: Path, base_model: str, design: Design = ZOO_DESIGN) -> Adapter:
    """The adapter that every client of `train_clients` started from."""
    return Adapter.from_state_dict(
        torch.load(out / INITIAL, weights_only=True), alpha=design.lora.alpha, base_model=base_model
    )


def read_deltas(
    out: Path, clients: Sequence[Client], base_model: str, design: Design = ZOO_DESIGN
) -> DeltaSet:
    """What `train_clients` wrote, in the order of `clients`.

    Raises:
        DataError: a client's file is missing.
    """
    try:
        initial = read_initial(out, base_model, design)
        layout = Layout.of(initial)
        steps = np.stack([np.load(out / f"{client.name}.npy") for client in clients])
    except OSError as error:
        raise DataError(
            f"{error}; expected the deltas of {len(clients)} clients in {out}. Run what trains them"
            " (make zoo)"
        ) from None
    return DeltaSet(
        tuple(clients),
        steps,
        Layout(layout.slots, layout.scalings, "factor_delta"),
        base_model,
        design,
        initial,
    )
