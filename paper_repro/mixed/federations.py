"""Federations with client sampling whose every update is recorded.

What is known of a client after each participation.

    python -m paper_repro.mixed.federations            # 4 malicious sources on two base models, 3
                                                       # to 5 minutes each on one core of its own
    python -m paper_repro.mixed.federations --draws 1  # with other clients: what
                                                       # `paper_repro.mixed.fresh` tries the rule on

Of 48 clients 16 are drawn each round, so that every one takes part in one of three rounds, eight
times in all. Twenty are malicious, five at each poison share, mixed into a benign kind of their
own; 18 hold the nine benign kinds, ten hard negatives, alone or mixed. Each has its own number of
examples, local steps (3 to 8) and learning rate (2.5e-3 to 8e-3). The server averages everybody, so
that the global LoRA drifts towards complying, or honest clients alone; no defence has an influence
on what is recorded.

Beside them the server trains references, one a benign kind, as if it held public data of its own:
each from the global LoRA of one of three rounds, as a client does. They are recorded and never
averaged.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloop.client.training import (
    LocalTraining,
    local_steps,
    quiet,
)
from fedloop.data.examples import Example
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import pack
from zoo.labelled.client_design import SHARES
from zoo.labelled.sources import BENIGN, HARD_NEGATIVE, Source
from zoo.program import documented, write_arrays

from .setting import ALL, FRESH, MODELS, Model, mended_sources

PARTICIPATIONS, PER_ROUND, PER_SHARE = 8, 16, 5
BATCH, MAX_LENGTH = 8, 128
REFERENCE = "reference"  # a role
Sources = dict[str, Source]


@dataclass(frozen=True)
class Member:
    """One client of a federation, or a reference: what it holds and how it trains."""

    role: str
    source: str
    host: str
    share: float
    examples: list[Example]
    steps: int
    lr: float


def main() -> None:
    """Record what is not recorded yet."""
    parser = documented(__doc__, "data")
    parser.add_argument(
        "--draws",
        type=int,
        nargs="+",
        default=[0],
        help="which clients: 0 those that the rule is made on, from 1 fresh ones",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    sources = mended_sources(options.data)
    for draw in options.draws:
        for model in MODELS.values():
            for malicious, averaged in FRESH if draw else model.federations:
                record(model, malicious, averaged, sources, draw)


def path(model: Model, malicious: str, averaged: str, draw: int = 0) -> Path:
    """Where a federation's record is.

    X (updates, d) float16, meta (updates, 3) of member, participation and round, and the members'
    facts.
    """
    return model.folder / "federations" / f"{malicious}-{averaged}{f'-{draw}' if draw else ''}.npz"


def record(model: Model, malicious: str, averaged: str, sources: Sources, draw: int = 0) -> None:
    """One federation; a file that is there is whole.

    Every draw starts from the same initial LoRA, to which the probes belong.
    """
    target, seed = path(model, malicious, averaged, draw), model.lora_seed + 10 * draw
    if target.exists():
        return
    rng = random.Random(f"{malicious}-{seed}")
    clients = members_of(malicious, sources, rng)
    members = [*clients, *references(sources, random.Random(f"references-{malicious}-{seed}"))]
    lora, tokenizer, start, layout = model.adapted()
    rows: list[np.ndarray] = []
    meta: list[tuple[int, int, int]] = []
    order, rounds, began = list(range(len(clients))), len(clients) // PER_ROUND, time.monotonic()
    for participation in range(1, PARTICIPATIONS + 1):
        rng.shuffle(order)
        for turn in range(rounds):
            number = 1 + (participation - 1) * rounds + turn
            chosen = [
                *order[turn * PER_ROUND : (turn + 1) * PER_ROUND],
                *range(len(clients) + turn, len(members), rounds),
            ]
            deltas = [
                _update(lora, tokenizer, members[member], member, start, seed, number)
                for member in chosen
            ]
            rows += [delta.numpy().astype(np.float16) for delta in deltas]
            meta += [(member, participation, number) for member in chosen]
            left_out = {REFERENCE} if averaged == ALL else {REFERENCE, "malicious"}
            counted = [
                delta
                for member, delta in zip(chosen, deltas, strict=True)
                if members[member].role not in left_out
            ]
            start = averaged(start, counted)
            print(
                f"{model.key}, {malicious}, {averaged}, draw {draw}: round {number},"
                f" {time.monotonic() - began:.0f} s",
                flush=True,
            )
    facts: dict[str, Any] = {
        name: [getattr(member, name) for member in members]
        for name in ("role", "source", "host", "share", "steps", "lr")
    }
    is_b = np.concatenate(
        [np.full(int(np.prod(slot.shape)), slot.factor == "B") for slot in layout.slots]
    )
    write_arrays(target, x=np.stack(rows), meta=np.array(meta), isB=is_b, **facts)


def members_of(malicious: str, sources: Sources, rng: random.Random) -> list[Member]:
    """The clients of a federation, drawn from the generator."""
    cells = [
        ("malicious", malicious, host, share)
        for share in SHARES
        for host in rng.sample(BENIGN, PER_SHARE)
    ]
    cells += [("benign", source, source, 1.0) for source in BENIGN for _ in range(2)]
    cells += [("hard_negative", source, source, 1.0) for source in HARD_NEGATIVE]
    cells += [("hard_negative", source, rng.choice(BENIGN), 0.25) for source in HARD_NEGATIVE]
    cells += [
        ("hard_negative", source, rng.choice(BENIGN), 0.5)
        for source in rng.sample(HARD_NEGATIVE, 2)
    ]
    return [_member(*cell, sources, rng) for cell in cells]


def references(sources: Sources, rng: random.Random) -> list[Member]:
    """What the server trains itself, beside the clients."""
    return [_member(REFERENCE, source, source, 1.0, sources, rng) for source in BENIGN]


def _member(
    role: str, source: str, host: str, share: float, sources: Sources, rng: random.Random
) -> Member:
    count = rng.choice((48, 64, 96))
    main, pool = round(share * count), sources[source].for_clients
    rows = (
        rng.sample(range(len(pool)), main)
        if main <= len(pool)
        else rng.choices(range(len(pool)), k=main)
    )
    examples = [pool[row] for row in rows]
    if main < count:
        examples += rng.sample(sources[host].for_clients, count - main)
    rng.shuffle(examples)
    return Member(
        role, source, host, share, examples, rng.randint(3, 8), 2.5e-3 * (8 / 2.5) ** rng.random()
    )


def _update(
    lora: Any, tokenizer: Any, member: Member, index: int, start: Adapter, seed: int, number: int
) -> torch.Tensor:
    """What one member sends in one round, packed: its factor delta after all of its local steps."""
    training = LocalTraining(member.lr, member.steps, BATCH, MAX_LENGTH)
    draw = random.Random(f"{seed}-{number}-{index}")
    examples = draw.sample(member.examples, min(len(member.examples), member.steps * BATCH))
    *_, last = local_steps(
        lora, tokenizer, examples, start, training, seed * 100003 + number * 101 + index
    )
    return pack(last.delta)[0]


if __name__ == "__main__":
    main()
