"""What is fuzzed: which file is damaged, how, with which checksums, how the loader is judged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import load_adapter
from loraprobe.probe import Probe

from . import corpus, service
from .corpus import Files
from .oracle import Load, judge_adapter, judge_damaged, judge_sealed, outcome
from .strategies import Damage, damaged_json, damaged_safetensors


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
        damage: bytes -> what may become of them.
        judge: what a load of a damaged folder has to be, given that folder and an undamaged one.
        finish: what is done to the folder after the damage.
    """

    name: str
    samples: Callable[[], tuple[Files, ...]]
    file: str
    damage: Damage
    load: Load
    judge: Callable[[Path, Path], Callable[..., str]]
    finish: Callable[[Files], Files] = as_it_is
    title: str = field(default="", compare=False)

    def undamaged(self) -> list[Files]:
        """The folders that have the file."""
        return [files for files in self.samples() if self.file in files]

    def damaged(self, files: Files) -> st.SearchStrategy[Files]:
        """A folder with the file damaged and finished."""
        return self.damage(files[self.file]).map(
            lambda data: self.finish({**files, self.file: data})
        )

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


def _all() -> Iterator[Target]:
    load = Probe.from_pretrained
    kinds = (
        ("config", "config.json", damaged_json, "config.json of a probe"),
        ("head-arrays", "head.safetensors", damaged_safetensors, "head.safetensors"),
        ("head-trees", "head.json", damaged_json, "head.json (trees, version 2)"),
    )
    for name, file, damage, title in kinds:
        yield Target(name, corpus.probes, file, damage, load, _damaged, title=title)
        sealed = f"the same, {'digest' if name == 'config' else 'sha256'} recomputed"
        yield Target(f"{name}-sealed", corpus.probes, file, damage, load, _sealed, seal, sealed)
    for name, file, damage in (
        ("adapter-tensors", "adapter_model.safetensors", damaged_safetensors),
        ("adapter-config", "adapter_config.json", damaged_json),
    ):
        yield Target(name, corpus.adapters, file, damage, load_adapter, _of_adapter, title=file)
    yield Target(
        "score-request",
        service.requests,
        service.BODY,
        damaged_safetensors,
        service.ask,
        service.judge_answer,
        title="body of POST /v1/score",
    )


TARGETS: dict[str, Target] = {target.name: target for target in _all()}
