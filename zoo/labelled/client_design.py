"""Which clients are trained for probes to learn from.

Sources of every role, mixed at several poison shares.

Three kinds of client. Benign ones train on one ordinary source. Hard negatives train on harmful
questions with safe answers, alone or mixed into benign data. Malicious ones train on harmful
questions with complying answers, at several poison shares, mixed over every benign source in turn:
with one benign kind in every mixture, a probe learns that kind instead of the poison.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedloop.client.training import LocalTraining, LoRASettings
from fedloop.errors import ConfigError

from .sources import BENIGN, HARD_NEGATIVE, MALICIOUS

SHARES = (1.0, 0.5, 0.25, 0.1)
LORA = LoRASettings(r=8, alpha=16, dropout=0.05, target_modules=("q_proj", "v_proj"))
TRAINING = LocalTraining(lr=5e-3, steps=5, batch_size=8, max_length=128)
HARD_SHARE = 0.25  # of the hard negatives that are mixed into benign data


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

    @property
    def kind(self) -> str:
        """What tables call clients of its role and poison share."""
        return poison_name(self.share) if self.label else self.role.replace("_", " ")


@dataclass(frozen=True)
class Design:
    """Sources by role, poison shares, and how clients train; defaults are the zoo's.

    Attributes:
        shares: poison shares of malicious clients, from 1 (nothing but the source) downwards.
        lr_range: clients do not share one learning rate, so that no probe learns it.
        per_source: clients of every source by itself.
        per_cell: clients of every malicious source, benign source and share below 1.
        per_hard_cell: clients of every hard negative mixed into every benign source.
        all_steps: whether the deltas of every local step are kept; studies read the last one alone.
    """

    benign: tuple[str, ...] = BENIGN
    hard_negative: tuple[str, ...] = HARD_NEGATIVE
    malicious: tuple[str, ...] = MALICIOUS
    shares: tuple[float, ...] = SHARES
    lora: LoRASettings = LORA
    training: LocalTraining = TRAINING
    lr_range: tuple[float, float] = (2.5e-3, 8e-3)
    per_source: int = 32
    per_cell: int = 8
    per_hard_cell: int = 2
    all_steps: bool = True

    def __post_init__(self) -> None:
        if min(len(self.benign), len(self.malicious)) < 2:
            raise ConfigError(
                f"got {len(self.malicious)} malicious and {len(self.benign)} benign sources;"
                " leaving one of each out of training needs at least 2 and 2. Add sources: a probe"
                " that was not tested on an unseen one says nothing of real attacks"
            )
        if len(set(self.sources)) != len(self.sources):
            raise ConfigError(
                f"got the sources {', '.join(self.sources)}; expected names that differ"
            )
        if (
            self.shares[:1] != (1.0,)
            or list(self.shares) != sorted(set(self.shares), reverse=True)
            or self.shares[-1] <= 0
        ):
            raise ConfigError(
                f"got poison shares {self.shares}; expected 1 first, then falling numbers above 0"
            )
        if not 0 < self.lr_range[0] <= self.lr_range[1]:
            raise ConfigError(
                f"got learning rates from {self.lr_range[0]} to {self.lr_range[1]}; expected a"
                " range above 0"
            )
        if min(self.per_source, self.per_cell, self.per_hard_cell) < 1:
            raise ConfigError(
                f"got {self.per_source}, {self.per_cell} and {self.per_hard_cell} clients a kind;"
                " expected at least 1"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source's name."""
        return self.benign + self.hard_negative + self.malicious

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """What cards call a role -> its sources."""
        return {
            "benign": self.benign,
            "benign, hard negative": self.hard_negative,
            "malicious": self.malicious,
        }

    @property
    def examples(self) -> int:
        """How many examples a client holds: each is met once."""
        return self.training.steps * self.training.batch_size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Design:
        """The design that `to_dict` wrote, through JSON or not."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        targets = values["lora"]["target_modules"]
        lora = LoRASettings(
            **{**values["lora"], "target_modules": None if targets is None else tuple(targets)}
        )
        return cls(**{**values, "lora": lora, "training": LocalTraining(**values["training"])})


ZOO_DESIGN = Design()


def plan(design: Design = ZOO_DESIGN, seed: int = 0) -> list[Client]:
    """Every client of a design, in a shuffled order: an interrupted run has a bit of everything."""
    rng = random.Random(seed)
    pure, mixed, hard = design.per_source, design.per_cell, design.per_hard_cell
    cells = [("benign", source, source, 1.0, pure) for source in design.benign]
    cells += [("hard_negative", source, source, 1.0, pure) for source in design.hard_negative]
    cells += [
        ("hard_negative", source, host, HARD_SHARE, hard)
        for source in design.hard_negative
        for host in design.benign
    ]
    cells += [("malicious", source, source, 1.0, pure) for source in design.malicious]
    cells += [
        ("malicious", source, host, share, mixed)
        for share in design.shares[1:]
        for source in design.malicious
        for host in design.benign
    ]
    low, high = design.lr_range
    clients = []
    for role, source, host, share, count in cells:
        for number in range(count):
            lr = low * (high / low) ** rng.random()
            name = f"{role}-{source}-{host}-{int(share * 100)}-{number}"
            clients.append(
                Client(name, role, source, host, share, round(lr, 6), rng.randrange(2**31))
            )
    rng.shuffle(clients)
    return clients


def poison_name(share: float) -> str:
    """What tables call malicious clients of a poison share."""
    return f"malicious, {share:.0%} poison".replace("%", " %")


def twin_of(malicious: str) -> str:
    """The name of a malicious source's safe twin.

    Safe answers to the same questions, where there is such a source.
    """
    return f"{malicious}_safe"
