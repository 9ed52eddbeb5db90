"""A federation as fedloop plays it, with clients that are trained once.

Server, defence, rules and rounds are fedloop's own. A client's update follows from the global LoRA,
its examples, the learning rate and its seed; what two cells share (the first round of every row,
whole runs in which the same clients count) is trained once and kept. Training is the exact fast
step of `fedloop.client.shared_prefix`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fedloop.client.client import Trained
from fedloop.client.evading import ProductLogit, hidden
from fedloop.client.shared_prefix import Text, tokens_of, train
from fedloop.client.training import (
    LocalTraining,
    in_training_order,
    quiet,
    read_adapter,
    write_adapter,
)
from fedloop.config import Config
from fedloop.data.clients import Client
from fedloop.data.examples import Example
from fedloop.defense.types import Assessment, ClientUpdate
from fedloop.errors import AggregationError
from fedloop.run.build import build_defense, load_adapted
from fedloop.run.global_lora import GlobalLoRA
from fedloop.run.plan import RoundPlan
from fedloop.run.round import OpenRound, Played
from fedloop.run.spool import Spool
from loraprobe import Adapter, factor_delta
from loraprobe.adapters.deltas import add_delta
from loraprobe.adapters.layout import Layout, pack, unpack

from .screens import Kept, Screen


class Trainer:
    """One loaded model that plays every client, and remembers what it trained.

    Args:
        kept: the folder of updates.
    """

    def __init__(self, config: Config, kept: Path) -> None:
        quiet()
        torch.set_num_threads(1)
        self.model, self.tokenizer = load_adapted(config.model, config.lora, frozen_a=False)
        self.model.set_attn_implementation("eager")  # faster than the fused one at these sizes
        self.initial = read_adapter(self.model, config.model.name)
        self._layout = Layout.of(self.initial)
        self._text = Text.of(self.tokenizer)
        self._kept = kept
        kept.mkdir(parents=True, exist_ok=True)

    def update(
        self,
        examples: Sequence[Example],
        start: Adapter,
        training: LocalTraining,
        seed: int,
        bound: tuple[ProductLogit, float] | None = None,
    ) -> tuple[Adapter, float, float]:
        """What a client's training changes, kind "factor_delta"; its mean loss; its CPU-seconds.

        Args:
            bound: the probe that it hides from, and the logit that it keeps to.
        """
        key = self._key(examples, start, training, seed, bound)
        path = self._kept / f"{key}.safetensors"
        if path.is_file():
            found = load_file(path)
            vector, facts = found["update"], found["facts"].tolist()
        else:
            began = time.process_time()
            with hidden(self.model, start, *bound) if bound else nullcontext():
                losses = self._train(examples, start, training, seed)
            delta = factor_delta(read_adapter(self.model, start.base_model), start).load()
            vector = pack(delta, Layout(self._layout.slots, self._layout.scalings, delta.kind))[0]
            facts = [sum(losses) / len(losses), time.process_time() - began]
            part = path.with_suffix(f".{os.getpid()}")
            save_file({"update": vector, "facts": torch.tensor(facts)}, part)
            part.rename(path)
        layout = Layout(self._layout.slots, self._layout.scalings, "factor_delta")
        return unpack(vector, layout, base_model=start.base_model), facts[0], facts[1]

    def _train(
        self, examples: Sequence[Example], start: Adapter, training: LocalTraining, seed: int
    ) -> list[float]:
        write_adapter(self.model, start)
        ordered = in_training_order(examples, seed)
        count = training.steps * training.batch_size
        drawn = [ordered[index % len(ordered)] for index in range(count)]
        rows = [tokens_of(e, self.tokenizer, self._text, training.max_length) for e in drawn]
        size = training.batch_size
        losses, _ = train(
            self.model,
            [rows[at : at + size] for at in range(0, count, size)],
            length=training.max_length,
            pad=self.tokenizer.pad_token_id,
            lr=[training.lr] * training.steps,
            max_grad_norm=training.max_grad_norm,
        )
        return losses

    def _key(
        self,
        examples: Sequence[Example],
        start: Adapter,
        training: LocalTraining,
        seed: int,
        bound: tuple[ProductLogit, float] | None,
    ) -> str:
        vector = pack(start, Layout.of(start))[0]
        whole = hashlib.sha256(vector.numpy().tobytes())
        whole.update("\0".join(map(str, examples)).encode())
        whole.update(f"{training} {seed}".encode())
        if bound is not None:
            logit, most = bound
            whole.update(f"{logit.intercept} {most}".encode())
            whole.update(b"".join(block[3].numpy().tobytes() for block in logit.blocks.values()))
        return whole.hexdigest()[:32]


class Federation(GlobalLoRA):
    """The server's half, and clients that `Trainer` plays.

    Args:
        screen: of `paper_repro.federation.screens`; None for the defence alone.

    Attributes:
        kept: client -> whether the screen let it through, of every round that is over; {} where
            there is no screen, or the defence skipped the round.
        cpu: seconds that clients trained.
    """

    def __init__(self, trainer: Trainer, config: Config, screen: Screen | None = None) -> None:
        loaded = (trainer.model, trainer.tokenizer)
        defense = build_defense(config, trainer.initial, loaded=loaded)
        super().__init__(trainer.initial, defense, config)
        self._trainer = trainer
        self._screen = screen
        self.kept: list[Kept] = []
        self.cpu = 0.0

    def round(self, plan: RoundPlan, clients: Sequence[Client]) -> Played:
        """Play one round and make its result the global LoRA."""
        self.kept.append({})
        chosen = [clients[index] for index in plan.chosen]
        told = self.config.clients
        since = told.attack_from
        probe = self.defense.probe
        bound = None
        if told.evade_probe is not None and probe is not None:
            bound = (ProductLogit.of(probe), told.evade_probe)
        with OpenRound(self, plan, [client.client_id for client in chosen]) as arriving:
            for client, seed in zip(chosen, plan.seeds, strict=True):
                delta, loss, seconds = self._trainer.update(
                    client.held(plan.number, since),
                    self.lora,
                    plan.training,
                    seed,
                    bound if client.attacks(plan.number, since) else None,
                )
                self.cpu += seconds
                update = ClientUpdate(client.client_id, len(client.examples), delta)
                trained = Trained(update, loss, {"train": seconds, "evidence": 0.0}, 0)
                arriving.receive(client.client_id, trained)
            return arriving.close([c.client_id for c in chosen if c.attacks(plan.number, since)])

    def apply(self, assessment: Assessment, spool: Spool, plan: RoundPlan) -> None:
        """As the server does, of those whom the screen keeps."""
        if self._screen is None:
            super().apply(assessment, spool, plan)
            return
        kept = self._screen(assessment, self.lora)
        self.kept[-1] = kept
        if not any(kept.values()):
            raise AggregationError("the screen keeps nobody; the global LoRA stays")
        super().apply(_only(assessment, kept), spool, plan)

    def model_for_measuring(self) -> tuple[Any, Any]:
        """The model with the global LoRA on it, and its tokenizer."""
        write_adapter(self._trainer.model, self.lora)
        return self._trainer.model, self._trainer.tokenizer


def _only(assessment: Assessment, kept: Kept) -> Assessment:
    """The assessment without whom a screen drops."""
    return replace(
        assessment,
        accepted={c: update for c, update in assessment.accepted.items() if kept[c]},
        weights={c: w if kept[c] else 0.0 for c, w in assessment.weights.items() if c in kept},
    )


def reference_of(trainer: Trainer, examples: Sequence[Example], steps: int, lr: float) -> Adapter:
    """One harmful fine-tune from the initial adapter, kind "weights"."""
    training = LocalTraining(lr, steps, 8, 64)
    delta, _, _ = trainer.update(examples, trainer.initial, training, seed=1)
    return add_delta(trainer.initial, delta)
