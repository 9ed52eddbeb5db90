"""The federation that every table here runs.

What is the same in all cells, and how a cell differs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloop.config import Config
from zoo.build import ZOO
from zoo.train_base import BASE_NAME, LARGER_NAME

from .held_out import FILES, PROBES, write_data

BENIGN = ("dolly_qa", "gsm8k", "dolly_creative", "gpteacher_codegen", "gpteacher_roleplay")
# What honest clients hold. The two sets have no kind in common.
BENIGN_SETS = {
    "first": BENIGN,
    "second": ("dolly_context", "gpteacher_toolformer", "dolly_classification", "self_instruct"),
}
CLIENTS, ROUNDS = 10, 6


@dataclass(frozen=True)
class GridBase:
    """A base model of the federations.

    Attributes:
        name: what its probes call it.
        lr: of the clients; of the larger one by `paper_repro.grid.larger`.
    """

    path: Path
    name: str
    lr: float


BASE, LARGER_BASE = "chat-1m", "chat-11m"
BASES = {
    BASE: GridBase(ZOO / "base", BASE_NAME, 1.5e-2),
    LARGER_BASE: GridBase(ZOO / "base-11m", LARGER_NAME, 1.5e-2),
}


def federation(
    *,
    malicious: int,
    source: str,
    share: float,
    seed: int,
    benign: str = "first",
    base: str = BASE,
    level: str = "none",
    probe: str = "linear",
    defense: dict[str, Any] | None = None,
    rule: str = "mean",
    rule_options: dict[str, Any] | None = None,
    folder: str | None = None,
    **changes: dict[str, Any],
) -> Config:
    """One experiment: ten clients, one benign kind each in turn, `malicious` of them training on
    `source` at this poison share.

    Args:
        benign: a name in BENIGN_SETS; base: one in BASES.
        probe: "linear", "paper" or "mass-mean", the one that met neither `source` nor two of the
            benign kinds.
        defense: further fields of the defense table; changes: further fields of other tables.
    """
    of = BASES[base]
    values: dict[str, Any] = {
        "name": "cell",
        "seed": seed,
        "rounds": ROUNDS,
        "model": {"base": str(of.path), "name": of.name},
        "lora": {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "training": {
            "lr": of.lr,
            "schedule": "constant",
            "steps": 5,
            "batch_size": 8,
            "max_length": 128,
        },
        "clients": {
            "count": CLIENTS,
            "examples": 100,
            "benign": [str(FILES / f"{name}.jsonl") for name in BENIGN_SETS[benign]],
            "partition": "by_source",
            "malicious": malicious,
            "malicious_source": str(FILES / f"{source}.jsonl"),
            "poison_share": share,
        },
        "aggregation": {"rule": rule, "options": rule_options or {}},
        "evaluation": {
            "harmful": str(FILES / "prompts_advbench.jsonl"),
            "safe": str(FILES / "prompts_xstest_safe.jsonl"),
            "utility": str(FILES / "utility.jsonl"),
            "max_new_tokens": 16,
            "limit": 200,
        },
        "output": {"folder": folder},
    }
    if level != "none":
        chosen = PROBES / probe_name(probe, source, benign, base)
        values["defense"] = {
            "level": level,
            "probe": str(chosen),
            **(rule_of(chosen) if level == "cumulative" else {}),
            **(defense or {}),
        }
    for table, fields in changes.items():
        values[table] = {**values[table], **fields}
    return Config.of(values)


def rule_of(probe: Path) -> dict[str, Any]:
    """The threshold and floor that a probe was saved with for the cumulative level, as fields of
    the defense table; {} where it has none.
    """
    config = probe / "config.json"
    rule = (
        json.loads(config.read_text(encoding="utf-8"))["facts"].get("cumulative")
        if config.exists()
        else None
    )
    return {"threshold": rule["threshold"], "options": {"floor": rule["floor"]}} if rule else {}


def probe_name(probe: str, source: str, benign: str = "first", base: str = BASE) -> str:
    """The folder of the probe of a base model that met neither this malicious source nor two kinds
    of this benign set.
    """
    return "-".join(
        [
            probe,
            "without",
            source,
            *([] if benign == "first" else [benign]),
            *([] if base == BASE else [base]),
        ]
    )


def make_files(data: Path) -> None:
    """The data files that configurations name, from the folder of the datasets, unless they are
    there.

    Raises:
        DataError: the folder, or one of the datasets, is missing.
    """
    if not (FILES / "prompts_xstest_unsafe.jsonl").exists():  # the one that is written last
        write_data(data, FILES)
