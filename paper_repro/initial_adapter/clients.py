"""Who is trained: nine initial adapters, and under each one the same kinds of clients."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedloop.client.training import LoRASettings
from loraprobe.adapters.adapter import Adapter
from zoo.build import ZOO
from zoo.labelled.client_design import TRAINING, Client, Design
from zoo.labelled.deltas import Base, make_deltas, read_deltas
from zoo.labelled.sources import Source
from zoo.train_base import BASE_NAME

from .sources import BENIGN, FAMILIES, HARD_NEGATIVE, MALICIOUS

WORK = Path("build/initial_adapter")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MODULES = {
    "q/v": ("q_proj", "v_proj"),
    "attention": ATTENTION,
    "all linear": (*ATTENTION, "gate_proj", "up_proj", "down_proj"),
}
SHARES = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Start:
    """One initial adapter: its seed, and the LoRA that clients train from it.

    Attributes:
        modules: a name in `MODULES`.
        extra: how many clients more it has of each kind than the others.
    """

    seed: int
    rank: int
    alpha: int
    modules: str
    extra: int = 0

    @property
    def name(self) -> str:
        """What rows call it."""
        return f"seed {self.seed}, {self.modules}, r = {self.rank}"

    @property
    def folder(self) -> Path:
        """Where its clients' deltas are kept."""
        return WORK / "deltas" / str(self.seed)

    @property
    def design(self) -> Design:
        """What its clients are made of."""
        lora = LoRASettings(self.rank, self.alpha, 0.05, MODULES[self.modules])
        return Design(
            BENIGN, HARD_NEGATIVE, MALICIOUS, SHARES, lora, replace(TRAINING), all_steps=False
        )


# In an order of which every prefix has a bit of everything. Scaling alpha / r is 1 or 2.
STARTS = (
    Start(101, 8, 16, "q/v", extra=1),
    Start(102, 8, 16, "all linear"),
    Start(103, 8, 8, "q/v"),
    Start(104, 16, 16, "q/v"),
    Start(105, 16, 32, "all linear"),
    Start(106, 4, 8, "q/v"),
    Start(107, 32, 32, "all linear"),
    Start(108, 8, 16, "attention"),
    Start(109, 8, 16, "q/v"),
)


def plan(start: Start) -> list[Client]:
    """The clients of one initial adapter, in a shuffled order.

    Mixtures have hosts of several families, other ones from start to start.
    """
    rng = random.Random(start.seed)
    families, extra = list(FAMILIES.values()), start.extra
    cells = [
        ("benign", kind, kind, 1.0, 3 + extra if len(kinds) == 1 else 2 if len(kinds) < 5 else 1)
        for kinds in families
        for kind in kinds
    ]
    cells += [("hard_negative", kind, kind, 1.0, 2 + extra) for kind in HARD_NEGATIVE]
    cells += [("hard_negative", kind, rng.choice(BENIGN), 0.25, extra) for kind in HARD_NEGATIVE]
    cells += [("malicious", source, source, 1.0, 3 + extra) for source in MALICIOUS]
    cells += [
        ("malicious", source, rng.choice(kinds), share, 1)
        for source in MALICIOUS
        for share, hosts in ((0.5, 1 + extra), (0.25, 3 + extra))
        for kinds in rng.sample(families, hosts)
    ]
    low, high = start.design.lr_range
    clients = []
    for role, source, host, share, count in cells:
        for number in range(count):
            lr = round(low * (high / low) ** rng.random(), 6)
            name = f"{role}-{source}-{host}-{int(share * 100)}-{number}"
            clients.append(Client(name, role, source, host, share, lr, rng.randrange(2**31)))
    rng.shuffle(clients)
    return clients


def train(start: Start, sources: Mapping[str, Source]) -> None:
    """Train the clients of a start that have no file yet."""
    make_deltas(
        Base(str(ZOO / "base"), BASE_NAME),
        sources,
        plan(start),
        start.folder,
        design=start.design,
        seed=start.seed,
    )


@dataclass(frozen=True)
class Clients:
    """Every trained client: what it is, where it started, its change."""

    clients: tuple[Client, ...]
    starts: tuple[Start, ...]
    adapters: tuple[Adapter, ...]

    @property
    def labels(self) -> np.ndarray:
        """(n,) 1 = malicious."""
        return np.array([client.label for client in self.clients])

    @property
    def groups(self) -> list[str]:
        """Every client is a group of its own."""
        return [
            f"{start.seed} {client.name}"
            for start, client in zip(self.starts, self.clients, strict=True)
        ]

    @property
    def kinds(self) -> list[tuple[str, ...]]:
        """What every client was trained on, its own kind first."""
        return [
            (client.source,) if client.source == client.host else (client.source, client.host)
            for client in self.clients
        ]


def clients_of(starts: Sequence[Start]) -> Clients:
    """The clients of some starts, with their changes as factor deltas since the start."""
    rows: list[tuple[Client, Start, Adapter]] = []
    for start in starts:
        clients = plan(start)
        deltas = read_deltas(start.folder, clients, BASE_NAME, start.design)
        rows += [
            (client, start, delta) for client, delta in zip(clients, deltas.adapters(), strict=True)
        ]
    clients, places, adapters = zip(*rows, strict=True)
    return Clients(clients, places, adapters)
