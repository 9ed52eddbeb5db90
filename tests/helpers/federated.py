"""What the tests of fedloop share.

Clients' updates as the probes of `probes` read them, and a federation on the tiny Llama.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedloop.defense.defense import Defense
from fedloop.defense.levels import (
    LOCAL_STEPS,
    SHADOW_GRADIENT,
    SHADOW_STEPS,
    ClientLevel,
    CumulativeLevel,
    EvidenceLevel,
    Level,
    ShadowLevel,
    StepLevel,
)
from fedloop.defense.types import ClientUpdate, RoundRecord
from fedloop.run.run import RunResult
from fedloop.run.simulate import simulate
from loraprobe import fit_probe
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, pack, unpack
from loraprobe.adapters.pair import LoRAPair
from loraprobe.probe import Probe
from tests.helpers import probes, tiny

LEVELS: dict[str, Level] = {
    "step": StepLevel(),
    "client": ClientLevel(),
    "shadow": ShadowLevel(),
    "evidence": EvidenceLevel(min_evidence=3, audit_interval=2),
    "cumulative": CumulativeLevel(),
    "relative": CumulativeLevel(relative=True, graded=True),
    "sketch": CumulativeLevel(sketch=64, graded=True),
    "shadow_gradient": ShadowLevel(evidence=SHADOW_GRADIENT),
    "cumulative_gradient": CumulativeLevel(evidence=SHADOW_GRADIENT, graded=True),
}
CLIENTS = ("c0", "c1", "c2", "c3", "c4")


def mapped(adapter: Adapter, change: Callable[[torch.Tensor], torch.Tensor]) -> Adapter:
    """The adapter with every factor passed through a function."""
    pairs = {
        module: LoRAPair(
            change(torch.from_numpy(pair.A)), change(torch.from_numpy(pair.B)), pair.scaling
        )
        for module, pair in adapter.items()
    }
    return Adapter(pairs, kind=adapter.kind, base_model=adapter.base_model)


def steps_for(
    level: Level | None, delta: Adapter, seed: int, malicious: bool = False, signal: float = 1.0
) -> tuple[Adapter, ...]:
    """The evidence that a level reads of a client that sends this update.

    The trajectory to it, or shadows of the same class.
    """
    if level is None or level.evidence not in (LOCAL_STEPS, SHADOW_STEPS, SHADOW_GRADIENT):
        return ()
    if level.evidence == LOCAL_STEPS:
        return (
            *(mapped(delta, lambda tensor, share=share: share * tensor) for share in (0.25, 0.5)),
            delta,
        )
    count = 3 if level.evidence == SHADOW_STEPS else 1
    return tuple(
        probes.labelled_adapter(7000 + 10 * seed + number, malicious, signal)
        for number in range(count)
    )


def update(
    client: str,
    seed: int,
    level: Level | None = None,
    malicious: bool = False,
    signal: float = 1.0,
    num_examples: int = 40,
) -> ClientUpdate:
    """One client's update of the kind that `probes.tiny_probe` tells apart, with the evidence of
    the level.
    """
    delta = probes.labelled_adapter(seed, malicious, signal)
    return ClientUpdate(
        client, num_examples, delta, steps_for(level, delta, seed, malicious, signal)
    )


def updates(
    level: Level | None, number: int = 1, malicious: tuple[str, ...] = (), signal: float = 1.0
) -> dict[str, ClientUpdate]:
    """Every client's update of a round."""
    return {
        client: update(
            client, 100 * number + index, level, client in malicious, signal, 30 + 10 * index
        )
        for index, client in enumerate(CLIENTS)
    }


def untimed(record: RoundRecord) -> RoundRecord:
    """The record without its wall-clock seconds: what has to be the same in every run."""
    return replace(record, seconds={})


def same_tree(left: Any, right: Any) -> bool:
    """Whether two nested states agree bit for bit.

    Lists and tuples count alike, as in a checkpoint.
    """
    if isinstance(left, Mapping):
        return (
            isinstance(right, Mapping)
            and left.keys() == right.keys()
            and all(same_tree(value, right[key]) for key, value in left.items())
        )
    if isinstance(left, list | tuple):
        return (
            isinstance(right, list | tuple)
            and len(left) == len(right)
            and all(map(same_tree, left, right))
        )
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and torch.equal(left, right)
        )
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and np.array_equal(left, right)
        )
    return type(left) is type(right) and left == right


def defense(level: Level | None, **options: Any) -> Defense:
    """A defence with the small linear probe of B where there is a level."""
    return Defense(probes.tiny_probe("linear", "all_b") if level else None, level, **options)


# --- a whole federation

NAME = "tiny/llama"
DIMS = {"q_proj": (32, 32), "v_proj": (16, 32)}
LORA: dict[str, Any] = {"r": 4, "scaling": 2.0, "dims": DIMS, "base_model": NAME}


class Files(NamedTuple):
    """A base model and a probe for its LoRA, on disk."""

    base: Path
    probe: Path


def fitted(recipe: str = "all_b", **options: Any) -> Probe:
    """A linear probe of two random classes of changes of the tiny Llama's LoRA.

    It knows no initial adapter: federations start from several.
    """
    data = probes.labelled(24, 2, **{**LORA, **options})
    bare = [Adapter(dict(one), kind=one.kind, base_model=one.base_model) for one in data.adapters]
    return fit_probe(bare, data.labels, recipe=probes.RECIPES[recipe], groups=data.groups)


def written(folder: Path) -> Files:
    """The base model and the probe in this folder."""
    return Files(tiny.saved(folder / "base"), fitted().save_pretrained(folder / "probe"))


def settings(files: Files, **changes: Any) -> dict[str, Any]:
    """An experiment of a second: four clients, one of them malicious, two rounds of two steps.

    Tables are merged with `changes`.
    """
    values: dict[str, Any] = {
        "rounds": 2,
        "model": {"base": str(files.base), "name": NAME},
        "lora": {"r": 4, "alpha": 8, "target_modules": list(DIMS)},
        "training": {"lr": 5e-3, "steps": 2, "batch_size": 2, "max_length": 40},
        "clients": {
            "count": 4,
            "examples": 6,
            "benign": ["builtin:benign"],
            "malicious": 1,
            "malicious_source": "builtin:malicious",
        },
    }
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return values


def defended(files: Files, level: str = "cumulative", **options: Any) -> dict[str, Any]:
    """The table `defense` with this level."""
    return {"level": level, "probe": str(files.probe), "options": options}


def toml(values: dict[str, Any], table: str = "") -> str:
    """A nested dict as TOML: JSON's scalars and lists are TOML's too."""
    lines = [
        f"{key} = {json.dumps(value)}"
        for key, value in values.items()
        if not isinstance(value, dict)
    ]
    tables = {
        f"{table}.{key}" if table else key: value
        for key, value in values.items()
        if isinstance(value, dict)
    }
    return (
        "\n".join([*lines, *(f"[{name}]\n{toml(value, name)}" for name, value in tables.items())])
        + "\n"
    )


def experiment(path: Path, values: dict[str, Any]) -> Path:
    """The experiment in a file."""
    path.write_text(toml(values))
    return path


def unpacked(vector: torch.Tensor, like: Adapter) -> Adapter:
    """A factor delta with these numbers, of the layout of an adapter."""
    layout = Layout.of(like)
    return unpack(
        vector, Layout(layout.slots, layout.scalings, "factor_delta"), base_model=like.base_model
    )


def vector(adapter: Adapter) -> torch.Tensor:
    """Its factors, packed."""
    return pack(adapter)[0]


def run(files: Files, **changes: Any) -> RunResult:
    """A whole federation on the tiny Llama."""
    return simulate(settings(files, **changes))
