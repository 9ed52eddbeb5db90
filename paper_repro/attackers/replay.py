"""Recorded or live clients, an attack, a defence: what the server makes of it, round by round.

In a replay the updates are the recorded ones, trained along the honest global LoRA, whatever the
attack has done to it meanwhile; in a live federation every client trains from where the global LoRA
really is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fedloop.defense.defense import Defense
from fedloop.defense.levels import make_level
from fedloop.defense.types import ClientUpdate
from fedloop.defense.weights import aggregation_weights
from fedloop.rules.rule import Rule, make_rule
from fedloop.run.attackers import probe_direction
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, unpack
from loraprobe.adapters.pair import LoRAPair
from loraprobe.probe import Probe

from ..common.setting import CLIENTS
from .clients import Clients, Played
from .moves import Floats, Move, Schedule, unchanged
from .record import EXAMPLES, ROUNDS

EVIDENCE = {
    "local_steps": "steps",
    "shadow_steps": "shadow",
}  # what a level reads -> what is recorded of it
ALWAYS = Schedule(tuple(range(1, ROUNDS + 1)))  # every round


@dataclass(frozen=True)
class Attack:
    """What attackers do, over how many rounds; `forged`.

    The evidence of a poisoned round comes from benign data.
    """

    name: str
    strength: float
    move: Move = unchanged
    share: float = 1.0
    schedule: Schedule = ALWAYS
    forged: bool = False
    rounds: int = ROUNDS


@dataclass(frozen=True)
class Guard:
    """How the server defends itself.

    Attributes:
        level: a name in LEVELS; None for no defence.
        probe: "published", which attackers may know; "private", fitted on other recordings, which
            they do not; "both factors", as private and of A as well as B.
        instant: whether an update also counts for nothing if its own score reaches the level's
            threshold.
        told: whether the server knows who attacks and leaves them out of every round; what any
            other defence is measured against.
        longest: an update longer than this many of the round's median norms counts for so much
            less; None for no bound.
    """

    level: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rule: str = "mean"
    probe: str = "published"
    instant: bool = False
    longest: float | None = None
    told: bool = False


@dataclass(frozen=True)
class Known:
    """What is known of probes: the server's, and the coefficients (d,) that attackers work with."""

    probes: Mapping[str, Probe]
    direction: Floats
    surrogate: Floats
    base_model: str

    @classmethod
    def of(cls, probes: Mapping[str, Probe], own: Probe, layout: Layout) -> Known:
        """From the server's probes, the published one among them, and the attackers' own."""
        published = probes["published"]
        return cls(
            probes,
            probe_direction(published, layout),
            probe_direction(own, layout),
            published.base_model or "",
        )


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        lora: (d,), the final global LoRA.
        factors: (rounds, clients), what counted of each.
        alone: (rounds, clients), the published probe's score of each update by itself.
        poisoned: (rounds,), whether attackers sent poison.
    """

    lora: Floats
    factors: Floats
    alone: Floats
    poisoned: np.ndarray
    skipped: int


def replay(clients: Clients, attack: Attack, guard: Guard, known: Known, *, seed: int) -> Outcome:
    """Play all rounds."""
    level = make_level(guard.level, **guard.options) if guard.level else None
    defense = Defense(known.probes[guard.probe] if level else None, level)
    kind = EVIDENCE.get(level.evidence) if level else None
    rule = make_rule(guard.rule)
    memory = rule.init()
    lora, factors, alone, skipped = clients.initial.astype(np.float64), [], [], 0
    for number in range(1, attack.rounds + 1):
        played = clients.play(number, lora)
        sent = _sent(clients, played, attack, known, number, seed)
        steps = _evidence(clients, played, attack, sent, kind, number)
        updates = [
            ClientUpdate(
                name(index), EXAMPLES, _delta(row, clients.layout, known.base_model), steps(index)
            )
            for index, row in enumerate(sent)
        ]
        record = defense.assess(number, updates)
        alone.append(known.probes["published"]([update.adapter for update in updates]))
        row = np.array([record.factors[name(index)] for index in range(CLIENTS)])
        if guard.instant:
            row = row * (
                known.probes[guard.probe]([update.adapter for update in updates]) < level.threshold
            )  # type: ignore[union-attr]
        if guard.told:
            row[list(clients.members)] = 0.0
        factors.append(row)
        weights = _weights(row)
        if weights is None:
            skipped += 1
        else:
            moved, memory = aggregated(
                rule, memory, _shortened(sent, guard), weights, clients.layout, number, seed
            )
            lora = lora + moved
    return Outcome(
        lora,
        np.stack(factors),
        np.stack(alone),
        np.array([number in attack.schedule.rounds for number in range(1, attack.rounds + 1)]),
        skipped,
    )


def name(index: int) -> str:
    """A client's id."""
    return f"client-{index:02d}"


def _sent(
    clients: Clients, played: Played, attack: Attack, known: Known, number: int, seed: int
) -> Floats:
    """(10, d): the round's updates, the attackers' as their schedule and their move have it."""
    members = list(clients.members)
    honest = [index for index in range(CLIENTS) if index not in members]
    sent = np.empty((CLIENTS, clients.layout.size))
    sent[honest] = played.benign(honest)
    if number in attack.schedule.rounds:
        view = RoundView(played, members, sent[honest], known, clients.layout, seed)
        sent[members] = attack.schedule.scale * attack.move(view, attack.strength)
    else:
        sent[members] = played.benign(members)
    return sent


class RoundView:
    """The `View` of a round, which trains or reads what a move asks for, when it asks."""

    def __init__(
        self,
        played: Played,
        members: list[int],
        honest: Floats,
        known: Known,
        layout: Layout,
        seed: int,
    ) -> None:
        self._played, self._members = played, members
        self.honest, self.start, self.layout, self.seed = honest, played.start, layout, seed
        self.direction, self.surrogate = known.direction, known.surrogate

    @cached_property
    def own(self) -> Floats:
        """Trained on poison."""
        return self._played.malicious()

    @cached_property
    def benign(self) -> Floats:
        """Of their benign data."""
        return self._played.benign(self._members)

    @cached_property
    def through_a(self) -> Floats:
        """Trained on poison with B frozen."""
        return self._played.malicious("through_a")


def _evidence(
    clients: Clients, played: Played, attack: Attack, sent: Floats, kind: str | None, number: int
) -> Callable[[int], tuple[Adapter, ...]]:
    """Client -> the evidence that it sends. Steps end in what was sent, or the server refuses them.

    A shadow has no such end.
    """
    members, poisoned = list(clients.members), number in attack.schedule.rounds

    def of(index: int) -> tuple[Adapter, ...]:
        if kind is None:
            return ()
        lying = poisoned and index in members and not attack.forged
        rows = (
            played.malicious_evidence(kind, members.index(index))
            if lying
            else played.benign_evidence(kind, index)
        )
        if kind == "steps":
            rows = np.concatenate([rows[:-1], _read(sent[index], clients.layout)[None]])
        return tuple(_step(row, clients.layout) for row in rows)

    return of


def _weights(factors: Floats) -> Floats | None:
    """(10,), summing to 1; None if the round is skipped. The gate reads the factors alone."""
    named = {name(index): float(value) for index, value in enumerate(factors)}
    found = aggregation_weights(named, dict.fromkeys(named, EXAMPLES))
    return None if found is None else np.array([found[client] for client in named])


def _shortened(sent: Floats, guard: Guard) -> Floats:
    """The updates, those that are too long cut to the length that the guard allows."""
    if guard.longest is None:
        return sent
    lengths = np.linalg.norm(sent, axis=1, keepdims=True)
    return sent * np.minimum(1.0, guard.longest * np.median(lengths) / lengths)


def aggregated(
    rule: Rule,
    memory: Mapping[str, Any],
    sent: Floats,
    weights: Floats,
    layout: Layout,
    number: int,
    seed: int,
) -> tuple[Floats, dict[str, Any]]:
    """What a rule makes of a round, (d,), and what it remembers."""
    delta, after = rule.apply(
        memory,
        sent,
        weights,
        clients=[name(index) for index in range(len(sent))],
        rng=np.random.default_rng([seed, number]),
        sizes=[slot.size for slot in layout.slots],
    )
    return delta.numpy(), after


def _delta(row: Floats, layout: Layout, base_model: str) -> Adapter:
    return unpack(torch.from_numpy(row.astype(np.float32)), layout, base_model=base_model)


def _step(row: Floats, layout: Layout) -> Adapter:
    """A step of which only B is known: the probe reads no A."""
    slots = {(slot.module, slot.factor): slot.shape for slot in layout.slots}
    modules, at, pairs = sorted(layout.scalings), 0, {}
    for module in modules:
        shape = slots[module, "B"]
        size = shape[0] * shape[1]
        b = torch.from_numpy(row[at : at + size].astype(np.float32)).view(shape)
        pairs[module], at = (
            LoRAPair(torch.zeros(slots[module, "A"]), b, layout.scalings[module]),
            at + size,
        )
    return Adapter(pairs, kind="factor_delta")


def _read(row: Floats, layout: Layout) -> Floats:
    parts = np.split(row, np.cumsum([slot.size for slot in layout.slots])[:-1])
    return np.concatenate(
        [part for slot, part in zip(layout.slots, parts, strict=True) if slot.factor == "B"]
    )
