"""What clients would send, recorded once, so that attacks can be tried on arrays without training
anew.

    python -m paper_repro.attackers.record  # to build/federations/attackers; goes on where it
                                            # stopped

The global LoRA follows ten honest clients: where it is while a defence holds, or while attackers
    sleep. From its place in
every round also the clients that can turn malicious are trained, on their poison: at full share, at
smaller ones, and once with B frozen, so that only A moves. Of every training are kept the whole
update, and of its steps and of the shadow branch what the probe reads (B of all layers).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloop.client.training import LocalTraining, local_steps, quiet
from fedloop.config import Config
from fedloop.data.clients import Client
from fedloop.data.examples import Example
from fedloop.run.build import build_clients, build_federation
from fedloop.run.plan import client_seed
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, pack, unpack
from zoo.program import documented, write_arrays

from ..common.recording import read_b
from ..common.setting import federation

OUT = Path("build/federations/attackers")
ROUNDS = 8
MALICIOUS = 4
SOURCES = ("jailbreakbench", "harmbench")
SEEDS = (0, 1)
SHARES = (1.0, 0.5, 0.25)
EXAMPLES = 40  # of a client's round: 5 steps of 8
Arrays = dict[str, np.ndarray]


def main() -> None:
    """Record what is not recorded yet, seed by seed."""
    documented(__doc__).parse_args()
    quiet()
    torch.set_num_threads(1)
    for seed in SEEDS:
        if not honest_path(seed).exists():
            write_arrays(honest_path(seed), **record_honest(seed))
        for share in SHARES:
            for source in SOURCES:
                if not malicious_path(source, share, seed).exists():
                    found = record_malicious(source, share, seed)
                    write_arrays(malicious_path(source, share, seed), **found)


def configuration(source: str, share: float, seed: int, malicious: int = MALICIOUS) -> Config:
    """The federation whose clients are recorded."""
    return federation(malicious=malicious, source=source, share=share, seed=seed).model_copy(
        update={"rounds": ROUNDS}
    )


@dataclass(frozen=True)
class Trainer:
    """A loaded model that trains one client of one federation at a time."""

    config: Config
    model: Any
    tokenizer: Any
    initial: Adapter

    @classmethod
    def of(cls, config: Config) -> Trainer:
        """Load the federation's model."""
        parts = build_federation(config)
        return cls(config, *parts.model_for_measuring(), parts.lora)

    @property
    def layout(self) -> Layout:
        """Of updates, kind "factor_delta"."""
        return replace(Layout.of(self.initial), kind="factor_delta")

    def lora(self, vector: np.ndarray) -> Adapter:
        """A packed global LoRA (d,) as an adapter."""
        return unpack(
            torch.from_numpy(vector.astype(np.float32)),
            Layout.of(self.initial),
            base_model=self.initial.base_model,
        )

    def train(
        self,
        examples: Sequence[Example],
        start: np.ndarray,
        number: int,
        client: int,
        *,
        only_a: bool = False,
    ) -> Arrays:
        """A client's update (d,) and the B of its steps (steps, p), from the global LoRA `start`
        (d,).
        """
        of = self.config.training
        training = LocalTraining(of.lr, of.steps, of.batch_size, of.max_length, of.max_grad_norm)
        begin, adjust = (
            self.lora(start),
            partial(_freeze_b, rank=self.config.lora.r) if only_a else None,
        )
        steps = list(
            local_steps(
                self.model,
                self.tokenizer,
                examples,
                begin,
                training,
                client_seed(self.config.seed, number, client),
                adjust,
            )
        )
        return {
            "update": pack(steps[-1].delta)[0].numpy(),
            "steps": np.stack([read_b(step.delta) for step in steps]),
        }

    def shadow(self, examples: Sequence[Example], number: int, client: int) -> np.ndarray:
        """The B of the shadow branch's steps on the same batches, (steps, p)."""
        return self.train(examples, pack(self.initial)[0].numpy(), number, client)["steps"]


def record_honest(seed: int) -> Arrays:
    """Ten honest clients along the global LoRA that is their mean."""
    config = configuration(SOURCES[0], 1.0, seed, malicious=0)
    trainer, clients, began = Trainer.of(config), build_clients(config), time.monotonic()
    start = pack(trainer.initial)[0].numpy()
    rounds: dict[str, list[np.ndarray]] = {"start": [], "update": [], "steps": [], "shadow": []}
    for number in range(1, ROUNDS + 1):
        found = _round(trainer, list(enumerate(clients)), start, number)
        for name, rows in {"start": start, **found}.items():
            rounds[name].append(rows)
        start = start + found["update"].mean(axis=0)
        print(f"honest, seed {seed}: round {number}, {time.monotonic() - began:.0f} s", flush=True)
    return {name: np.stack(rows).astype(np.float32) for name, rows in rounds.items()}


def record_malicious(source: str, share: float, seed: int) -> Arrays:
    """The clients that can turn malicious, trained on their poison from where the honest global
    LoRA was.
    """
    config = configuration(source, share, seed)
    trainer, began = Trainer.of(config), time.monotonic()
    members = malicious_members(build_clients(config))
    rounds: dict[str, list[np.ndarray]] = {"update": [], "steps": [], "shadow": [], "through_a": []}
    for number, start in enumerate(np.load(honest_path(seed))["start"], start=1):
        full = share == 1.0
        found = _round(trainer, members, start, number, shadow=full)
        if full:
            found["through_a"] = np.stack(
                [
                    trainer.train(one.examples, start, number, index, only_a=True)["update"]
                    for index, one in members
                ]
            )
        for name, rows in found.items():
            rounds[name].append(rows)
    print(f"{source} at {share:.0%}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    return {
        "members": np.array([index for index, _ in members]),
        **{name: np.stack(rows) for name, rows in rounds.items() if rows},
    }


def malicious_members(clients: Sequence[Client]) -> list[tuple[int, Client]]:
    """The malicious clients with their numbers; the same numbers at every source and share."""
    return [(index, client) for index, client in enumerate(clients) if client.role == "malicious"]


def _round(
    trainer: Trainer,
    clients: Sequence[tuple[int, Client]],
    start: np.ndarray,
    number: int,
    *,
    shadow: bool = True,
) -> Arrays:
    trained = [trainer.train(client.examples, start, number, index) for index, client in clients]
    found = {name: np.stack([one[name] for one in trained]) for name in ("update", "steps")}
    if shadow:
        found["shadow"] = np.stack(
            [trainer.shadow(client.examples, number, index) for index, client in clients]
        )
    return found


def honest_path(seed: int) -> Path:
    """Where a seed's honest recording is."""
    return OUT / f"honest-{seed}.npz"


def malicious_path(source: str, share: float, seed: int) -> Path:
    """Where a malicious recording is."""
    return OUT / f"{source}-{share:g}-{seed}.npz"


def _freeze_b(parameters: list[torch.nn.Parameter], rank: int) -> None:
    """Before the optimiser's step: B, (d_out, r), gets no gradient.

    Adam then leaves it where it is.
    """
    for parameter in parameters:
        if parameter.shape[1] == rank and parameter.grad is not None:
            parameter.grad.zero_()


if __name__ == "__main__":
    main()
