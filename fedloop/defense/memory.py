"""What a defence carries from round to round, and how it is written down and read back.

Written as plain data that JSON and `torch.load` take: numbers, text, dicts, lists; feature means as
base64 of their bytes. With it go the digest of the probe, the level's fields, and a hash of
all of it.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from loraprobe.probe import Probe

from ..checks import is_integer
from ..errors import EvidenceError, StateError
from .levels import Level

VERSION = 4
RuleState = dict[str, dict[str, Any]]
_FIELDS = tuple("version level probe round state features overruled rules seen played".split())


class Overruling(NamedTuple):
    """An operator's word on one client: whether it counts, up to which round (None: for ever)."""

    allowed: bool
    until: int | None
    why: str

    @classmethod
    def after_round(cls, allowed: bool, until: int | None, why: str, round: int) -> Overruling:
        """What an operator said after a round.

        Raises:
            EvidenceError: `why` is empty, or `until` is over.
        """
        if not isinstance(why, str) or not why.strip():
            raise EvidenceError(f"got why {why!r}; expected the reason, it goes into the records")
        if until is not None and not is_integer(until, round + 1):
            raise EvidenceError(
                f"got until {until!r}; expected a round after {round}, or None for ever"
            )
        return cls(allowed, None if until is None else int(until), why)

    def holds(self, round: int) -> bool:
        """Whether it still holds in this round."""
        return self.until is None or round <= self.until

    def __str__(self) -> str:
        until = "" if self.until is None else f" until round {self.until}"
        return f"{'allowed' if self.allowed else 'denied'}{until}: {self.why}"


@dataclass(frozen=True)
class Memory:
    """The whole state of a defence; never changed in place.

    Attributes:
        round: the last one that was assessed; 0 before the first.
        level: the level's state.
        features: the accumulator's state.
        overruled: client -> the operator's word on it.
        rules: name -> what an aggregation rule remembers, of a loop that applies one behind the
            defence: {} or {"history": {client: (d,)}}.
        seen: client -> the last round with a well-formed update of it; kept where clients are
            forgotten.
        played: client -> the rounds in which the level did not reject its well-formed update; kept
            where newcomers are on probation.
    """

    round: int = 0
    level: dict[str, Any] = field(default_factory=dict)
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    overruled: Mapping[str, Overruling] = field(default_factory=dict)
    rules: Mapping[str, RuleState] = field(default_factory=dict)
    seen: Mapping[str, int] = field(default_factory=dict)
    played: Mapping[str, int] = field(default_factory=dict)

    def at(self, round: int) -> Memory:
        """As it is when this round begins: without words that are over."""
        standing = {client: word for client, word in self.overruled.items() if word.holds(round)}
        return replace(self, round=round, overruled=standing)

    def forgetting(self, present: Iterable[str], after: int | None) -> tuple[Memory, list[str]]:
        """Without the clients that are gone for more than `after` rounds, and who they are.

        Whom the level rejected, or an operator spoke on, stays: a verdict cannot be waited out.
        """
        if after is None:
            return self, []
        entries: Mapping[str, Mapping[str, Any]] = self.level.get("clients", {})
        seen = {**dict.fromkeys(entries, self.round), **self.seen}
        seen |= dict.fromkeys(present, self.round)
        gone = {
            client
            for client, last in seen.items()
            if self.round - last > after
            and client not in self.overruled
            and entries.get(client, {}).get("factor", 1.0) > 0
        }
        if not gone:
            return replace(self, seen=seen), []

        def staying(values: Mapping[str, Any]) -> dict[str, Any]:
            return {client: value for client, value in values.items() if client not in gone}

        rules = {
            name: {key: staying(rows) for key, rows in state.items()}
            for name, state in self.rules.items()
        }
        level = {**self.level, "clients": staying(entries)} if entries else self.level
        features = staying(self.features)
        left = replace(self, level=level, features=features, rules=rules, seen=staying(seen))
        return replace(left, played=staying(self.played)), sorted(gone)

    def playing(self, factors: Mapping[str, float]) -> Memory:
        """With one more round played by whoever has a factor above 0."""
        trusted = {client for client, factor in factors.items() if factor > 0}
        more = {client: self.played.get(client, 0) + 1 for client in sorted(trusted)}
        return replace(self, played={**self.played, **more})

    def words(self, *, allowed: bool) -> dict[str, str]:
        """Client -> the operator's word, of those who are allowed or of those who are denied."""
        return {
            client: str(word) for client, word in self.overruled.items() if word.allowed is allowed
        }


def to_plain(memory: Memory, probe: Probe | None, level: Level | None) -> dict[str, Any]:
    """The state as plain data that shares nothing with the defence."""
    plain = {
        "version": VERSION,
        "level": _level_fields(level),
        "probe": probe_digest(probe),
        "round": memory.round,
        "state": json.loads(json.dumps(memory.level)),
        "features": {
            client: {**entry, "mean": _text(entry["mean"])}
            for client, entry in memory.features.items()
        },
        "overruled": {client: list(word) for client, word in memory.overruled.items()},
        "rules": {
            name: {
                key: {client: _text(row) for client, row in rows.items()}
                for key, rows in state.items()
            }
            for name, state in memory.rules.items()
        },
        "seen": dict(memory.seen),
        "played": dict(memory.played),
    }
    return {**plain, "sha256": _hash(plain)}


def from_plain(state: Any, probe: Probe | None, level: Level | None) -> Memory:
    """The inverse of `to_plain`.

    Raises:
        StateError: another version, damaged, or of another level or probe. The hash is no
            signature: what holds no finite vectors is refused even where somebody hashed it anew.
    """
    if not isinstance(state, Mapping):
        raise StateError(
            f"got a defence state of type {type(state).__name__}; expected what state_dict()"
            " returns"
        )
    version = state.get("version")
    if not is_integer(version, 1) or version != VERSION:
        raise StateError(
            f"got a defence state of version {version!r}; expected {VERSION}. Go on with the"
            " release of fedloop that wrote it, or begin with a new state."
        )
    wrong = sorted({*_FIELDS, "sha256"} ^ set(state), key=str)
    if wrong:
        raise StateError(
            f"the defence's state lacks, or has too many of, the fields {wrong}; expected what"
            " state_dict() returns"
        )
    if _hash({name: state[name] for name in _FIELDS}) != state["sha256"]:
        raise StateError(
            "the defence's state is not what state_dict() returned: its hash differs. Use an"
            " undamaged copy; to overrule a verdict there are allow() and deny()."
        )
    if state["level"] != _level_fields(level):
        raise StateError(
            f"got the state of level {state['level']}; expected that of {_level_fields(level)}: a"
            " state belongs to its level's parameters"
        )
    if state["probe"] != probe_digest(probe):
        raise StateError(
            "got the state of another probe; expected that of this one: features and scores of two"
            " probes do not add up"
        )
    try:
        return _memory(state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"the defence's state is damaged: {error}") from None


def _memory(state: Mapping[str, Any]) -> Memory:
    """A state whose hash, level and probe are checked."""
    return Memory(
        state["round"],
        copy.deepcopy(dict(state["state"])),
        {
            client: {**entry, "mean": _array(entry["mean"])}
            for client, entry in state["features"].items()
        },
        {client: Overruling(*word) for client, word in state["overruled"].items()},
        {
            name: {
                key: {client: torch.from_numpy(_array(row)) for client, row in rows.items()}
                for key, rows in remembered.items()
            }
            for name, remembered in state["rules"].items()
        },
        dict(state["seen"]),
        dict(state["played"]),
    )


def probe_digest(probe: Probe | None) -> str | None:
    """A hash of everything that a probe's scores depend on; None for no probe."""
    if probe is None:
        return None
    layout = probe.featurizer.layout
    plain = {
        "recipe": probe.featurizer.recipe.to_dict(),
        "kind": layout.kind,
        "slots": [[slot.module, slot.factor, list(slot.shape)] for slot in layout.slots],
        "scalings": dict(layout.scalings),
        "head": probe.head.name,
        "calibration": repr(probe.calibration),
    }
    whole = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(item.name for item in fields(probe.head)):
        for value in _parts(getattr(probe.head, name)):
            whole.update(name.encode() + b"\0" + value)
    return whole.hexdigest()


def _parts(value: Any) -> list[bytes]:
    """The bytes of a head's field: an array, several of them, or a plain value."""
    if isinstance(value, np.ndarray):
        return [f"{value.dtype.str}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()]
    if isinstance(value, tuple | list):
        return [part for item in value for part in _parts(item)]
    return [value if isinstance(value, bytes) else repr(value).encode()]


def _level_fields(level: Level | None) -> dict[str, Any] | None:
    """A level's name and parameters as JSON data: equal levels have equal ones."""
    if level is None:
        return None
    values: dict[str, Any] = {"name": level.name}
    if not is_dataclass(level):
        return {**values, "fields": repr(level)}
    for item in fields(level):
        value = getattr(level, item.name)
        is_plain = value is None or isinstance(value, bool | str)
        values[item.name] = value if is_plain else float(value)
    return values


def _hash(plain: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(plain, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StateError(f"the defence's state is no plain data: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()


def _text(array: Any) -> str:
    """A vector as "<type>:<base64 of its bytes>"."""
    numbers = np.asarray(array)
    return f"{numbers.dtype.str}:{base64.b64encode(numbers.tobytes()).decode()}"


def _array(text: str) -> np.ndarray:
    dtype, _, numbers = text.partition(":")
    array = np.frombuffer(base64.b64decode(numbers, validate=True), np.dtype(dtype)).copy()
    if not np.isfinite(array).all():
        raise ValueError("a vector of it holds NaN or infinity")
    return array
