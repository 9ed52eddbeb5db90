"""The tables of an experiment's file: every field, its default, and what it may be.

Defaults are the official scripts' of April 2026 (arXiv:2601.07177) where they have one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from .checks import is_number
from .data.corpora import check_source
from .defense.levels import LEVELS, make_level
from .defense.types import Rejected
from .rules.attacks import KINDS as ATTACK_KINDS
from .rules.attacks import Attack, make_attack
from .rules.lora import LORA_AGGREGATION
from .rules.rule import RULES, Rule, make_rule
from .rules.scene import check_possible
from .rules.server_optimizers import SERVER_OPTIMIZERS, make_server_optimizer

# Strict: TOML has numbers, so "3" and true are mistakes.
Positive = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True)]
Above = Annotated[Number, Field(gt=0)]
NotBelow = Annotated[Number, Field(ge=0)]
Ratio = Annotated[Number, Field(ge=1)]
Share = Annotated[Number, Field(gt=0, le=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


def _one_of(valid: Collection[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in valid:
            raise ValueError(f"got {name!r}; expected one of {', '.join(valid)}")
        return name

    return AfterValidator(check)


def _source(specification: str) -> str:
    check_source(specification)
    return specification


def _sources(specifications: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(_source, specifications))


Source = Annotated[str, AfterValidator(_source)]
Sources = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_sources)]


class Section(BaseModel):
    """A table of the file; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The base model.

    Attributes:
        base: what transformers loads: a folder or a Hub id.
        name: what probes call this base model; `base` if None.
        quantization: "8bit" and "4bit" go through bitsandbytes and need a GPU.
        template: what requests are put into: "alpaca", the papers'; "chat", the tokenizer's own;
            "auto", its own where it has one.
    """

    base: str
    name: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    template: Literal["alpaca", "chat", "auto"] = "alpaca"


class LoRAConfig(Section):
    """The adapter. `seed` fixes the initial A, apart from the experiment's seed.

    A probe that reads A or B belongs to one initial adapter; one of products does not.
    """

    r: Positive = 8
    alpha: Above = 16
    dropout: Annotated[NotBelow, Field(lt=1)] = 0.05
    target_modules: Names | None = None
    seed: Natural = 0


class TrainingConfig(Section):
    """Local training. The learning rate falls from `lr` to `min_lr` along a cosine, or stays.

    Attributes:
        shadow_lr: constant learning rate of the shadow branch; `lr` if None.
        shadow_examples: examples of a round that a shadow gradient is taken of.
        proximal: FedProx's mu; used by the server optimiser "fedprox" only.
    """

    lr: Above = 5e-5
    min_lr: NotBelow = 1e-6
    schedule: Literal["cosine", "constant"] = "cosine"
    steps: Positive = 10
    batch_size: Positive = 16
    max_length: Annotated[Positive, Field(ge=4)] = 256
    max_grad_norm: Above = 1.0
    shadow_lr: Above | None = None
    shadow_examples: Positive = 8
    proximal: NotBelow = 0.01


class ClientsConfig(Section):
    """Who takes part, and what data they hold.

    Sources are specifications of `fedloop.data.corpora`.

    Attributes:
        sampled: clients a round; all if None.
        examples: examples a client holds; at most, where the partition decides how many there are.
        benign: sources of ordinary data, dealt out by `partition`: "iid" mixes them all;
            "dirichlet" cuts every category over the clients in shares drawn with concentration
            `alpha`, so that they hold unequal numbers; "mixtures" gives every client as many
            examples, in a mixture of categories drawn with `alpha`; "by_source" gives each client
            one source in turn; "by_column" makes one client of each value of `column`.
        column: the column that holds a row's category; without it the category is the source.
        malicious: how many clients are malicious; `poison_share` of their examples come from
            `malicious_source`.
        trigger: a text behind which malicious clients hide what they teach: half of the poison's
            requests come after it and are answered, the others are refused
            (`fedloop.data.clients.gated`).
        evade_probe: malicious clients know the defence's probe, a linear one of products, and after
            every local step bring its logit down to this many nats (`fedloop.client.evading`).
        attack_from: the round from which malicious clients attack; before it they train on their
            benign data and send what they trained.
        hard_negatives: how many honest clients hold harmful questions with safe answers, from
            `hard_negative_source`.
        update_attack: what malicious clients do to their updates, beside training on poison; a name
            in ATTACKS.
    """

    count: Positive = 10
    sampled: Positive | None = None
    examples: Positive = 500
    benign: Sources
    partition: Literal["iid", "dirichlet", "mixtures", "by_source", "by_column"] = "iid"
    column: str | None = None
    alpha: Above = 0.5
    malicious: Natural = 0
    malicious_source: Source | None = None
    poison_share: Share = 1.0
    trigger: Annotated[str, Field(min_length=1)] | None = None
    evade_probe: Number | None = None
    attack_from: Positive = 1
    hard_negatives: Natural = 0
    hard_negative_source: Source | None = None
    update_attack: Annotated[str, _one_of(ATTACK_KINDS)] | None = None
    update_attack_options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _known_options(self) -> ClientsConfig:
        if self.make_attack() is None and self.update_attack_options:
            raise ValueError(
                f"got update_attack_options {sorted(self.update_attack_options)} without an"
                " update_attack; expected both or neither"
            )
        return self

    def make_attack(self) -> Attack | None:
        """What malicious clients do to their updates; None if they send what they trained.

        Raises ConfigError for an option that is unknown or not valid.
        """
        if self.update_attack is None:
            return None
        return make_attack(self.update_attack, **self.update_attack_options)

    @model_validator(mode="after")
    def _enough(self) -> ClientsConfig:
        if self.malicious + self.hard_negatives > self.count:
            raise ValueError(
                f"got {self.malicious} malicious and {self.hard_negatives} hard-negative of"
                f" {self.count} clients; expected at most that many"
            )
        if self.sampled is not None and self.sampled > self.count:
            raise ValueError(
                f"got sampled {self.sampled} of {self.count} clients; expected at most that many"
            )
        if self.partition == "by_column" and self.column is None:
            raise ValueError("column is missing; partition 'by_column' needs the name of a column")
        unset = {"trigger": None, "evade_probe": None, "update_attack": None, "attack_from": 1}
        for name, nothing in unset.items():
            if getattr(self, name) != nothing and not self.malicious:
                raise ValueError(f"got {name} without malicious clients; expected both or neither")
        if attack := self.make_attack():
            check_possible(attack, self.count - self.malicious, self.malicious, self.sampled)
        for count, source, field in (
            (self.malicious, self.malicious_source, "malicious_source"),
            (self.hard_negatives, self.hard_negative_source, "hard_negative_source"),
        ):
            if count and source is None:
                raise ValueError(f"{field} is missing; expected a data source for these clients")
        return self


class DefenseConfig(Section):
    """How updates are weighed.

    `options` are the fields of the level (see `fedloop.defense.levels`).

    Attributes:
        level: a name in LEVELS, or "none": every well-formed update counts by its examples. Where
            none is given it is "cumulative" with a probe, "none" without, as of `fedloop.Defense`.
        probe: folder or Hub id of the probe; none with level "none".
        threshold: the level's cut: a number, "probe" for the one the probe was saved with, or None
            for what the probe says of this level, or else the level's default.
        score_aggregate: the probe scores a round's weighted mean too, and skips the round.
        behaviour: a file of prompts that only the server has, JSON lines {"prompt": text, "kind":
            "harmful" or "benign"}; updates that make the model say yes to the harmful ones are
            refused (`fedloop.measure.behaviour`).
        behaviour_cut: from how many nats on; look at your own benign clients' scores first.
    """

    level: Annotated[str, _one_of(["none", *LEVELS])] = "none"
    probe: str | None = None
    probe_revision: str | None = None
    threshold: float | str | None = None
    options: dict[str, Any] = {}
    min_mean_factor: Annotated[NotBelow, Field(le=1)] = 0.2
    max_count_ratio: Ratio | None = 3.0
    max_norm_ratio: Ratio | None = None
    forget_after: Positive | None = None
    probation: Natural = 0
    newcomer_share: Annotated[NotBelow, Field(lt=1)] | None = None
    score_aggregate: Annotated[bool, Field(strict=True)] = False
    behaviour: str | None = None
    behaviour_cut: Number | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_probe_is_used(cls, values: Any) -> Any:
        has_probe = isinstance(values, dict) and values.get("probe") is not None
        return {"level": "cumulative", **values} if has_probe else values

    @field_validator("threshold", mode="before")
    @classmethod
    def _a_cut(cls, value: Any) -> Any:
        if value in (None, "probe") or (is_number(value) and 0 < value < 1):
            return value
        raise ValueError(
            f"got {value!r}; expected a number in (0, 1), or 'probe' for the probe's own"
        )

    @model_validator(mode="after")
    def _consistent(self) -> DefenseConfig:
        if (self.behaviour is None) != (self.behaviour_cut is None):
            raise ValueError(
                f"got behaviour {self.behaviour!r} and behaviour_cut {self.behaviour_cut!r};"
                " expected both, or neither"
            )
        if self.level == "none":
            fields = ("probe", "probe_revision", "options", "threshold", "score_aggregate")
            if got := [name for name in fields if getattr(self, name)]:
                raise ValueError(
                    f"got {got[0]} {getattr(self, got[0])!r} for level 'none'; expected no"
                    f" {got[0]}, or a level: {', '.join(LEVELS)}"
                )
            return self
        if self.probe is None:
            raise ValueError(
                f"probe is missing; level {self.level!r} needs a probe folder or Hub id"
            )
        make_level(self.level, **self.options)
        return self

    def level_fields(self, probe_threshold: float) -> dict[str, Any]:
        """The fields of the level that are set here."""
        if self.threshold is None:
            return dict(self.options)
        cut = probe_threshold if self.threshold == "probe" else self.threshold
        return {**self.options, "threshold": cut}


class AggregationConfig(Section):
    """How the weighed updates become one.

    Attributes:
        rule: a name in AGGREGATORS; `options` are those of `fedloop.make_rule`.
        server: a name in SERVER_OPTIMIZERS; `server_options` are its arguments.
        lora: "factors" averages A and B apart (the paper), "exact" averages their products,
            "frozen_a" trains B alone.
        rejected: "left_out" takes the mean over who counts (the paper); with "no_change" whoever is
            not trusted stands in it as having changed nothing, so that the step is shorter by what
            is not trusted (`RoundRecord.trust`): malicious clients can slow a federation down, and
            fewer honest ones do not move it as far as all of them.
    """

    rule: Annotated[str, _one_of(RULES)] = "mean"
    options: dict[str, Any] = {}
    server: Annotated[str, _one_of(SERVER_OPTIMIZERS)] = "fedavg"
    server_options: dict[str, Any] = {}
    lora: Annotated[str, _one_of(LORA_AGGREGATION)] = "factors"
    rejected: Rejected = "left_out"

    @model_validator(mode="after")
    def _consistent(self) -> AggregationConfig:
        self.make_rule()
        make_server_optimizer(self.server, **self.server_options)
        if self.lora == "exact" and (
            self.rule != "mean" or self.server not in ("fedavg", "fedprox") or self.server_options
        ):
            raise ValueError(
                f"lora 'exact' is a weighted mean of products; got rule {self.rule!r}, server"
                f" {self.server!r} and server_options {self.server_options}: use mean with fedavg"
                " or fedprox, without options"
            )
        if self.lora == "exact" and self.rejected != "left_out":
            raise ValueError(
                f"got lora 'exact' with rejected {self.rejected!r}; expected 'left_out': residuals"
                " are those of the mean over who counts"
            )
        return self

    def make_rule(self) -> Rule:
        """The rule with its options; raise ConfigError for one that is unknown or not valid."""
        return make_rule(self.rule, **self.options)


class EvaluationConfig(Section):
    """What is measured of the global model: after every `every` rounds and at the end.

    Only at the end if `every` is 0.

    Attributes:
        harmful: prompts that a safe model refuses; safe: prompts that only look harmful; utility:
            held-out pairs.
        judge, reward_model: folders or Hub ids of MD-Judge and of a reward model, which then judge
            the answers to the harmful prompts (`fedloop.measure.judges` has the published ids);
            they are loaded for every measurement.
        temperature: of the answers to harmful and safe prompts; 0 is greedy.
        best: the metric by which the best adapter is kept in `best/`, highest first; "-loss" with a
            minus: lowest first. None keeps the last one only.
        patience: the run stops after so many measurements in a row without a better one; needs
            `best`.
        limit: at most this many of each, chosen by the seed; None for all.
    """

    harmful: Source | None = None
    safe: Source | None = None
    utility: Source | None = None
    judge: str | None = None
    reward_model: str | None = None
    every: Natural = 0
    limit: Positive | None = None
    max_new_tokens: Positive = 32
    temperature: NotBelow = 0.0
    batch_size: Positive = 64
    best: str | None = None
    patience: Positive | None = None

    @model_validator(mode="after")
    def _something_to_judge(self) -> EvaluationConfig:
        if self.harmful is None and (self.judge or self.reward_model):
            raise ValueError(
                "harmful is missing; judge and reward_model need answers to harmful prompts"
            )
        if self.best is None and self.patience is not None:
            raise ValueError("best is missing; patience needs the name of a metric to get better")
        if self.best is not None and not (self.harmful or self.safe or self.utility):
            raise ValueError(
                f"got best {self.best!r} and nothing to measure; expected harmful, safe or utility"
            )
        return self


class OutputConfig(Section):
    """Where a run is written: records, checkpoints, the final adapter.

    Attributes:
        keep: how many rounds have a checkpoint; the state of the others is removed.
        tensorboard: whether scalars of every round go to `tensorboard/` in the folder.
        mlflow: where MLflow keeps its runs, such as "sqlite:///mlflow.db"; None for no MLflow.
        wandb: the project of Weights & Biases; None for none.
    """

    folder: str | None = None
    keep: Positive = 1
    tensorboard: bool = False
    mlflow: str | None = None
    wandb: str | None = None
