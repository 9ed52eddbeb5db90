"""A federation whose clients all train in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from loraprobe.adapters.adapter import Adapter

from ..client.client import ClientTrainer, Trained
from ..client.evading import ProductLogit, hidden
from ..client.folding import FoldedBase
from ..client.training import LocalTraining, write_adapter
from ..config import Config
from ..data.clients import Client
from ..defense.defense import Defense
from .global_lora import GlobalLoRA
from .identity import base_digest
from .plan import RoundPlan
from .round import OpenRound, Played

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


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
        folder: Path | None = None,
    ) -> None:
        base = FoldedBase(model)
        super().__init__(initial, defense, config, base, folder, base_digest(model))
        self._model = model
        self._tokenizer = tokenizer
        self._trainer = ClientTrainer(
            model,
            tokenizer,
            initial,
            defense.level.evidence if defense.level else None,
            defense.probe.featurizer if defense.probe else None,
            LocalTraining.of_shadows(config.training),
            config.training.shadow_examples,
            base.unfolded,
        )

    def round(
        self,
        plan: RoundPlan,
        clients: Sequence[Client],
        after: Callable[[str, float], None] = lambda client, loss: None,
    ) -> Played:
        """Play one round and make its result the global LoRA.

        Args:
            clients: of the whole federation; the plan chooses.
            after: called with a client's id and its mean loss once it has trained.
        """
        chosen = [clients[index] for index in plan.chosen]
        since = self.config.clients.attack_from
        malicious = [c.client_id for c in chosen if c.attacks(plan.number, since)]
        with OpenRound(self, plan, [client.client_id for client in chosen]) as arriving:
            for trained in self.train(plan, chosen):
                arriving.receive(trained.update.client_id, trained)
                after(trained.update.client_id, trained.loss)
            return arriving.close(malicious)

    def train(self, plan: RoundPlan, chosen: Sequence[Client]) -> Iterator[Trained]:
        """What these clients' training gives, one after the other."""
        wanted = self.defense.wanted([client.client_id for client in chosen])
        since = self.config.clients.attack_from
        for client, seed in zip(chosen, plan.seeds, strict=True):
            adjust = self._server.adjustment(self._model, self.lora, client.client_id)
            with self._hidden() if client.attacks(plan.number, since) else nullcontext():
                trained = self._trainer.train(
                    client.client_id,
                    client.held(plan.number, since),
                    self.lora,
                    plan.training,
                    seed,
                    wanted=client.client_id in wanted,
                    adjust=adjust,
                )
            yield trained

    def _hidden(self) -> AbstractContextManager[None]:
        """In which a client that attacks trains, if it is to evade the defence's probe."""
        bound, probe = self.config.clients.evade_probe, self.defense.probe
        if bound is None or probe is None:
            return nullcontext()
        return hidden(self._model, self.lora, ProductLogit.of(probe), bound)

    def model_for_measuring(self) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The model with the global LoRA on it."""
        write_adapter(self._model, self.lora)
        return self._model, self._tokenizer
