"""One client's work in one round.

Train from the global LoRA, and make the evidence that the level asks for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.pair import Factor
from loraprobe.featurizer import Featurizer

from ..data.examples import Example
from ..defense.levels import LOCAL_STEPS, SHADOW_GRADIENT, SHADOW_STEPS
from ..defense.types import ClientUpdate
from .training import LocalTraining, in_training_order, local_steps, shadow_gradient

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Trained:
    """What came out of one client's round.

    Attributes:
        update: the change of the LoRA since the round's global one, kind "factor_delta", and the
            evidence.
        loss: the mean over the local steps.
        seconds: "train", and "evidence" for what the level needs beyond it.
        evidence_bytes: size of the evidence as float32 of what the probe reads.
    """

    update: ClientUpdate
    loss: float
    seconds: dict[str, float]
    evidence_bytes: int

    @property
    def delta(self) -> Adapter:
        """The change, which is what is screened and what is summed."""
        return self.update.adapter


@dataclass(frozen=True)
class ClientTrainer:
    """A loaded model that plays one client after the other.

    Attributes:
        initial: the federation's fixed initial LoRA, where shadows start.
        evidence: what the level reads (`fedloop.defense.levels`), None without a defence.
        featurizer: the probe's: which modules evidence has to hold.
        shadow: how the shadow branch trains.
        shadow_examples: examples of the round that a shadow gradient is taken of.
        unfolded: a context in which the base model is as it was before any residual was folded into
            it.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    initial: Adapter
    evidence: str | None
    featurizer: Featurizer | None
    shadow: LocalTraining
    shadow_examples: int
    unfolded: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)

    def train(
        self,
        client_id: str,
        examples: Sequence[Example],
        start: Adapter,
        training: LocalTraining,
        seed: int,
        *,
        wanted: bool,
        adjust: Callable[[list[torch.nn.Parameter]], None] | None = None,
    ) -> Trained:
        """Train one client and bring the evidence, if it is wanted of it.

        Args:
            start: the round's global LoRA.
            seed: of the order of the examples and of dropout; the shadow branch repeats the same
                batches.
        """
        began = time.perf_counter()
        losses: list[float] = []
        num_examples = 0
        steps: list[Adapter] = []
        for step in local_steps(
            self.model, self.tokenizer, examples, start, training, seed, adjust
        ):
            if wanted and self.evidence == LOCAL_STEPS:
                steps.append(self._probed(step.delta))
            losses.append(step.loss)
            num_examples += step.num_examples
        trained = time.perf_counter()
        if wanted and self.evidence in (SHADOW_STEPS, SHADOW_GRADIENT):
            steps = self._shadows(examples, training, seed)
        done = time.perf_counter()
        return Trained(
            ClientUpdate(client_id, num_examples, step.delta, tuple(steps)),
            sum(losses) / len(losses),
            {"train": trained - began, "evidence": done - trained},
            sum(self._probed_bytes(step) for step in steps),
        )

    def _shadows(
        self, examples: Sequence[Example], training: LocalTraining, seed: int
    ) -> list[Adapter]:
        """The steps, or the one gradient, of the shadow branch from the initial LoRA."""
        with self.unfolded():
            if self.evidence == SHADOW_STEPS:
                shadow = replace(self.shadow, steps=training.steps)
                branch = local_steps(
                    self.model, self.tokenizer, examples, self.initial, shadow, seed
                )
                return [self._probed(step.delta) for step in branch]
            few = in_training_order(examples, seed)[: self.shadow_examples]
            gradient = shadow_gradient(self.model, self.tokenizer, few, self.initial, self.shadow)
            return [self._probed(gradient)]

    def _probed(self, delta: Adapter) -> Adapter:
        """The modules of a delta that the probe reads."""
        modules = (
            delta
            if self.featurizer is None or self.featurizer.recipe.any_modules
            else self.featurizer.layout.scalings
        )
        return Adapter(
            {module: delta[module] for module in modules},
            kind=delta.kind,
            base_model=delta.base_model,
        )

    def _probed_bytes(self, delta: Adapter) -> int:
        factors: tuple[Factor, ...] = ("A", "B")
        if self.featurizer is not None:
            factors = self.featurizer.recipe.factors
        return _FLOAT_BYTES * sum(
            pair.shape_of(factor)[0] * pair.shape_of(factor)[1]
            for pair in delta.values()
            for factor in factors
        )
