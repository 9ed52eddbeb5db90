"""Clients that are found late: what is lost, and what taking their updates out gives back.

    python -m paper_repro.federation.repair          # results/repair.jsonl; resumable

Plain averaging for three rounds of six, then the malicious clients are known. From there on they
are left out, either from the global LoRA as it is, or after every mean that they were in has been
made again without them, from the updates that the server kept. Beside it: never found, never there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloop.config import Config
from fedloop.data.clients import Client
from fedloop.defense.types import Assessment
from fedloop.run.build import build_clients
from fedloop.run.plan import RoundPlan, plan_round
from loraprobe import Adapter
from loraprobe.adapters.deltas import add_delta
from loraprobe.adapters.layout import Layout, pack, unpack
from zoo.program import read_lines

from ..common.paths import RESULTS
from ..grid.lines import append_line
from .cells import ROUNDS, Cell
from .engine import Federation, Trainer
from .run import measured_once, parser

LINES = RESULTS / "repair.jsonl"
FOUND_AFTER = 3  # rounds
CELLS = (Cell("FedAvg", 3, 1.0, "maliciousgen"), Cell("FedAvg", 5, 1.0, "maliciousgen"))
ARMS = ("never found", "left out", "taken out", "never there")
Line = dict[str, Any]


class Late(Federation):
    """A federation whose malicious clients are known after some rounds.

    Args:
        known_after: rounds; 0: from the start.
    """

    def __init__(
        self, trainer: Trainer, config: Config, clients: Sequence[Client], known_after: int
    ) -> None:
        super().__init__(trainer, config, self._keep)
        self._clients = clients
        self._after = known_after
        self._extra: list[np.ndarray] = []  # of every mean: with the malicious less without them
        self._layout_of_deltas: Layout | None = None

    def _keep(self, assessment: Assessment, start: Adapter) -> dict[str, bool]:
        honest = {client.client_id: client.role != "malicious" for client in self._clients}
        if assessment.round <= self._after:
            self._extra.append(self._excess(assessment.accepted, honest))
            return dict.fromkeys(assessment.accepted, True)
        return {client: honest[client] for client in assessment.accepted}

    def _excess(self, updates: Mapping[str, Adapter], honest: Mapping[str, bool]) -> np.ndarray:
        vectors = {}
        for client, update in updates.items():
            self._layout_of_deltas = Layout.of(update)
            vectors[client] = pack(update)[0].numpy().astype(np.float64)
        own = [vector for client, vector in vectors.items() if honest[client]]
        found: np.ndarray = np.mean(list(vectors.values()), axis=0) - np.mean(own, axis=0)
        return found

    def repair(self) -> None:
        """Make every mean so far again without the malicious clients that were in it."""
        if self._layout_of_deltas is None:
            return
        total = torch.from_numpy(-np.sum(self._extra, axis=0).astype(np.float32))
        change = unpack(total, self._layout_of_deltas, base_model=self.lora.base_model)
        self.lora = add_delta(self.lora, change)


def play(cell: Cell, arm: str, trainer: Trainer, work: Path, base: Path) -> list[Line]:
    """One arm: what is left of the model when the clients are known, and at the end."""
    clients = build_clients(cell.config(work, base))
    after = {"never found": ROUNDS, "never there": 0}.get(arm, FOUND_AFTER)
    federation = Late(trainer, cell.config(work, base), clients, after)
    found = []
    for number in range(1, ROUNDS + 1):
        plan: RoundPlan = plan_round(federation.config, number)
        federation.round(plan, clients)
        if number == FOUND_AFTER and arm == "taken out":
            federation.repair()
        if number in (FOUND_AFTER, ROUNDS):
            facts = {"cell": str(cell), "arm": arm, "round": number}
            found.append({**facts, **measured_once(federation, work)})
    return found


def main() -> None:
    """The command line."""
    options = parser(__doc__).parse_args()
    done = {(line["cell"], line["arm"]) for line in read_lines(LINES)}
    todo = [(cell, arm) for cell in CELLS for arm in ARMS if (str(cell), arm) not in done]
    if not todo:
        return
    trainer = Trainer(CELLS[0].config(options.work, options.base), options.work / "kept")
    for cell, arm in todo:
        for line in play(cell, arm, trainer, options.work, options.base):
            append_line(line, LINES)
            print(time.strftime("%H:%M:%S"), cell, arm, line["round"], line["refused"], flush=True)


if __name__ == "__main__":
    main()
