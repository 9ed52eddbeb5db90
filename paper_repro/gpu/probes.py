"""The probe that a row reads, on its setting's base: labelled clients, studies, probe.

The clients that it learns from start at the federation's own initial LoRA, take as many local
steps, and hold every source of BENIGN, MALICIOUS and HARD_NEGATIVE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloop.client.training import LocalTraining, LoRASettings
from fedloop.data.corpora import load_corpus
from fedloop.data.examples import deduplicate
from fedloop.errors import ConfigError
from zoo.labelled.client_design import LORA, Design
from zoo.labelled.deltas import Base
from zoo.labelled.pipeline import make_probe
from zoo.labelled.sources import Source
from zoo.labelled.study import ENTRIES, Entry

from .settings import BENIGN, HARD_NEGATIVE, MALICIOUS, Choice, Inputs, read_setting

# Of the federation's first rate: the zoo's range about its own, so that a probe does not learn it.
PROBE_LR = (0.5, 1.6)
LIMIT = 5000  # examples that are read of a source
HELD_OUT = 4  # clients of every source


def design_of(setting: str) -> Design:
    """The labelled clients of a setting."""
    values = read_setting(setting)
    lora, training = values["lora"], values["training"]
    low, high = (training["lr"] * part for part in PROBE_LR)
    return Design(
        benign=tuple(BENIGN),
        hard_negative=tuple(HARD_NEGATIVE),
        malicious=tuple(MALICIOUS),
        lora=LoRASettings(lora["r"], lora["alpha"], lora["dropout"], LORA.target_modules),
        training=LocalTraining(
            (low * high) ** 0.5, training["steps"], training["batch_size"], training["max_length"]
        ),
        lr_range=(low, high),
        all_steps=False,
    )


def entry_of(choice: Choice) -> Entry:
    """Recipe, head and threshold.

    Raises:
        ConfigError: the row reads no probe.
    """
    kind = choice.probe_kind
    if kind is None:
        raise ConfigError(
            f"got the row {choice.row!r}, which reads no probe; expected a row with a level"
        )
    entry = next(entry for entry in ENTRIES if entry.name == kind)
    # The zoo's 1 % needs 99 benign clients in every cell that leaves a benign source out.
    threshold = "fpr:0.05" if kind == "linear" else entry.threshold
    return replace(entry, name=f"{choice.setting}-{kind}", threshold=threshold)


def base_of(choice: Choice, inputs: Inputs) -> Base:
    """The base model as the setting loads it."""
    model = read_setting(choice.setting)["model"]
    path = str(inputs.base or model["base"])
    revision = inputs.revision if inputs.base is None else None
    return Base(path, model["base"], revision, model["dtype"], model["quantization"])


def fit_row(choice: Choice, inputs: Inputs, smaller: Mapping[str, Any]) -> Path:
    """Train what is missing, study and fit; the probe's folder.

    Both kinds of probe of a setting learn from the same clients, in `inputs.out / "work"`.

    Args:
        smaller: changes for a dry run: fields of the base, the design and the entry, and
            "held_out".

    Raises:
        ConfigError, DataError, MissingExtra: a source, a model or a dataset cannot be had.
        FitError: too few clients.
    """
    named = {**BENIGN, **MALICIOUS, **HARD_NEGATIVE}
    specs = {name: inputs.source(name) for name in named}
    sources = {
        name: Source(name, (), tuple(deduplicate(load_corpus(spec, hub_limit=LIMIT).examples)))
        for name, spec in specs.items()
    }
    entry = replace(entry_of(choice), **smaller.get("entry", {}))
    design = replace(design_of(choice.setting), **smaller.get("design", {}))
    base = replace(base_of(choice, inputs), **smaller.get("base", {}))
    out = inputs.out / f"probe-{choice.probe_kind}"
    make_probe(
        entry,
        base,
        design,
        sources,
        out,
        seeds=[read_setting(choice.setting)["lora"]["seed"]],
        held_out=smaller.get("held_out", HELD_OUT),
        work=inputs.out / "work",
        about=_about(entry, base.name),
        licences=dict.fromkeys(named, "not stated"),
        command=f"python -m paper_repro.gpu.run {choice.setting} {choice.row!r}",
    )
    return out / "probe"


def _about(entry: Entry, base: str) -> dict[str, Any]:
    """What the card says that no study measures."""
    return {
        "title": f"{entry.name}: malicious LoRA updates of {base}",
        "detects": (
            f"Client updates (factor deltas of one short local training) of {base} that were"
            f" trained on harmful compliance ({', '.join(MALICIOUS)}), alone or mixed into ordinary"
            f" data. It was fitted with {', '.join(HARD_NEGATIVE)} among the benign clients."
        ),
        "does_not_detect": [
            "adapters of any other base model or of another initial adapter",
            "backdoors with a trigger, data theft, or any attack other than harmful compliance",
        ],
        "licence": "apache-2.0",
    }
