"""Labelled deltas: many short client trainings over many kinds of data, for probes to learn from.

Three kinds of client. Benign ones train on one ordinary source. Hard negatives train on harmful
questions with safe answers, alone or mixed into benign data. Malicious ones train on harmful
questions with complying answers, at several poison shares, mixed over every benign source in turn:
with one benign kind in every mixture, a probe learns that kind instead of the poison.

One file a client holds the packed factor deltas after every local step, so that an interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedloop.data import Example
from fedloop.local import LocalTraining, LoRASettings, attach_lora, load_base, local_steps, read_adapter
from loraprobe.adapter import Adapter, Layout, pack, unpack

from .sources import BENIGN, HARD_NEGATIVE, MALICIOUS, Source

SHARES = (1.0, 0.5, 0.25, 0.1)
LORA = LoRASettings(r=8, alpha=16, dropout=0.05, target_modules=("q_proj", "v_proj"))
TRAINING = LocalTraining(lr=5e-3, steps=5, batch_size=8, max_length=128)
LR_RANGE = (2.5e-3, 8e-3)  # clients do not share one learning rate, so that no probe learns it


@dataclass(frozen=True)
class Client:
    """One client's data: `share` of its examples from `source`, the rest from `host` (benign)."""

    name: str
    role: str  # "benign" | "hard_negative" | "malicious"
    source: str
    host: str
    share: float
    lr: float
    seed: int

    @property
    def label(self) -> int:
        """0 = benign (hard negatives are), 1 = malicious."""
        return int(self.role == "malicious")


@dataclass(frozen=True)
class DeltaSet:
    """Every client and what its training did: ``steps`` (n, local steps, d) float32 packed deltas."""

    clients: tuple[Client, ...]
    steps: np.ndarray
    layout: Layout
    base_model: str

    def adapters(self, step: int = -1) -> list[Adapter]:
        """The factor deltas after one local step, the last by default."""
        return [unpack(torch.from_numpy(row), self.layout, base_model=self.base_model) for row in self.steps[:, step]]


def plan(per_source: int = 32, per_cell: int = 8, per_hard_cell: int = 2, seed: int = 0) -> list[Client]:
    """The clients: `per_source` of every pure source, `per_cell` of every mixture."""
    rng = random.Random(seed)
    cells = [("benign", source, source, 1.0, per_source) for source in BENIGN]
    cells += [("hard_negative", source, source, 1.0, per_source) for source in HARD_NEGATIVE]
    cells += [("hard_negative", source, host, 0.25, per_hard_cell) for source in HARD_NEGATIVE for host in BENIGN]
    cells += [("malicious", source, source, 1.0, per_source) for source in MALICIOUS]
    cells += [("malicious", source, host, share, per_cell) for share in SHARES[1:] for source in MALICIOUS for host in BENIGN]
    clients = []
    for role, source, host, share, count in cells:
        for number in range(count):
            lr = LR_RANGE[0] * (LR_RANGE[1] / LR_RANGE[0]) ** rng.random()
            name = f"{role}-{source}-{host}-{int(share * 100)}-{number}"
            clients.append(Client(name, role, source, host, share, round(lr, 6), rng.randrange(2**31)))
    rng.shuffle(clients)  # an interrupted run has a bit of everything
    return clients


def examples_of(client: Client, sources: dict[str, Source], count: int) -> list[Example]:
    """The client's seeded sample: round(share * count) of its source, the rest of its host."""
    rng = random.Random(client.seed)
    main = round(client.share * count)
    chosen = rng.sample(sources[client.source].for_clients, main)
    if client.share < 1.0:
        chosen += rng.sample(sources[client.host].for_clients, count - main)
    rng.shuffle(chosen)
    return chosen


def train_clients(
    base: Path, sources: dict[str, Source], clients: list[Client], out: Path, *, base_model: str, lora_seed: int = 0, progress: str = ""
) -> None:
    """Train every client that has no file in `out` yet, and write the initial adapter's layout."""
    out.mkdir(parents=True, exist_ok=True)
    causal_lm, tokenizer = load_base(str(base))
    model = attach_lora(causal_lm, LORA, lora_seed)
    start = read_adapter(model, base_model)
    torch.save(start.state_dict(), out / "initial.pt")
    started, done = time.monotonic(), 0
    for number, client in enumerate(clients, start=1):
        path = out / f"{client.name}.npy"
        if path.exists():
            continue
        training = LocalTraining(client.lr, TRAINING.steps, TRAINING.batch_size, TRAINING.max_length)
        data = examples_of(client, sources, TRAINING.steps * TRAINING.batch_size)
        rows = [pack(step.delta)[0].numpy() for step in local_steps(model, tokenizer, data, start, training, client.seed)]
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, np.stack(rows))
        path.with_suffix(".part").replace(path)
        done += 1
        if done % 25 == 0:
            print(f"{progress}{number} of {len(clients)} clients, {(time.monotonic() - started) / done:.2f} s each", flush=True)


def read_initial(out: Path, base_model: str) -> Adapter:
    """The adapter that every client of `train_clients` started from."""
    return Adapter.from_state_dict(torch.load(out / "initial.pt", weights_only=True), alpha=LORA.alpha, base_model=base_model)


def read_deltas(out: Path, clients: list[Client], base_model: str) -> DeltaSet:
    """What `train_clients` wrote, in the order of `clients`."""
    layout = Layout.of(read_initial(out, base_model))
    steps = np.stack([np.load(out / f"{client.name}.npy") for client in clients])
    return DeltaSet(tuple(clients), steps, Layout(layout.slots, layout.scalings, "factor_delta"), base_model)
