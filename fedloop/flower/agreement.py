"""What server and clients have to agree on before the first round.

The LoRA, its layout, and the form of the evidence.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout
from loraprobe.adapters.pair import Factor

from ..client.training import LocalTraining
from ..config import Config
from ..defense.levels import LOCAL_STEPS, SHADOW_GRADIENT, SHADOW_STEPS
from ..errors import MessageError
from ..run.global_lora import GlobalLoRA
from ..sections import LoRAConfig, ModelConfig

_SHADOWS = (SHADOW_STEPS, SHADOW_GRADIENT)


@dataclass(frozen=True)
class Agreement:
    """The same in every round of a run.

    It is sent with every task, so that a client may join at any time.

    Attributes:
        base_model: what the server calls the base model.
        layout: of an update, kind "factor_delta".
        evidence: what the level reads of a client beside its update (`fedloop.defense.levels`);
            None if nothing.
        modules, factors: which matrices of a step the probe reads, and nothing else is sent.
        shadow: how the shadow branch trains, but for its steps.
        shadow_examples: examples of a round that a shadow gradient is taken of.
        wire: the type of all arrays: "float32" or "float16".
    """

    model: ModelConfig
    lora: LoRAConfig
    frozen_a: bool
    base_model: str | None
    layout: Layout
    evidence: str | None
    modules: tuple[str, ...]
    factors: tuple[Factor, ...]
    shadow: LocalTraining
    shadow_examples: int
    wire: str

    @classmethod
    def of(cls, config: Config, federation: GlobalLoRA, wire: str) -> Agreement:
        """What this experiment's clients have to know, and no more.

        Neither roles nor thresholds.
        """
        level = federation.defense.level
        probe = federation.defense.probe
        sent = level is not None and level.evidence in (LOCAL_STEPS, *_SHADOWS)
        read = probe.featurizer if probe is not None and sent else None
        layout = Layout.of(federation.initial)
        modules = tuple(
            layout.scalings if read is None or read.recipe.any_modules else read.layout.scalings
        )
        return cls(
            config.model,
            config.lora,
            config.aggregation.lora == "frozen_a",
            federation.lora.base_model,
            Layout(layout.slots, layout.scalings, "factor_delta"),
            level.evidence if level is not None and sent else None,
            modules,
            read.recipe.factors if read else ("A", "B"),
            LocalTraining.of_shadows(config.training),
            config.training.shadow_examples,
            wire,
        )

    @property
    def weights(self) -> Layout:
        """The layout of the global LoRA."""
        return Layout(self.layout.slots, self.layout.scalings, "weights")

    @property
    def step(self) -> Layout:
        """The layout of one step of evidence: only the matrices that the probe reads."""
        slots = tuple(
            slot
            for slot in self.layout.slots
            if slot.module in self.modules and slot.factor in self.factors
        )
        return Layout(
            slots,
            {slot.module: self.layout.scalings[slot.module] for slot in slots},
            "factor_delta",
        )

    @property
    def shadows(self) -> bool:
        """Whether clients need the initial LoRA to make their evidence."""
        return self.evidence in _SHADOWS

    def steps(self, training: LocalTraining) -> int:
        """How many steps of evidence a client that is asked for it sends."""
        if self.evidence is None:
            return 0
        return 1 if self.evidence == SHADOW_GRADIENT else training.steps

    def to_json(self) -> str:
        """As one line."""
        plain = {
            **self.__dict__,
            "model": self.model.model_dump(mode="json"),
            "lora": self.lora.model_dump(mode="json"),
        }
        return json.dumps(
            {**plain, "layout": self.layout.to_dict(), "shadow": asdict(self.shadow)},
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> Agreement:
        """The inverse of `to_json`.

        Raises:
            MessageError: it is not an agreement of this version of fedloop.
        """
        try:
            plain = json.loads(text)
            changed = {
                "model": ModelConfig.model_validate(plain["model"]),
                "lora": LoRAConfig.model_validate(plain["lora"]),
                "layout": Layout.from_dict(plain["layout"]),
                "shadow": LocalTraining(**plain["shadow"]),
                "modules": tuple(plain["modules"]),
                "factors": tuple(plain["factors"]),
            }
            return cls(**{**plain, **changed})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MessageError(
                f"got no agreement that this version of fedloop can read: {error!r}. Install the"
                " server's version."
            ) from None

    def check_layout(self, adapter: Adapter) -> None:
        """Whether the LoRA that this client has put on its base model has the server's layout.

        Raises:
            LayoutMismatch, MessageError: another base model, or another version of peft.
        """
        self.weights.check(adapter)
        if len(adapter) != len(self.layout.scalings):
            raise MessageError(
                f"{len(adapter)} modules of this base model are adapted; the server adapts"
                f" {len(self.layout.scalings)} of its own"
            )
