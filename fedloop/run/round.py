"""The state of a federation between rounds, and one round of it.

Train, attack, assess, aggregate, apply.

`GlobalLoRA` is the server's half, the same for every engine; `Federation` adds clients that train
in this process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, Slot, pack, unpack

from ..client.client import ClientTrainer, Trained
from ..client.folding import FoldedBase, ResidualSum
from ..client.training import LocalTraining, write_adapter
from ..config import Config
from ..data.clients import Client
from ..defense.defense import Defense
from ..defense.types import RoundRecord
from ..errors import AggregationError
from ..rules.lora import exact_residual
from .attackers import attacked
from .server_state import GradientChange, ServerSide

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


_FLOAT_BYTES = 4


class GlobalLoRA:
    """The global LoRA and everything that decides how it moves: defence, rule, server optimiser.

    It knows no engine.

    Args:
        initial: the LoRA before the first round, kind "weights".
        base: takes the residuals of exact aggregation; if None they are summed and go nowhere.

    Attributes:
        lora: the global LoRA, kind "weights".
        initial: as given; where shadows start.
        defense: decides how much each update counts.
    """

    def __init__(
        self, initial: Adapter, defense: Defense, config: Config, base: ResidualSum | None = None
    ) -> None:
        self.lora, self.initial, self.defense = initial, initial, defense
        self._config = config
        self._layout = Layout.of(initial)
        self._base = ResidualSum() if base is None else base
        self._server = ServerSide(
            config.aggregation, self._layout, config.training.proximal, config.clients.count
        )
        self._rule = config.aggregation.make_rule()
        self._rule_state = self._rule.init()

    @property
    def residual(self) -> Mapping[str, Tensor]:
        """Module -> (d_out, d_in): what exact aggregation has added to the base so far."""
        return self._base.residual

    def asks(self, client: str) -> GradientChange:
        """What the server optimiser asks of this client's gradients in the coming round."""
        return self._server.asks(client)

    def finish(
        self,
        number: int,
        trained: Mapping[str, Trained],
        asked: Sequence[str],
        malicious: Sequence[str],
        training: LocalTraining,
        generator: np.random.Generator,
        refused: Mapping[str, str] | None = None,
    ) -> RoundRecord:
        """Weigh what the clients of a round sent and make the result the global LoRA.

        Args:
            trained: client -> what it sent, as far as it could be read.
            asked: every client of the round; one that is not in `trained` has factor 0.
            malicious: who plays the configured attack on updates, in an experiment.
            generator: of what attackers and randomised rules draw.
            refused: client -> why nothing of it could be read, or nothing came.
        """
        note = ""
        try:
            present = [client for client in malicious if client in trained]
            trained = attacked(
                trained, present, self._config.clients, self.defense, self.lora, generator
            )
        except AggregationError as error:
            # too few honest clients in this round to make it from: they send what they trained
            note = f"no update attack: {error}"
        record = self.defense.assess(
            number, [one.update for one in trained.values()], start=self.lora, expected=asked
        )
        record = replace(
            record, reasons=dict(sorted({**record.reasons, **(refused or {})}.items()))
        )
        began = time.perf_counter()
        if not record.skipped:
            try:
                self._apply(trained, record.weights, training, generator)
            except AggregationError as error:
                # a rule that finds no majority, or too few clients left: keep the global LoRA
                record, note = (
                    replace(record, skipped=True, weights={}),
                    f"{note}; skipped: {error}".removeprefix("; "),
                )
        aggregated = time.perf_counter() - began
        seconds = {
            phase: sum(one.seconds[phase] for one in trained.values())
            for phase in ("train", "evidence")
        }
        sent = {
            "update": _FLOAT_BYTES * self._layout.size * len(trained),
            "evidence": sum(one.evidence_bytes for one in trained.values()),
        }
        losses = {
            client: one.loss for client, one in trained.items() if math.isfinite(one.loss)
        }  # one that diverged is refused for its update
        return replace(
            record,
            losses=losses,
            bytes=sent,
            seconds={**seconds, **record.seconds, "aggregate": aggregated},
            note=note,
        )

    def _apply(
        self,
        trained: Mapping[str, Trained],
        weights: Mapping[str, float],
        training: LocalTraining,
        generator: np.random.Generator,
    ) -> None:
        """Aggregate the weighed deltas and move the global LoRA by what the server optimiser makes
        of them.
        """
        counted = [
            client for client in sorted(trained) if weights.get(client, 0) > 0
        ]  # a stable order: sums round alike
        deltas = torch.stack([pack(trained[client].delta)[0] for client in counted])  # (n, d)
        shares = torch.tensor([weights[client] for client in counted], dtype=torch.float64)
        delta, self._rule_state = self._rule.apply(
            self._rule_state,
            deltas,
            shares,
            clients=counted,
            rng=generator,
            sizes=[slot.size for slot in self._layout.slots],
        )
        moved = self._server.step(delta, counted, deltas, training)
        if self._config.aggregation.lora == "frozen_a":
            moved = torch.cat(
                [part * (slot.factor == "B") for slot, part in self._parts(moved)]
            )  # nobody moves A, whatever was sent
        vector, _ = pack(self.lora, self._layout)
        former = self.lora
        self.lora = unpack(
            (vector.double() + moved.double()).float(),
            self._layout,
            base_model=self.lora.base_model,
        )
        if self._config.aggregation.lora == "exact":
            self._fold(former, [trained[client].delta for client in counted], shares)

    def _parts(self, vector: Tensor) -> list[tuple[Slot, Tensor]]:
        return list(
            zip(
                self._layout.slots,
                torch.split(vector, [slot.size for slot in self._layout.slots]),
                strict=True,
            )
        )

    def _fold(self, former: Adapter, deltas: Sequence[Adapter], shares: Tensor) -> None:
        """Add to the base what averaging A and B apart loses of the average of their products."""
        residual = {
            module: exact_residual(
                [(pair.A + delta[module].A, pair.B + delta[module].B) for delta in deltas],
                shares,
                (self.lora[module].A, self.lora[module].B),
                scaling=pair.scaling,
            )
            for module, pair in former.items()
        }
        self._base.add(residual)

    def state_dict(self) -> dict[str, Any]:
        """What the next round needs beyond the configuration: plain data, arrays and tensors."""
        return {
            "lora": pack(self.lora, self._layout)[0],
            "defense": self.defense.state_dict(),
            "server": self._server.state_dict(),
            "rule": dict(self._rule_state),
            "residual": dict(self._base.residual),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            LayoutMismatch, StateError: it is the state of another model or experiment.
        """
        self.lora = unpack(state["lora"], self._layout, base_model=self.lora.base_model)
        self.defense.load_state_dict(state["defense"])
        self._server.load_state_dict(state["server"])
        # Before a rule had a state of its own, a checkpoint held FoolsGold's sums.
        former = {"history": state.get("history", {})}
        self._rule_state = state.get("rule", former if self._rule.init() else {})
        self._base.set(state["residual"])


class Federation(GlobalLoRA):
    """A global LoRA with a loaded model that plays all of its clients, one after the other, in
    this process.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        initial: Adapter,
        defense: Defense,
        config: Config,
    ) -> None:
        base = FoldedBase(model)
        super().__init__(initial, defense, config, base)
        self._model, self._tokenizer = model, tokenizer
        of = config.training
        self._trainer = ClientTrainer(
            model,
            tokenizer,
            initial,
            defense.level.evidence if defense.level else None,
            defense.probe.featurizer if defense.probe else None,
            LocalTraining(
                of.shadow_lr or of.lr, of.steps, of.batch_size, of.max_length, of.max_grad_norm
            ),
            of.shadow_examples,
            base.unfolded,
        )

    def round(
        self,
        number: int,
        clients: Sequence[Client],
        training: LocalTraining,
        seeds: Sequence[int],
        generator: np.random.Generator,
        after: Callable[[str, float], None],
    ) -> RoundRecord:
        """Play one round with these clients and make its result the global LoRA.

        Args:
            seeds: one a client, of its order of examples and of dropout.
            generator: of what attackers and randomised rules draw.
            after: called with a client's id and its mean loss once it has trained.
        """
        ids = [client.client_id for client in clients]
        wanted = self.defense.wanted(ids)
        trained = {}
        for client, seed in zip(clients, seeds, strict=True):
            adjust = self._server.adjustment(self._model, self.lora, client.client_id)
            one = self._trainer.train(
                client.client_id,
                client.examples,
                self.lora,
                training,
                seed,
                wanted=client.client_id in wanted,
                adjust=adjust,
            )
            trained[client.client_id] = one
            after(client.client_id, one.loss)
        malicious = [client.client_id for client in clients if client.role == "malicious"]
        return self.finish(number, trained, ids, malicious, training, generator)

    def model_for_measuring(self) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The model with the global LoRA on it."""
        write_adapter(self._model, self.lora)
        return self._model, self._tokenizer
