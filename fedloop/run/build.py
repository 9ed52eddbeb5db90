"""From a configuration to what a run is made of: clients with their data, model, defence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta
from loraprobe.adapters.layout import Layout
from loraprobe.errors import LoraprobeError
from loraprobe.probe import Probe

from ..client.evading import ProductLogit
from ..client.training import LoRASettings, attach_lora, load_base, read_adapter
from ..config import Config
from ..data.clients import Client, Group, Role, gated, make_clients
from ..data.corpora import load_corpus
from ..data.examples import Example
from ..data.partition import by_column, dirichlet, iid, mixtures
from ..defense.defense import Defense
from ..defense.parts import level_for
from ..defense.screening import Reading
from ..errors import ConfigError
from ..measure.behaviour import Behaviour, Prompts
from ..sections import ClientsConfig, LoRAConfig, ModelConfig
from .attackers import probe_direction
from .federation import Federation

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


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
    section = config.clients
    rng = np.random.default_rng([config.seed, 0])
    parts, names = _benign_parts(section, rng)
    roles: tuple[tuple[Role, int, str | None, float], ...] = (
        ("malicious", section.malicious, section.malicious_source, section.poison_share),
        ("hard_negative", section.hard_negatives, section.hard_negative_source, 1.0),
    )
    pools = {role: load_corpus(str(source)).examples for role, count, source, _ in roles if count}
    if section.trigger is not None:
        pools["malicious"] = gated(pools["malicious"], section.trigger)
    groups = [
        Group(role, count, str(source), pools[role], share)
        for role, count, source, share in roles
        if count
    ]
    clients = make_clients(parts, groups, rng)
    return [
        replace(client, source=name) if client.role == "benign" else client
        for client, name in zip(clients, names, strict=True)
    ]


def _benign_parts(
    section: ClientsConfig, rng: np.random.Generator
) -> tuple[list[tuple[Example, ...]], list[str]]:
    """The benign examples of every client, and what they are called."""
    count = section.count
    size = section.examples
    loaded = {source: load_corpus(source, category=section.column) for source in section.benign}
    if section.partition == "by_source":
        turns = [section.benign[index % len(section.benign)] for index in range(count)]
        cut = {
            source: iter(iid(loaded[source].examples, turns.count(source), rng, size=size))
            for source in dict.fromkeys(turns)
        }
        return [next(cut[source]) for source in turns], turns
    examples = [example for corpus in loaded.values() for example in corpus.examples]
    labels = [
        label
        for source, corpus in loaded.items()
        for label in corpus.categories or [source] * len(corpus.examples)
    ]
    if section.partition == "by_column":
        by_value = by_column(examples, labels)
        if len(by_value) != count:
            raise ConfigError(
                f"clients.count: got {count}; expected {len(by_value)}, the number of values of"
                f" column {section.column!r}"
            )
        return [part[:size] for part in by_value.values()], list(by_value)
    names = ["+".join(section.benign)] * count
    if section.partition == "dirichlet":
        parts = dirichlet(examples, labels, count, section.alpha, rng)
        return [part[:size] for part in parts], names
    if section.partition == "mixtures":
        return mixtures(examples, labels, count, section.alpha, rng, size=size), names
    return iid(examples, count, rng, size=size), names


def build_federation(
    config: Config, folder: Path | None = None, registered: Mapping[str, int] | None = None
) -> Federation:
    """Model, initial LoRA, probe and defence of an experiment, before its first round.

    Args:
        folder: where a round's updates lie while it is played; None for the system's temporary one.
        registered: as in `build_defense`.

    Raises:
        DataError, MissingExtra: the base model cannot be loaded.
        Otherwise as `build_defense`; probe and prompts are read before the base model is.
    """
    model, tokenizer, initial, defense = build_defended(config, registered)
    return Federation(model, tokenizer, initial, defense, config, folder)


def build_defended(
    config: Config, registered: Mapping[str, int] | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase, Adapter, Defense]:
    """Model, tokenizer, initial LoRA and defence of an experiment; as `build_federation`."""
    parts = defense_parts(config)
    model, tokenizer = load_adapted(
        config.model, config.lora, frozen_a=config.aggregation.lora == "frozen_a"
    )
    initial = read_adapter(model, config.model.name or config.model.base)
    defense = build_defense(config, initial, registered, (model, tokenizer), parts)
    return model, tokenizer, initial, defense


def load_adapted(
    settings: ModelConfig, lora: LoRAConfig, *, frozen_a: bool
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model with a fresh LoRA on it, and its tokenizer.

    Raises:
        DataError, MissingExtra: it cannot be loaded.
    """
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    base, tokenizer = load_base(
        settings.base,
        dtype=dtypes[settings.dtype],
        revision=settings.revision,
        quantization=settings.quantization,
        template=settings.template,
    )
    adapter = LoRASettings(lora.r, lora.alpha, lora.dropout, lora.target_modules)
    return attach_lora(base, adapter, lora.seed, frozen_a=frozen_a), tokenizer


def defense_parts(config: Config) -> tuple[Probe | None, Prompts | None]:
    """The probe and the prompts of the second opinion that the configuration names.

    Raises:
        ProbeFormatError, HubError: the probe cannot be loaded.
        DataError: the prompts cannot be read. ConfigError: they are too few.
    """
    section = config.defense
    probe = prompts = None
    if section.probe is not None:
        probe = Probe.from_pretrained(section.probe, revision=section.probe_revision)
    if section.behaviour is not None:
        prompts = Prompts.read(Path(section.behaviour), seed=config.seed)
    return probe, prompts


def build_defense(
    config: Config,
    initial: Adapter,
    registered: Mapping[str, int] | None = None,
    loaded: tuple[Any, Any] | None = None,
    parts: tuple[Probe | None, Prompts | None] | None = None,
) -> Defense:
    """The defence that the configuration names, loaded and checked against the federation's LoRA.

    Args:
        registered: client -> example count that the server knows; None if claims count.
        loaded: the base model and its tokenizer, for a second opinion.
        parts: what `defense_parts` read, if it was called before.

    Raises:
        ConfigError: there is no model to ask for a second opinion; the probe is of another base
            model, reads other adapters than these clients will send, does not fit the level, or has
            no single direction where attackers evade one.
        Otherwise as `defense_parts`.
    """
    section = config.defense
    probe, prompts = parts or defense_parts(config)
    limits: dict[str, Any] = {
        "min_mean_factor": section.min_mean_factor,
        "max_count_ratio": section.max_count_ratio,
        "max_norm_ratio": section.max_norm_ratio,
        "registered": registered,
        "forget_after": section.forget_after,
        "probation": section.probation,
        "newcomer_share": section.newcomer_share,
        "score_aggregate": section.score_aggregate,
        "behaviour": _second_opinion(prompts, section.behaviour_cut, loaded),
    }
    if probe is None:
        return Defense(None, None, **limits)
    if probe.base_model is not None and probe.base_model != initial.base_model:
        raise ConfigError(
            f"defense.probe: it was made for the base model {probe.base_model!r}; model.base is"
            f" {initial.base_model!r}. Use a probe for that base, or say in model.name that the two"
            " are the same model."
        )
    try:
        reading = Reading(probe.featurizer.layout.kind, initial)
        probe.featurizer.check(reading(factor_delta(initial, initial)))
    except LoraprobeError as error:
        raise ConfigError(
            f"defense.probe: it cannot read this federation's updates: {error}"
        ) from None
    if config.clients.update_attack == "probe_evasion":
        probe_direction(probe, Layout.of(initial))
    if config.clients.evade_probe is not None:
        ProductLogit.of(probe)
    fields = section.level_fields(probe.threshold)
    return Defense(probe, level_for(probe, section.level, fields), **limits)


def _second_opinion(
    prompts: Prompts | None, cut: float | None, loaded: tuple[Any, Any] | None
) -> Behaviour | None:
    if prompts is None or cut is None:
        return None
    if loaded is None:
        raise ConfigError(
            "defense.behaviour: there is no base model here to put updates on; leave it out, or run"
            " the federation in one process"
        )
    return Behaviour(*loaded, prompts, cut)
