"""What a run was, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .drawing import ROLE_WORDS, ROLES
from .html import percent
from .run import ReportedRun

Pair = tuple[str, str]


def in_a_sentence(run: ReportedRun) -> str:
    """The run in a sentence."""
    of, defense = run.config, run.config.defense
    counts = Counter(run.roles.values())
    who = ", ".join(f"{counts[role]} {ROLE_WORDS[role]}" for role in ROLES if counts[role])
    guard = (
        "without a defence" if defense.level == "none" else f"weighed by the {defense.level} level"
    )
    return (
        f"Federated LoRA fine-tuning of {of.model.name or of.model.base} by {len(run.roles)}"
        f" clients ({who}), {guard}."
    )


def setup_rows(run: ReportedRun) -> list[Pair]:
    """The configuration in words."""
    of, clients, training, aggregation, defense = (
        run.config,
        run.config.clients,
        run.config.training,
        run.config.aggregation,
        run.config.defense,
    )
    base = (
        of.model.base
        if of.model.name in (None, of.model.base)
        else f"{of.model.name}, loaded from {of.model.base}"
    )
    steady = training.schedule == "constant"
    rate = f"learning rate {training.lr:g}" + ("" if steady else f" falling to {training.min_lr:g}")
    bad = (
        f"{clients.malicious}, {percent(clients.poison_share)} of their examples from"
        f" {clients.malicious_source}"
        if clients.malicious
        else "none"
    )
    hard = (
        f"{clients.hard_negatives}, from {clients.hard_negative_source}"
        if clients.hard_negatives
        else "none"
    )
    attack = (
        f"{clients.update_attack}{_options(clients.update_attack_options)}"
        if clients.update_attack
        else "none beside the data"
    )
    given = (
        {}
        if defense.threshold is None
        else {"threshold": "the probe's own" if defense.threshold == "probe" else defense.threshold}
    )
    level = (
        "none: every well-formed update counts by its examples"
        if defense.level == "none"
        else defense.level + _options({**defense.options, **given})
    )
    capped = (
        ""
        if defense.max_count_ratio is None
        else f"; example counts capped at {defense.max_count_ratio:g} times the median"
    )
    rows = [
        (
            "Base model",
            f"{base}; {of.model.dtype}"
            + ("" if of.model.quantization == "none" else f", {of.model.quantization}"),
        ),
        (
            "Adapter",
            (
                f"rank {of.lora.r}, alpha {of.lora.alpha:g}, on"
                f" {', '.join(of.lora.target_modules or ['the default modules'])}"
            ),
        ),
        (
            "Rounds",
            (
                f"{of.rounds}, with {clients.sampled or clients.count} of {clients.count} clients"
                f" each; seed {of.seed}"
            ),
        ),
        ("Local training", f"{training.steps} steps of {training.batch_size} examples, {rate}"),
        ("Benign data", f"{', '.join(clients.benign)}; partition {clients.partition}"),
        ("Malicious clients", bad),
        ("Hard negatives", hard),
        ("Attack on updates", attack if clients.malicious else "none"),
        (
            "Aggregation",
            (
                f"rule {aggregation.rule}{_options(aggregation.options)}, server"
                f" {aggregation.server}, LoRA {aggregation.lora}"
            ),
        ),
        ("Level", level),
        ("Probe", defense.probe or "none"),
        (
            "Safety gate",
            f"rounds with a mean factor below {defense.min_mean_factor:g} are skipped{capped}",
        ),
    ]
    return [row for row in rows if defense.level != "none" or row[0] != "Probe"]


def _options(options: Mapping[str, Any]) -> str:
    return (
        f" ({', '.join(f'{name} {value}' for name, value in options.items())})" if options else ""
    )
