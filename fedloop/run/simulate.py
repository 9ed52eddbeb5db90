"""One process, a whole federation.

Sample clients, train them, weigh their updates, average, measure, save.

    result = simulate("experiment.toml")

Everything random follows from the experiment's seed, the round and the client's number, never from
what ran before, so that a run that was killed and resumed ends bit for bit where an uninterrupted
one does (on the same machine, with the same number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta
from loraprobe.adapters.layout import Layout
from loraprobe.adapters.load import save_adapter
from loraprobe.errors import LoraprobeError
from loraprobe.probe import Probe

from ..client.training import LocalTraining, LoRASettings, attach_lora, load_base, read_adapter
from ..config import ClientsConfig, Config, LoRAConfig, ModelConfig, TrainingConfig
from ..data.clients import Client, Group, Role, make_clients
from ..data.corpora import load_corpus
from ..data.examples import Example
from ..data.partition import by_column, dirichlet, iid, mixtures
from ..defense.defense import Defense
from ..defense.types import RoundRecord
from ..errors import ConfigError, StateError
from ..measure.measurement import Measurement
from .attackers import probe_direction
from .folder import RunFolder, read_config
from .round import Federation, GlobalLoRA

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

Watch = Callable[[str, int, str, float], None]
"""Called as watch("client", round, client id, mean loss) after every client and watch("round",
round, "", mean factor) after every round.
"""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        adapter: the final global LoRA.
        metrics: of the final global model.
        roles: client -> role, source and poison share; for reading the records, the defence never
            saw it.
        folder: where it was written, if anywhere.
    """

    config: Config
    records: tuple[RoundRecord, ...]
    adapter: Adapter
    metrics: Mapping[str, float]
    roles: Mapping[str, Mapping[str, Any]]
    folder: Path | None


def simulate(
    config: Config | Mapping[str, Any] | str | Path, *, watch: Watch | None = None
) -> RunResult:
    """Run an experiment in this process, or go on with it if its output folder holds a part of it.

    Args:
        config: a Config, a nested dict of its fields, or the path of a TOML file.

    Raises:
        ConfigError: a field is wrong, or two that do not fit together.
        DataError, MissingExtra, ProbeFormatError, HubError: model, data or probe cannot be loaded.
        StateError: the output folder holds another experiment or a damaged one.
    """
    if not isinstance(config, Config):
        config = Config.read(config) if isinstance(config, str | Path) else Config.of(config)
    clients = build_clients(config)
    folder = (
        RunFolder.create(Path(config.output.folder), config, roles_of(clients))
        if config.output.folder
        else None
    )
    federation = build_federation(config)
    with Run(config, federation, folder, watch, federation.model_for_measuring) as run:
        for number in run.ahead():
            run.finish(_round(federation, config, clients, number, watch))
    return run.result(roles_of(clients))


class Run:
    """What a run has done so far: in memory, in its folder, and for whoever watches.

    Engines play rounds; this finishes them.

    Args:
        federation: set to the state after the last finished round, if the folder holds one.
        model: the model with the global LoRA on it, for measuring; None if nothing is measured.

    Raises:
        DataError, MissingExtra: what the evaluation names cannot be had.
        StateError: the folder is damaged.
    """

    def __init__(
        self,
        config: Config,
        federation: GlobalLoRA,
        folder: RunFolder | None,
        watch: Watch | None = None,
        model: Callable[[], tuple[PeftModel, PreTrainedTokenizerBase]] | None = None,
    ) -> None:
        self._config, self._federation, self._folder, self._watch, self._model = (
            config,
            federation,
            folder,
            watch,
            model,
        )
        self._measure = Measurement.of(config.evaluation, config.seed, config.training.max_length)
        state, self.records = folder.load() if folder else (None, [])
        if state is not None:
            federation.load_state_dict(state)
        elif folder:
            save_adapter(federation.lora, folder.path / "initial")
        self._board = _Board(
            folder.path if folder and config.output.tensorboard else None, self.records
        )

    def ahead(self) -> range:
        """The numbers of the rounds that are still to be played."""
        return range(len(self.records) + 1, self._config.rounds + 1)

    def finish(self, record: RoundRecord) -> None:
        """Measure the global model if it is time to, save the round, and tell who watches."""
        of, number = self._config.evaluation, record.round
        if (
            self._measure
            and self._model
            and (number == self._config.rounds or (of.every and number % of.every == 0))
        ):
            began = time.perf_counter()
            record = replace(record, metrics=self._measure(*self._model()))
            record = replace(
                record, seconds={**record.seconds, "evaluate": time.perf_counter() - began}
            )
        self.records.append(record)
        if self._folder:
            self._folder.save(record, self._federation.state_dict())
        self._board.write(record)
        if self._watch:
            self._watch("round", number, "", sum(record.factors.values()) / len(record.factors))

    def result(self, roles: Mapping[str, Mapping[str, Any]]) -> RunResult:
        """What the run leaves, once every round is finished; writes the final adapter."""
        if self._folder:
            save_adapter(self._federation.lora, self._folder.path / "adapter")
        folder = self._folder.path if self._folder else None
        return RunResult(
            self._config,
            tuple(self.records),
            self._federation.lora,
            self.records[-1].metrics,
            roles,
            folder,
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._board.close()


def resume(folder: str | Path, *, watch: Watch | None = None) -> RunResult:
    """Go on with a run from its folder alone, wherever that folder is now.

    Raises:
        StateError: it is not the folder of a run. Otherwise as `simulate`.
    """
    config = read_config(Path(folder))
    return simulate(
        config.model_copy(
            update={"output": config.output.model_copy(update={"folder": str(folder)})}
        ),
        watch=watch,
    )


def global_model(folder: str | Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The model as a run's last finished round left it, LoRA and folded residuals included, with
    its tokenizer.

    Raises:
        StateError: it is not the folder of a run, or no round of it is finished.
    """
    config = read_config(Path(folder))
    state, _ = RunFolder(Path(folder)).load()
    if state is None:
        raise StateError(f"{folder} has no finished round; expected at least one")
    federation = build_federation(config)
    federation.load_state_dict(state)
    return federation.model_for_measuring()


def roles_of(clients: Sequence[Client]) -> dict[str, dict[str, Any]]:
    """Client -> what reports say of it."""
    return {
        client.client_id: {"role": client.role, "source": client.source, "share": client.share}
        for client in clients
    }


def build_clients(config: Config) -> list[Client]:
    """Every client with its examples; loads the sources that the configuration names.

    Raises:
        ConfigError, DataError, MissingExtra: a source cannot be had, or is too small for these
            clients.
    """
    of, rng = config.clients, np.random.default_rng([config.seed, 0])
    parts, names = _benign_parts(of, rng)
    roles: tuple[tuple[Role, int, str | None, float], ...] = (
        ("malicious", of.malicious, of.malicious_source, of.poison_share),
        ("hard_negative", of.hard_negatives, of.hard_negative_source, 1.0),
    )
    groups = [
        Group(role, count, str(source), load_corpus(str(source)).examples, share)
        for role, count, source, share in roles
        if count
    ]
    clients = make_clients(parts, groups, rng)
    return [
        replace(client, source=name) if client.role == "benign" else client
        for client, name in zip(clients, names, strict=True)
    ]


def _benign_parts(
    of: ClientsConfig, rng: np.random.Generator
) -> tuple[list[tuple[Example, ...]], list[str]]:
    """The benign examples of every client, and what they are called."""
    loaded = {source: load_corpus(source, category=of.column) for source in of.benign}
    if of.partition == "by_source":
        turns = [of.benign[index % len(of.benign)] for index in range(of.count)]
        cut = {
            source: iter(iid(loaded[source].examples, turns.count(source), rng, size=of.examples))
            for source in dict.fromkeys(turns)
        }
        return [next(cut[source]) for source in turns], turns
    examples = [example for one in loaded.values() for example in one.examples]
    labels = [
        label
        for source, one in loaded.items()
        for label in one.categories or [source] * len(one.examples)
    ]
    if of.partition == "by_column":
        by_value = by_column(examples, labels)
        if len(by_value) != of.count:
            raise ConfigError(
                f"clients.count: got {of.count}; expected {len(by_value)}, the number of values of"
                f" column {of.column!r}"
            )
        return [part[: of.examples] for part in by_value.values()], list(by_value)
    names = ["+".join(of.benign)] * of.count
    if of.partition == "dirichlet":
        parts = dirichlet(examples, labels, of.count, of.alpha, rng)
        return [part[: of.examples] for part in parts], names
    if of.partition == "mixtures":
        return mixtures(examples, labels, of.count, of.alpha, rng, size=of.examples), names
    return iid(examples, of.count, rng, size=of.examples), names


def build_federation(config: Config) -> Federation:
    """Model, initial LoRA, probe and defence of an experiment, before its first round.

    Raises:
        ConfigError: the base model is not the one the probe was made for.
    """
    model, tokenizer = load_adapted(
        config.model, config.lora, frozen_a=config.aggregation.lora == "frozen_a"
    )
    initial = read_adapter(model, config.model.name or config.model.base)
    return Federation(model, tokenizer, initial, build_defense(config, initial), config)


def load_adapted(
    of: ModelConfig, lora: LoRAConfig, *, frozen_a: bool
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model with a fresh LoRA on it, and its tokenizer.

    Raises:
        DataError, MissingExtra: it cannot be loaded.
    """
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[
        of.dtype
    ]
    base, tokenizer = load_base(
        of.base,
        dtype=dtype,
        revision=of.revision,
        quantization=of.quantization,
        template=of.template,
    )
    settings = LoRASettings(lora.r, lora.alpha, lora.dropout, lora.target_modules)
    return attach_lora(base, settings, lora.seed, frozen_a=frozen_a), tokenizer


def build_defense(config: Config, initial: Adapter) -> Defense:
    """The defence that the configuration names, loaded and checked against the federation's LoRA.

    Raises:
        ConfigError: the probe is of another base model or reads other adapters than these clients
            will send, or has no single direction where attackers evade one.
    """
    of = config.defense
    gates: dict[str, Any] = {
        name: getattr(of, name) for name in ("min_mean_factor", "max_count_ratio", "max_norm_ratio")
    }
    if of.level == "none":
        return Defense(None, None, **gates)
    probe = Probe.from_pretrained(str(of.probe), revision=of.probe_revision)
    if probe.base_model is not None and probe.base_model != initial.base_model:
        raise ConfigError(
            f"defense.probe: it was made for the base model {probe.base_model!r}; model.base is"
            f" {initial.base_model!r}. Use a probe for that base, or say in model.name that the two"
            " are the same model."
        )
    try:
        probe.featurizer.check(factor_delta(initial, initial))
    except LoraprobeError as error:
        raise ConfigError(
            f"defense.probe: it cannot read this federation's updates: {error}"
        ) from None
    if config.clients.update_attack == "probe_evasion":
        probe_direction(probe, Layout.of(initial))
    return Defense(probe, of.make_level(probe.threshold), **gates)


def client_seed(seed: int, number: int, index: int) -> int:
    """The seed of one client's training in one round: of its order of examples and of dropout."""
    return int(np.random.SeedSequence([seed, number, index]).generate_state(1)[0])


def learning_rate(training: TrainingConfig, number: int, rounds: int) -> float:
    """The learning rate of a round (from 1).

    Along a cosine from `lr` in the first to `min_lr` after the last, or constant.
    """
    if training.schedule == "constant":
        return training.lr
    return (
        training.min_lr
        + (training.lr - training.min_lr) * (1 + math.cos(math.pi * (number - 1) / rounds)) / 2
    )


class RoundPlan(NamedTuple):
    """Who takes part in a round and how they train.

    It follows from the configuration and the round's number alone.

    Attributes:
        chosen: numbers of the clients, rising.
        seeds: one for each of them, of its order of examples and of dropout.
        generator: of what attackers and randomised rules draw.
    """

    number: int
    chosen: tuple[int, ...]
    training: LocalTraining
    seeds: tuple[int, ...]
    generator: np.random.Generator


def plan_round(config: Config, number: int) -> RoundPlan:
    """The plan of a round (from 1)."""
    generator = np.random.default_rng([config.seed, number])
    count, of = config.clients.count, config.training
    chosen = tuple(
        sorted(map(int, generator.choice(count, config.clients.sampled or count, replace=False)))
    )
    training = LocalTraining(
        learning_rate(of, number, config.rounds),
        of.steps,
        of.batch_size,
        of.max_length,
        of.max_grad_norm,
    )
    return RoundPlan(
        number,
        chosen,
        training,
        tuple(client_seed(config.seed, number, index) for index in chosen),
        generator,
    )


def _round(
    federation: Federation, config: Config, clients: list[Client], number: int, watch: Watch | None
) -> RoundRecord:
    """One round of clients in this process."""
    plan = plan_round(config, number)

    def after(client: str, loss: float) -> None:
        if watch:
            watch("client", number, client, loss)

    return federation.round(
        number,
        [clients[index] for index in plan.chosen],
        plan.training,
        plan.seeds,
        plan.generator,
        after,
    )


class _Board:
    """Scalars for TensorBoard, if they are asked for."""

    def __init__(self, folder: Path | None, records: list[RoundRecord]) -> None:
        self._writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                from loraprobe.errors import MissingExtra

                raise MissingExtra("tensorboard", "tensorboard", "output.tensorboard") from error
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=len(records) + 1)

    def write(self, record: RoundRecord) -> None:
        if self._writer is None:
            return
        groups = {
            "factor": record.factors,
            "weight": record.weights,
            "loss": record.losses,
            "metric": record.metrics,
            "seconds": record.seconds,
        }
        for group, values in groups.items():
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, record.round)
        for client, scores in record.scores.items():
            self._writer.add_scalar(f"score/{client}", scores[-1], record.round)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
