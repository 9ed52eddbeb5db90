"""What a place allows: a TOML file, checked field by field before anything is scanned."""

from __future__ import annotations

import hashlib
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import PolicyError
from ..limits import SETTINGS, read_limited
from ..trust import checked_list
from .findings import DECISIONS, RULES, Decision


@dataclass(frozen=True)
class Policy:
    """What is allowed. Every field is optional; an unknown one is an error.

    Attributes:
        base_models: names of the one base model that adapters may be for.
        base_revision: its commit; an adapter whose config states another is for another base.
        base_weights: a local file of the base model's weights, whose digest has to be
            `base_sha256` before anything is scanned.
        base_sha256: 64 hexadecimal digits.
        modules: last parts of the module names that may change ("q_proj"); None for any.
        max_rank: the largest rank.
        max_norm: the largest Frobenius norm of BA over all modules.
        any_base: whether adapters of a base model with another name than the probe's are scored.
        probes: folders or Hub ids ("org/name@commit"); a relative folder starts at the file's.
        trusted: what the probes have to be among (`loraprobe.trust`); None for no such list.
        reference: a file that `loraprobe scan --save-reference` wrote: the cohort to compare with.
        max_deviation: median absolute deviations from the cohort's median.
        levels: rule -> "allow", "review" or "block", instead of the default in `RULES`.

    Raises:
        PolicyError: a value is not what its field takes.
    """

    base_models: tuple[str, ...] = ()
    base_revision: str | None = None
    base_weights: str | None = None
    base_sha256: str | None = None
    modules: tuple[str, ...] | None = None
    max_rank: int | None = None
    max_norm: float | None = None
    any_base: bool = False
    probes: tuple[str, ...] = ()
    trusted: tuple[str, ...] | None = None
    reference: str | None = None
    max_deviation: float = 8.0
    levels: Mapping[str, Decision] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("base_models", "modules", "probes"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _names(name, value))
        if self.trusted is not None:
            object.__setattr__(self, "trusted", checked_list(self.trusted, "policy"))
        for name in ("base_revision", "base_weights", "base_sha256", "reference"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise PolicyError(f"{name}: got {value!r}; expected a text")
        if self.base_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.base_sha256):
            raise PolicyError(
                f"base_sha256: got {self.base_sha256!r}; expected 64 hexadecimal digits, in lower"
                " case, as `sha256sum` prints them"
            )
        if not isinstance(self.any_base, bool):
            raise PolicyError(f"any_base: got {self.any_base!r}; expected true or false")
        if self.max_rank is not None and not (type(self.max_rank) is int and self.max_rank > 0):
            raise PolicyError(f"max_rank: got {self.max_rank!r}; expected a whole number above 0")
        for name in ("max_norm", "max_deviation"):
            value = getattr(self, name)
            if value is not None and not _is_positive(value):
                raise PolicyError(f"{name}: got {value!r}; expected a finite number above 0")
        for rule, level in _table("levels", self.levels).items():
            if rule not in RULES:
                raise PolicyError(f"levels: got {rule!r}; expected some of {', '.join(RULES)}")
            if level not in DECISIONS:
                raise PolicyError(f"levels.{rule}: got {level!r}; expected {', '.join(DECISIONS)}")
        if (self.base_weights is None) != (self.base_sha256 is None):
            raise PolicyError("got base_weights or base_sha256 alone; expected both or neither")

    @classmethod
    def read(cls, path: str | Path) -> Policy:
        """Read a TOML file.

        Raises:
            PolicyError: it is missing, no TOML, or a field is unknown or wrong.
        """
        path = Path(path)
        try:
            values = tomllib.loads(read_limited(path, SETTINGS, PolicyError).decode())
        except PolicyError:
            raise
        except (OSError, ValueError) as error:
            raise PolicyError(f"cannot read the policy {str(path)!r}: {error}") from None
        names = _field_names()
        if unknown := values.keys() - set(names):
            got = ", ".join(sorted(unknown))
            raise PolicyError(f"{path}: got {got}; expected some of {', '.join(names)}")
        policy = cls(**values)
        return policy.relative_to(path.parent)

    def relative_to(self, folder: Path) -> Policy:
        """The same policy, its existing relative paths starting at a folder."""
        changes: dict[str, Any] = {name: getattr(self, name) for name in _field_names()}
        changes["probes"] = tuple(_resolved(folder, probe) for probe in self.probes)
        for name in ("reference", "base_weights"):
            if changes[name] is not None:
                changes[name] = _resolved(folder, changes[name])
        return Policy(**changes)

    def level(self, rule: str) -> Decision:
        """What a finding of this rule leads to."""
        return self.levels.get(rule, RULES[rule].level)

    def check_base(self) -> None:
        """Compare the pinned base model's weights with their digest.

        Raises:
            PolicyError: the file is missing or another one.
        """
        if self.base_weights is None:
            return
        try:
            with open(self.base_weights, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise PolicyError(f"base_weights: {error}") from None
        if digest != self.base_sha256:
            raise PolicyError(
                f"base_sha256: got a file of digest {digest}; expected {self.base_sha256}. The"
                " base model is not the pinned one."
            )


def _field_names() -> list[str]:
    return [entry.name for entry in fields(Policy)]


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise PolicyError(f"{name}: got {value!r}; expected a list of texts")
    if not all(isinstance(text, str) and text for text in value):
        raise PolicyError(f"{name}: got {value!r}; expected texts that are not empty")
    return tuple(value)


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PolicyError(f"{name}: got {value!r}; expected a table")
    return value


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def _resolved(folder: Path, name: str) -> str:
    inside = folder / name
    return str(inside) if os.path.exists(inside) else name
