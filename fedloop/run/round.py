"""One round: updates arrive on disk, one at a time; then attack, assess, aggregate, apply."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..client.client import Trained
from ..defense.screening import UNREADABLE, reason
from ..defense.types import Assessment, RoundRecord
from ..errors import AggregationError
from .attackers import attack_updates
from .plan import RoundPlan

if TYPE_CHECKING:
    from .global_lora import GlobalLoRA

_FLOAT_BYTES = 4


@dataclass
class Played:
    """A round that is over: what its record is composed of, but for what is measured afterwards.

    Attributes:
        reasons: client -> why nothing of it could be read, or nothing came.
        unusable: why the accepted updates could not be aggregated; "" if they were.
        rule: what aggregated them.
    """

    assessment: Assessment
    losses: Mapping[str, float]
    seconds: dict[str, float]
    bytes: dict[str, int]
    reasons: Mapping[str, str]
    notes: list[str] = field(default_factory=list)
    unusable: str = ""
    rule: str = ""

    def record(self, metrics: Mapping[str, float] | None = None) -> RoundRecord:
        """The round's record; the one place where it is composed."""
        return self.assessment.record(
            unusable=self.unusable,
            reasons=self.reasons,
            losses=self.losses,
            seconds=self.seconds,
            bytes=self.bytes,
            metrics=metrics,
            notes=self.notes,
            rule=self.rule,
        )


@dataclass(frozen=True)
class _Ledger:
    """What is kept in memory of what a client sent."""

    num_examples: int
    loss: float
    seconds: Mapping[str, float]
    evidence_bytes: int


class OpenRound:
    """A round in which updates arrive; they lie on disk until it is closed.

    Attributes:
        refused: client -> why nothing of it counts, so far.
    """

    def __init__(self, federation: GlobalLoRA, plan: RoundPlan, expected: Sequence[str]) -> None:
        self._federation = federation
        self._plan = plan
        self._expected = tuple(expected)
        self._spool = federation.spool()
        self._ledgers: dict[str, _Ledger] = {}
        self._arrived: Counter[str] = Counter()
        self.refused: dict[str, str] = {}

    @property
    def clients(self) -> tuple[str, ...]:
        """Whose updates have arrived and can be read, in the order in which they were asked."""
        return tuple(client for client in self._expected if client in self._ledgers)

    def receive(self, client: str, trained: Trained | str) -> None:
        """Take what a client sent; it need not be kept. What cannot be read is refused.

        A second update refuses both: which is the client's own cannot be known.

        Args:
            trained: or why it cannot be read.
        """
        self._arrived[client] += 1
        if self._arrived[client] > 1:
            text = f"duplicate: {self._arrived[client]} replies in one round; expected one"
            self.refuse(client, text)
            return
        if isinstance(trained, str):
            self.refuse(client, trained)
            return
        update = trained.update
        try:
            self._spool.add(client, update.adapter, update.steps)
        except UNREADABLE as error:
            self.refuse(client, reason(error))
            return
        self._ledgers[client] = _Ledger(
            update.num_examples, trained.loss, trained.seconds, trained.evidence_bytes
        )

    def refuse(self, client: str, why: str) -> None:
        """Count nothing of a client, whatever came of it so far."""
        self._spool.discard(client)
        self._ledgers.pop(client, None)
        self.refused[client] = why

    def close(self, malicious: Sequence[str] = ()) -> Played:
        """Weigh what arrived and make the result the global LoRA.

        Args:
            malicious: who plays the configured attack on updates, in an experiment.
        """
        notes: list[str] = []
        try:
            self._attack([client for client in malicious if client in self._ledgers])
        except AggregationError as error:
            # too few honest clients in this round to make it from: they send what they trained
            notes.append(f"no update attack: {error}")
        federation = self._federation
        assessment = federation.defense.assess(
            self._plan.number,
            [
                self._spool.update(client, self._ledgers[client].num_examples)
                for client in self.clients
            ],
            start=federation.lora,
            expected=self._expected,
        )
        federation.forget(assessment.forgotten)
        began = time.perf_counter()
        unusable = ""
        if not assessment.skipped:
            try:
                federation.apply(assessment, self._spool, self._plan)
            except AggregationError as error:
                # a rule that finds no majority, or too few clients left: keep the global LoRA
                unusable = str(error)
        seconds = self._seconds()
        seconds["aggregate"] = time.perf_counter() - began
        return Played(
            assessment,
            self._losses(),
            seconds,
            self._bytes(),
            dict(self.refused),
            notes,
            unusable,
            federation.config.aggregation.rule,
        )

    def _attack(self, malicious: Sequence[str]) -> None:
        federation = self._federation
        attack_updates(
            self._spool,
            [client for client in self.clients if client not in malicious],
            malicious,
            federation.config.clients,
            federation.defense,
            self._plan.generator,
        )

    def _losses(self) -> dict[str, float]:
        losses = {client: ledger.loss for client, ledger in self._ledgers.items()}
        return {client: losses[client] for client in self.clients if math.isfinite(losses[client])}

    def _seconds(self) -> dict[str, float]:
        return {
            phase: math.fsum(ledger.seconds[phase] for ledger in self._ledgers.values())
            for phase in ("train", "evidence")
        }

    def _bytes(self) -> dict[str, int]:
        return {
            "update": _FLOAT_BYTES * self._spool.layout.size * len(self._ledgers),
            "evidence": sum(ledger.evidence_bytes for ledger in self._ledgers.values()),
        }

    def __enter__(self) -> OpenRound:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()
