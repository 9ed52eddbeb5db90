"""Where the updates of a round come from: a recording, or training.

A recorded update was trained along the honest global LoRA, whatever an attack has done to it
meanwhile; a live client trains from where the global LoRA really is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from fedloop.data.clients import Client
from fedloop.run.build import build_clients
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, unpack

from .moves import Floats
from .record import Trainer, configuration, honest_path, malicious_members, malicious_path


class Recorded:
    """Clients as `paper_repro.attackers.record` kept them.

    Attributes:
        members: the numbers of the attackers.
        initial: (d,), the global LoRA before the first round.
    """

    def __init__(self, source: str, seed: int, layout: Layout, share: float = 1.0) -> None:
        self._honest, self._malicious = (
            dict(np.load(honest_path(seed))),
            dict(np.load(malicious_path(source, share, seed))),
        )
        self.members, self.layout = tuple(map(int, self._malicious["members"])), layout
        self.initial: Floats = self._honest["start"][0].astype(np.float64)

    def play(self, number: int, start: Floats) -> RecordedRound:
        """Round `number` (from 1) as it was recorded, wherever the global LoRA is now."""
        return RecordedRound(self._honest, self._malicious, number - 1)

    def rows(self) -> Iterator[tuple[Adapter, int, str]]:
        """Every recorded update, its label and whose it is, for attackers and servers who fit a
        probe of their own.
        """
        for rows, label in ((self._honest["update"], 0), (self._malicious["update"], 1)):
            for client in range(rows.shape[1]):
                for row in rows[:, client]:
                    yield (
                        unpack(torch.from_numpy(row.astype(np.float32)), self.layout),
                        label,
                        f"{label}-{client}",
                    )


class RecordedRound:
    """One recorded round of everybody.

    Attributes:
        start: (d,), the global LoRA that updates were trained from.
    """

    def __init__(
        self, honest: Mapping[str, np.ndarray], malicious: Mapping[str, np.ndarray], at: int
    ) -> None:
        self._honest, self._malicious, self._at = honest, malicious, at
        self.start: Floats = honest["start"][at].astype(np.float64)

    def benign(self, clients: Sequence[int]) -> Floats:
        """(n, d): what these clients send from their benign data."""
        return np.asarray(self._honest["update"][self._at][list(clients)], dtype=np.float64)

    def malicious(self, what: str = "update") -> Floats:
        """(m, d): what the attackers trained on poison; "through_a": with B frozen."""
        return np.asarray(self._malicious[what][self._at], dtype=np.float64)

    def benign_evidence(self, kind: str, client: int) -> Floats:
        """(steps, p): B after every step of the client's benign training; kind.

        "steps", or "shadow" for the shadow branch.
        """
        return np.asarray(self._honest[kind][self._at][client], dtype=np.float64)

    def malicious_evidence(self, kind: str, row: int) -> Floats:
        """(steps, p): the same of an attacker's training on poison."""
        return np.asarray(self._malicious[kind][self._at][row], dtype=np.float64)


class Live:
    """Clients that train, as in a federation, from where the global LoRA is."""

    def __init__(self, trainer: Trainer, source: str, seed: int, share: float = 1.0) -> None:
        self.trainer, self.layout = trainer, trainer.layout
        self._poisoned = build_clients(configuration(source, share, seed))
        self._benign = build_clients(configuration(source, share, seed, malicious=0))
        self.members = tuple(index for index, _ in malicious_members(self._poisoned))
        self.initial: Floats = np.load(honest_path(seed))["start"][0].astype(np.float64)

    def play(self, number: int, start: Floats) -> _LiveRound:
        """Train from `start` whoever is asked for."""
        return _LiveRound(
            self.trainer,
            self._benign,
            [(index, self._poisoned[index]) for index in self.members],
            number,
            start,
        )


class _LiveRound:
    def __init__(
        self,
        trainer: Trainer,
        benign: list[Client],
        poisoned: list[tuple[int, Client]],
        number: int,
        start: Floats,
    ) -> None:
        self._trainer, self._benign, self._poisoned, self._number, self.start = (
            trainer,
            benign,
            poisoned,
            number,
            start,
        )
        self._trained: dict[tuple[str, int], dict[str, np.ndarray]] = {}

    def benign(self, clients: Sequence[int]) -> Floats:
        return np.stack(
            [self._of("benign", index, self._benign[index])["update"] for index in clients]
        ).astype(np.float64)

    def malicious(self, what: str = "update") -> Floats:
        return np.stack(
            [self._of(what, index, client)["update"] for index, client in self._poisoned]
        ).astype(np.float64)

    def benign_evidence(self, kind: str, client: int) -> Floats:
        return self._shown(kind, "benign", client, self._benign[client])

    def malicious_evidence(self, kind: str, row: int) -> Floats:
        return self._shown(kind, "update", *self._poisoned[row])

    def _shown(self, kind: str, what: str, index: int, client: Client) -> Floats:
        if kind == "steps":
            return self._of(what, index, client)["steps"].astype(np.float64)
        return self._trainer.shadow(client.examples, self._number, index).astype(np.float64)

    def _of(self, what: str, index: int, client: Client) -> dict[str, np.ndarray]:
        if (what, index) not in self._trained:
            self._trained[what, index] = self._trainer.train(
                client.examples, self.start, self._number, index, only_a=what == "through_a"
            )
        return self._trained[what, index]


Clients = Recorded | Live
Played = RecordedRound | _LiveRound
