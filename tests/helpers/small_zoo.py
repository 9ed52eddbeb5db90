"""A small zoo: what zoo.labelled.pipeline makes of the tiny Llama in seconds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedloop.client.training import LocalTraining, LoRASettings
from fedloop.data.corpora import load_corpus
from fedloop.data.examples import deduplicate
from tests.helpers import tiny
from zoo.labelled.client_design import LORA, Design
from zoo.labelled.deltas import Base
from zoo.labelled.measure import same_rounding
from zoo.labelled.pipeline import (
    Replicate,
    held_out_adapters,
    labelled_deltas,
    smaller,
    studies,
)
from zoo.labelled.records import data_facts, fit_and_record, write_record
from zoo.labelled.sources import Source
from zoo.labelled.study import BASELINES, ENTRIES

ROOT = Path(__file__).resolve().parents[2]
NAME = "tiny-linear"
SPECS = {
    "benign_arithmetic": "builtin:benign/arithmetic",
    "facts": "builtin:benign/facts",
    "theft_safe": "builtin:refusals/theft",
    "theft": "builtin:malicious/theft",
    "fraud": "builtin:malicious/fraud",
}
DESIGN = Design(
    benign=("benign_arithmetic", "facts"),
    hard_negative=("theft_safe",),
    malicious=("theft", "fraud"),
    shares=(1.0, 0.5),
    lora=LoRASettings(2, 4, 0.05, LORA.target_modules),
    training=LocalTraining(4.5e-3, 2, 2, 48),
    per_source=6,
    per_cell=1,
    per_hard_cell=1,
    all_steps=False,
)
ENTRY = replace(ENTRIES[0], name=NAME, threshold="fpr:0.2")
_FOLDER = TemporaryDirectory(prefix="small-zoo-")


def make(out: Path, **changes: Any) -> None:
    """Make that probe, or one of a changed design, in a folder that keeps what was trained.

    The stages of `zoo.build`, on two replicates: OUT/probe, OUT/adapters and OUT/record.json.
    """
    sources = {
        name: Source(name, (), tuple(deduplicate(load_corpus(spec).examples)))
        for name, spec in SPECS.items()
    }
    entry, work = changes.pop("entry", ENTRY), out / "work"
    design = replace(DESIGN, **changes)
    results, published = [], None
    for number in (0, 1):
        replicate = Replicate(number, Base(str(base()), "tiny/llama"), number, number)
        deltas = labelled_deltas(replicate, sources, design, work, workers=1)
        if published is None:
            published, sample = deltas, smaller(design, 2)
            held_out_adapters(replicate, sources, sample, 2, work, 1, out / "adapters")
        with same_rounding(1):
            results.append(studies(deltas, [entry], replicate, work, twins_of=entry.name))
    record = {
        "probe": entry.name,
        "command": "python -m zoo.build",
        "base_model": "tiny/llama",
        "about": {
            "title": f"{NAME}: malicious LoRA updates of tiny/llama",
            "detects": "Client updates that were trained on harmful compliance.",
            "does_not_detect": ["adapters of any other base model"],
            "licence": "apache-2.0",
        },
        "adapters": "adapters",
        "data": data_facts(design, published, sources, dict.fromkeys(SPECS, "our own writing")),
        "threads": 1,
        "replicates": [result[entry.name] for result in results],
        "baselines": {one.name: [result[one.name] for result in results] for one in BASELINES},
    }
    with same_rounding(1):
        record = fit_and_record(published, entry, record, out / "adapters", out / "probe")
    write_record(record, out / "record.json")


@cache
def base() -> Path:
    """The tiny Llama."""
    return tiny.saved(Path(_FOLDER.name) / "base")


@cache
def made() -> Path:
    """The folder of the probe, made once; for reading only."""
    make(Path(_FOLDER.name) / "out")
    return Path(_FOLDER.name) / "out"


def a_zoo(folder: Path) -> Path:
    """A zoo of that one probe in a folder; it can be changed."""
    for source, target in (("probe", f"probes/{NAME}"), ("adapters", "adapters")):
        shutil.copytree(made() / source, folder / target)
    (folder / "records").mkdir()
    shutil.copy(made() / "record.json", folder / "records" / f"{NAME}.json")
    return folder


def edit(path: Path, *keys: Any, value: Any) -> None:
    """Change one value inside a JSON file."""
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))
