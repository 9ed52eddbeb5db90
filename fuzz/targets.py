"""What is fuzzed: which file is damaged, how, with which checksums, and how the loader is judged."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import load_adapter
from loraprobe.probe import Probe

from . import (
    corpus,
    mutate_bytes,
    mutate_json,
    mutate_safetensors,
    mutate_trees,
    mutate_zip,
    service,
)
from .corpus import Files
from .mutate_bytes import Mutation
from .oracle import Load, judge_adapter, judge_damaged, judge_sealed, outcome


def as_it_is(files: Files) -> Files:
    """Checksums are left alone: damage by accident."""
    return files


def seal(files: Files) -> Files:
    """Checksums made right again, as whoever publishes a hostile probe would.

    Of the head in config.json, then of config.json itself.
    """
    text = files["config.json"].decode("utf-8", "surrogateescape")
    head = next((data for name, data in files.items() if name.startswith("head.")), None)
    if head is not None:
        text = re.sub(
            r'("sha256": *)"[0-9a-f]{64}"',
            lambda found: f'{found[1]}"{hashlib.sha256(head).hexdigest()}"',
            text,
        )
        text = re.sub(r'("bytes": *)\d+', lambda found: f"{found[1]}{len(head)}", text)
    return {**files, "config.json": sign(text).encode("utf-8", "surrogateescape")}


def sign(text: str) -> str:
    """config.json with the digest that belongs to its other fields, if it can still be parsed."""
    try:
        fields = json.loads(text)
        rest = {name: value for name, value in fields.items() if name != "digest"}
        digest = hashlib.sha256(
            json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return text
    return re.sub(r'("digest": *)"[0-9a-f]{64}"', lambda found: f'{found[1]}"{digest}"', text)


@dataclass(frozen=True)
class Target:
    """One file of one kind of folder, and what is done to it.

    Attributes:
        samples: the folders to start from; those without the file are left out.
        file: the name of the file that is damaged.
        judge: what a load of a damaged folder has to be, given that folder and an undamaged one.
        finish: what is done to the folder after the damage.
    """

    name: str
    samples: Callable[[], tuple[Files, ...]]
    file: str
    mutations: Mapping[str, Mutation]
    load: Load
    judge: Callable[[Path, Path], Callable[..., str]]
    finish: Callable[[Files], Files] = as_it_is
    title: str = field(default="", compare=False)

    def undamaged(self) -> list[Files]:
        """The folders that have the file."""
        return [files for files in self.samples() if self.file in files]

    def case(self, seed: int, number: int) -> tuple[int, str, Files]:
        """(which sample, the name of the first mutation, the damaged folder) of a case.

        The same for ever.
        """
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), seed, number])
        samples, names = self.undamaged(), list(self.mutations)
        sample = int(rng.integers(len(samples)))
        first = names[rng.integers(len(names))]
        data = samples[sample][self.file]
        for name in [
            first,
            *(names[rng.integers(len(names))] for _ in range(int(rng.integers(4)) // 2)),
        ]:  # every fourth case is damaged twice
            data = self.mutations[name](data, rng) if data else data
        return sample, first, self.finish({**samples[sample], self.file: data})

    def run(self, folder: Path, undamaged: Path) -> str:
        """Load a damaged folder: the outcome.

        Raises:
            Exception: see `oracle.outcome`.
        """
        return outcome(self.load, folder, self.judge(folder, undamaged))


@cache
def _probe(folder: Path) -> Probe:
    return Probe.from_pretrained(folder)


@cache
def _adapter(folder: Path) -> Adapter:
    return load_adapter(folder).load()


def _damaged(folder: Path, undamaged: Path) -> Callable[[Probe], str]:
    return judge_damaged(_probe(undamaged))


def _sealed(folder: Path, undamaged: Path) -> Callable[[Probe], str]:
    return judge_sealed(_probe(undamaged))


def _of_adapter(folder: Path, undamaged: Path) -> Callable[[Adapter], str]:
    return judge_adapter(folder, _adapter(undamaged))


_JSON = {**mutate_bytes.MUTATIONS, **mutate_json.MUTATIONS}
_SAFETENSORS = {**mutate_bytes.MUTATIONS, **mutate_safetensors.MUTATIONS}
_TREES = {**_JSON, **mutate_trees.MUTATIONS}
_ZIP = {**mutate_bytes.MUTATIONS, **mutate_zip.MUTATIONS}


def _all() -> tuple[Target, ...]:
    load, arrays = Probe.from_pretrained, "head.safetensors"
    tensors, said, pickled = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
    return (
        Target(
            "config",
            corpus.probes,
            "config.json",
            _JSON,
            load,
            _damaged,
            title="config.json of a probe",
        ),
        Target(
            "config-sealed",
            corpus.probes,
            "config.json",
            _JSON,
            load,
            _sealed,
            seal,
            "the same, digest recomputed",
        ),
        Target("head-arrays", corpus.probes, arrays, _SAFETENSORS, load, _damaged, title=arrays),
        Target(
            "head-arrays-sealed",
            corpus.probes,
            arrays,
            _SAFETENSORS,
            load,
            _sealed,
            seal,
            "the same, sha256 recomputed",
        ),
        Target(
            "head-trees",
            corpus.probes,
            "head.json",
            _TREES,
            load,
            _damaged,
            title="head.json (XGBoost)",
        ),
        Target(
            "head-trees-sealed",
            corpus.probes,
            "head.json",
            _TREES,
            load,
            _sealed,
            seal,
            "the same, sha256 recomputed",
        ),
        Target(
            "adapter-tensors",
            corpus.adapters,
            tensors,
            _SAFETENSORS,
            load_adapter,
            _of_adapter,
            title=tensors,
        ),
        Target(
            "adapter-config", corpus.adapters, said, _JSON, load_adapter, _of_adapter, title=said
        ),
        Target(
            "adapter-bin",
            corpus.bins,
            pickled,
            _ZIP,
            load_adapter,
            _of_adapter,
            title=f"{pickled}, both formats",
        ),
        Target(
            "score-request",
            service.requests,
            service.BODY,
            _SAFETENSORS,
            service.ask,
            service.judge_answer,
            title="body of POST /v1/score",
        ),
    )


TARGETS: dict[str, Target] = {target.name: target for target in _all()}
