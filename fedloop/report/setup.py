"""What a run was, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .content import percent
from .drawing import ROLE_WORDS, ROLES
from .run import ReportedRun

Pair = tuple[str, str]


def in_a_sentence(run: ReportedRun) -> str:
    """The run in a sentence."""
    model, level = run.config.model, run.config.defense.level
    counts = Counter(run.roles.values())
    who = ", ".join(f"{counts[role]} {ROLE_WORDS[role]}" for role in ROLES if counts[role])
    guard = "without a defence" if level == "none" else f"weighed by the {level} level"
    return (
        f"Federated LoRA fine-tuning of {model.name or model.base} by {len(run.roles)} clients"
        f" ({who}), {guard}."
    )


def setup_rows(run: ReportedRun) -> Iterator[Pair]:
    """The configuration in words."""
    config = run.config
    model, lora, training = config.model, config.lora, config.training
    named = model.name not in (None, model.base)
    base = f"{model.name}, loaded from {model.base}" if named else model.base
    bits = "" if model.quantization == "none" else f", {model.quantization}"
    yield "Base model", f"{base}; {model.dtype}{bits}"
    modules = ", ".join(lora.target_modules or ["the default modules"])
    yield "Adapter", f"rank {lora.r}, alpha {lora.alpha:g}, on {modules}"
    clients = config.clients
    sampled = clients.sampled or clients.count
    yield (
        "Rounds",
        f"{config.rounds}, with {sampled} of {clients.count} clients each; seed {config.seed}",
    )
    falling = "" if training.schedule == "constant" else f" falling to {training.min_lr:g}"
    yield (
        "Local training",
        f"{training.steps} steps of {training.batch_size} examples, learning rate"
        f" {training.lr:g}{falling}",
    )
    yield from _clients(run)
    aggregation = config.aggregation
    yield (
        "Aggregation",
        f"rule {aggregation.rule}{_options(aggregation.options)}, server {aggregation.server},"
        f" LoRA {aggregation.lora}",
    )
    yield from _defense(run)


def _clients(run: ReportedRun) -> Iterator[Pair]:
    clients = run.config.clients
    yield "Benign data", f"{', '.join(clients.benign)}; partition {clients.partition}"
    malicious = hard = attack = "none"
    if clients.malicious:
        malicious = (
            f"{clients.malicious}, {percent(clients.poison_share)} of their examples from"
            f" {clients.malicious_source}"
        )
        attack = "none beside the data"
        if clients.update_attack:
            attack = f"{clients.update_attack}{_options(clients.update_attack_options)}"
        if clients.evade_probe is not None:
            attack += f"; trained to a logit of at most {clients.evade_probe:g} of the probe"
        if clients.attack_from > 1:
            malicious += f"; benign before round {clients.attack_from}"
    if clients.hard_negatives:
        hard = f"{clients.hard_negatives}, from {clients.hard_negative_source}"
    yield from (("Malicious clients", malicious), ("Hard negatives", hard))
    yield "Attack on updates", attack


def _defense(run: ReportedRun) -> Iterator[Pair]:
    defense = run.config.defense
    if defense.level == "none":
        yield "Level", "none: every well-formed update counts by its examples"
    else:
        options = dict(defense.options)
        if defense.threshold is not None:
            of_probe = defense.threshold == "probe"
            options["threshold"] = "the probe's own" if of_probe else defense.threshold
        yield "Level", defense.level + _options(options)
        yield "Probe", defense.probe or "none"
    capped = ""
    if defense.max_count_ratio is not None:
        capped = f"; example counts capped at {defense.max_count_ratio:g} times the median"
    yield (
        "Safety gate",
        f"rounds with a mean factor below {defense.min_mean_factor:g} are skipped{capped}",
    )


def _options(options: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name} {value}" for name, value in options.items())
    return f" ({shown})" if options else ""
