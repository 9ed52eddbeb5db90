"""What a kit is asked for, and whether it can work, before anything is trained."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.corpora import load_corpus
from ..data.examples import Example, deduplicate
from ..errors import ConfigError, DataError
from ..example import FOLDER as EXAMPLE
from .design import BATCH, Client, plan

ROLES = ("benign", "malicious", "hard_negative")
HEADS = ("linear", "mass_mean")
EXAMPLE_BASE = "example"  # the small model that comes with the package
EXAMPLE_NAME = "loraprobe/chat-1m"
KEPT = "kit.json"
LEAST = {"benign": 3, "malicious": 2}  # kinds: one to leave out, one for the cut, one to fit on
_NAMED = re.compile(r"([\w.-]+)=(.+)")
_BAD = re.compile(r"[^\w.-]")


@dataclass(frozen=True)
class KitOptions:
    """A command line.

    Attributes:
        base: what transformers loads: a Hub id, a folder, a GGUF file in either, or "example".
        base_name: what adapters call the base model; probes belong to that name.
        specs: role -> name of a kind or source -> where its examples come from.
        clients: how many are trained.
        lr: learning rates are drawn from this range.
        room: tokens of an example beside its template.
        limit: of a Hub dataset, read no further than to this many examples.
        head: of the published probe; both are measured.
    """

    base: str
    specs: Mapping[str, Mapping[str, str]]
    out: Path
    base_name: str = ""
    revision: str | None = None
    template: str = "auto"
    clients: int = 300
    lr: tuple[float, float] = (5e-4, 5e-3)
    room: int = 48
    limit: int = 5000
    head: str = "linear"
    seed: int = 0
    licence: str = "apache-2.0"

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ConfigError(f"--head: got {self.head!r}; expected one of {', '.join(HEADS)}")
        if not 0 < self.lr[0] <= self.lr[1]:
            raise ConfigError(f"--lr: got {self.lr}; expected two rates above 0, the lower first")
        if self.room < 16 or self.clients < 1 or self.limit < 1:
            raise ConfigError(
                f"got --room {self.room}, --clients {self.clients} and --limit {self.limit};"
                " expected a room of at least 16 tokens, and at least one of the others"
            )

    @property
    def path(self) -> str:
        """What transformers loads."""
        return str(EXAMPLE / "base") if self.base == EXAMPLE_BASE else self.base

    @property
    def name(self) -> str:
        """What probe and adapters call the base model."""
        return self.base_name or (EXAMPLE_NAME if self.base == EXAMPLE_BASE else self.base)

    def plan(self, count: int | None = None) -> list[Client]:
        """The clients to train; a longer plan begins with the shorter one.

        Their `length` is the room beside the template.
        """
        benign, malicious, hard = (tuple(self.specs[role]) for role in ROLES)
        return plan(
            self.clients if count is None else count,
            benign,
            hard,
            malicious,
            seed=self.seed,
            lr=self.lr,
            lengths=(self.room, self.room, self.room + self.room // 3),
        )


def named(role: str, specs: Sequence[str]) -> dict[str, str]:
    """Name -> spec. "NAME=SPEC" names itself, others are named after their last part.

    Raises:
        ConfigError: two have one name.
    """
    by_name: dict[str, str] = {}
    for text in specs:
        match = None if Path(text).is_file() else _NAMED.fullmatch(text)
        name, spec = (match[1], match[2]) if match else (_name_of(text), text)
        if name in by_name:
            raise ConfigError(
                f"--{role.replace('_', '-')}: got two called {name}; give one another name:"
                f" NAME={spec}"
            )
        by_name[name] = spec
    return by_name


def _name_of(spec: str) -> str:
    last = spec.partition("@")[0].rpartition("/")[2]
    plain = last if spec.startswith(("builtin:", "hub:")) else Path(spec).stem
    return _BAD.sub("_", plain.rpartition(":")[2])


def check_plan(options: KitOptions) -> list[Client]:
    """The clients, if leaving kinds out of training leaves enough to fit a probe and its cut on.

    Raises:
        ConfigError: there are too few kinds, sources or clients; the message says what is needed.
    """
    for role, least in LEAST.items():
        got = len(options.specs[role])
        if got < least:
            raise ConfigError(
                f"got {got} {'kinds of benign data' if role == 'benign' else 'malicious sources'};"
                f" expected at least {least}: every one is left out of training once, and a probe"
                " that was not tested on unseen data says nothing of real adapters. Add"
                f" --{role} NAME=PATH"
            )
    names = [name for role in ROLES for name in options.specs[role]]
    if len(set(names)) != len(names):
        raise ConfigError(f"got the names {', '.join(names)}; expected every kind's own")
    clients = options.plan()
    if not _enough(clients):
        count = next(n for n in range(8, 10_000) if _enough(options.plan(n)))
        raise ConfigError(
            f"got --clients {options.clients}; expected at least {count}, so that"
            f" {LEAST['benign']} kinds and {LEAST['malicious']} sources have clients of their own"
        )
    return clients


def _enough(clients: Sequence[Client]) -> bool:
    return all(
        len({client.source for client in clients if client.role == role}) >= least
        for role, least in LEAST.items()
    )


def read_kinds(options: KitOptions) -> dict[str, tuple[Example, ...]]:
    """Name -> examples, none twice.

    Raises:
        ConfigError, DataError, MissingExtra: as `load_corpus`; one is too small for a training
            step, or a benign and a malicious one hold the same example.
    """
    kinds: dict[str, tuple[Example, ...]] = {}
    owner: dict[Example, tuple[str, bool]] = {}
    for role in ROLES:
        for name, spec in options.specs[role].items():
            rows = tuple(deduplicate(load_corpus(spec, hub_limit=options.limit).examples))
            if len(rows) < BATCH:
                raise DataError(
                    f"{name} ({spec}) has {len(rows)} different examples; expected at least"
                    f" {BATCH}, one training step. Add rows, or leave it out"
                )
            for number, row in enumerate(rows, start=1):
                other, malicious = owner.setdefault(row, (name, role == "malicious"))
                if malicious != (role == "malicious"):
                    raise DataError(
                        f"{name}: example {number} is in {other} too; expected no example to be"
                        " benign and malicious. Remove it from one of them"
                    )
            kinds[name] = rows
    return kinds


def check_folder(options: KitOptions, kinds: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """What decides the clients of a folder; it has to be what they were begun with.

    Raises:
        ConfigError: the folder belongs to another kit.
    """
    wanted = {
        "base": options.base,
        "base_name": options.name,
        "revision": options.revision,
        "template": options.template,
        "seed": options.seed,
        "lr": list(options.lr),
        "room": options.room,
        "kinds": {role: {n: _digest(kinds[n]) for n in options.specs[role]} for role in ROLES},
    }
    path = options.out / KEPT
    if path.is_file():
        former = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name, value in wanted.items() if former.get(name) != value]
        if differing:
            raise ConfigError(
                f"{options.out} was begun with another {', '.join(differing)}; expected the same"
                " options and data, --clients and --head apart. Go on with those, or give another"
                " --out"
            )
    elif options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"--out: {options.out} holds no kit; expected a new or empty folder")
    return wanted


def _digest(rows: Sequence[Example]) -> str:
    text = json.dumps([[row.instruction, row.context, row.response] for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()
