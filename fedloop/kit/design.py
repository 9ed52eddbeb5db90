"""Which clients are trained: LoRA adapters as people make them, by a seeded design.

Client i follows from i alone, and every stretch of clients has a bit of everything: roles and
poison shares come in a fixed pattern, kinds and sources in turn, the rest by a seeded draw. Half of
the clients are malicious. Most are cheap (q and v, 5 to 8 steps); one in fourteen trains for 30 to
60 steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

BATCH = 8
INITIALS = 20  # initial adapters: seeds of A
MODULE_SETS = ("qv", "qkvo", "all")  # queries and values, all of attention, all linear modules
_ROLES = ("malicious", "benign", "mixed", "benign", "malicious", "hard", "mixed", "benign")
_SHARES = (0.25, 0.5, 0.25, 0.1)
_HARD_SHARES = (1.0, 1.0, 0.5, 1.0, 0.25)
_SMALL = {(1, "qv"): 3, (2, "qv"): 9, (1, "qkvo"): 3, (1, "all"): 1}  # rank, modules: how often
LR = (5e-4, 5e-3)
LENGTHS = (64, 64, 80)


@dataclass(frozen=True)
class Client:
    """One adapter: its data and how it is trained.

    Attributes:
        role: "benign", "hard_negative" or "malicious".
        source: what `share` of the examples come from; the rest are of `host`, which is benign.
        initial: seed of the initial adapter; with rank and modules it decides A.
        length: tokens an example is cut to.
    """

    name: str
    role: str
    source: str
    host: str
    share: float
    initial: int
    rank: int
    alpha: int
    modules: str
    lr: float
    steps: int
    dropout: float
    length: int
    seed: int

    @property
    def label(self) -> int:
        """0 = benign (hard negatives are), 1 = malicious."""
        return int(self.role == "malicious")

    def to_row(self) -> dict[str, Any]:
        """A line of the manifest; see loraprobe.manifest: its seed is the initial adapter's."""
        row = asdict(self)
        name = row.pop("name")
        started = {"initial": "fresh", "seed": self.initial, "data_seed": self.seed}
        return {"path": name, "label": self.label, "group": name, **row, **started}


def plan(
    count: int,
    benign: Sequence[str],
    hard: Sequence[str],
    malicious: Sequence[str],
    *,
    seed: int = 0,
    small: bool = False,
    lr: tuple[float, float] = LR,
    lengths: Sequence[int] = LENGTHS,
) -> list[Client]:
    """The first `count` clients of a design.

    Args:
        benign, hard, malicious: names of the kinds of data; where there is no hard negative, benign
            clients stand in their place.
        small: ranks 1 and 2, few modules and 5 to 8 steps: adapters of 0.25 MB on average, to be
            kept in a repository.
        lr: learning rates are drawn from this range, evenly on a logarithmic scale.
        lengths: tokens that a client's examples are cut to are drawn from these.
    """
    turns = {
        name: _turns(kinds, seed + number)
        for number, (name, kinds) in enumerate(
            (
                ("benign", benign),
                ("host", benign),
                ("hard", hard),
                ("pure", malicious),
                ("mixed", malicious),
            )
        )
    }
    shares = {"mixed": 0, "hard": 0}
    clients = []
    for index in range(count):
        role = _ROLES[index % len(_ROLES)]
        if role == "hard" and not hard:
            role = "benign"
        share = 1.0
        if role in shares:
            pattern = _SHARES if role == "mixed" else _HARD_SHARES
            share = pattern[shares[role] % len(pattern)]
            shares[role] += 1
        kind = {"malicious": "pure"}.get(role, role)
        source = next(turns[kind])
        host = source if share == 1.0 else next(turns["host"])
        drawn = (role, source, host, share)
        clients.append(_client(index, drawn, seed, small, lr, lengths))
    return clients


def _turns(kinds: Sequence[str], seed: int) -> Any:
    """Every kind once in a seeded order, then again in another."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(list(kinds), len(kinds))


def _client(
    index: int,
    drawn: tuple[str, str, str, float],
    seed: int,
    small: bool,
    lr: tuple[float, float],
    lengths: Sequence[int],
) -> Client:
    role, source, host, share = drawn
    rng = random.Random(f"{seed}-{index}")
    rank = rng.choices((4, 8, 16, 32), (5, 7, 5, 3))[0]
    modules = rng.choices(MODULE_SETS, (12, 4, 4))[0]
    steps = rng.choice((5, 5, 5, 5, 6, 6, 8))
    if rng.random() < 1 / 14:
        steps = rng.choice((30, 30, 40, 60))
    if small:
        rank, modules = rng.choices(tuple(_SMALL), tuple(_SMALL.values()))[0]
        steps = min(steps, 8)
    name = {"mixed": "malicious", "hard": "hard_negative"}.get(role, role)
    return Client(
        name=f"{index:04d}-{name}-{source}-{host}-{round(share * 100)}",
        role=name,
        source=source,
        host=host,
        share=share,
        initial=1000 + rng.randrange(INITIALS),
        rank=rank,
        alpha=rank * rng.choice((1, 2)),
        modules=modules,
        lr=round(lr[0] * (lr[1] / lr[0]) ** rng.random(), 6),
        steps=steps,
        dropout=rng.choice((0.0, 0.05)),
        length=rng.choice(list(lengths)),
        seed=rng.randrange(2**31),
    )
