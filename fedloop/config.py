"""An experiment as a TOML file, checked before anything runs; its tables are `fedloop.sections`.

Relative paths are taken from the folder of the file, or from the working directory for a
configuration given as a dict.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, model_validator

from loraprobe.limits import SETTINGS, read_limited

from .errors import ConfigError
from .sections import (
    AggregationConfig,
    ClientsConfig,
    DefenseConfig,
    EvaluationConfig,
    LoRAConfig,
    ModelConfig,
    Natural,
    OutputConfig,
    Positive,
    Section,
    TrainingConfig,
)


class Config(Section):
    """One experiment."""

    name: str = "run"
    seed: Natural = 0
    rounds: Positive = 100
    model: ModelConfig
    lora: LoRAConfig = LoRAConfig()
    training: TrainingConfig = TrainingConfig()
    clients: ClientsConfig
    defense: DefenseConfig = DefenseConfig()
    aggregation: AggregationConfig = AggregationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _foldable(self) -> Config:
        if self.aggregation.lora == "exact" and self.model.quantization != "none":
            raise ValueError(
                "aggregation.lora 'exact' adds to the base's weights; got model.quantization"
                f" {self.model.quantization!r}, expected 'none'"
            )
        return self

    @model_validator(mode="after")
    def _something_to_evade(self) -> Config:
        if self.clients.evade_probe is not None and (
            self.defense.probe is None or self.defense.level == "none"
        ):
            raise ValueError(
                "got clients.evade_probe without a defense.probe and a defense.level that reads it;"
                " expected both, or neither"
            )
        if self.clients.evade_probe is not None and (
            self.aggregation.lora == "frozen_a" or self.defense.level in ("shadow", "evidence")
        ):
            raise ValueError(
                f"got clients.evade_probe with aggregation.lora {self.aggregation.lora!r} and"
                f" defense.level {self.defense.level!r}; expected a trained A, and a level without"
                " a shadow branch: attackers move both factors of what they train from the round's"
                " start"
            )
        if self.clients.attack_from > self.rounds:
            raise ValueError(
                f"got clients.attack_from {self.clients.attack_from} and {self.rounds} rounds;"
                " expected one of them, or nobody attacks"
            )
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """Check a nested dict.

        Raises:
            ConfigError: names every field that is wrong, what it got and what is valid.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [_line(detail) for detail in error.errors()]
            raise ConfigError("the configuration is not valid:\n" + "\n".join(lines)) from None

    @classmethod
    def read(cls, path: str | Path) -> Config:
        """Read a TOML file; relative paths in it are taken from its folder.

        Raises:
            ConfigError: the file is missing, not TOML, or `of` refuses it.
        """
        return cls.of(read_values(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; relative paths in them are taken from its folder.

    Raises:
        ConfigError: the file is missing, or not TOML.
    """
    path = Path(path)
    try:
        values = tomllib.loads(read_limited(path, SETTINGS).decode())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}. Expected a TOML file; `fedloop example` prints one."
        ) from None
    return _from_folder(values, path.parent.resolve())


_PATHS = {
    "model": ("base",),
    "clients": ("benign", "malicious_source", "hard_negative_source"),
    "defense": ("probe", "behaviour"),
    "evaluation": ("harmful", "safe", "utility", "judge", "reward_model"),
    "output": ("folder",),
}


def _from_folder(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values with paths below the file's folder made absolute, for a resume from anywhere.

    Relative ones that exist there, and the output folder always.
    """

    def moved(value: Any, must: bool) -> Any:
        if isinstance(value, list):
            return [moved(item, must) for item in value]
        if not isinstance(value, str) or Path(value).is_absolute():
            return value
        return str(folder / value) if must or os.path.exists(folder / value) else value

    changed = dict(values)
    for section, fields in _PATHS.items():
        if isinstance(values.get(section), dict):
            changed[section] = {
                key: moved(value, key == "folder") if key in fields else value
                for key, value in values[section].items()
            }
    return changed


def _line(detail: Any) -> str:
    """One wrong field, in a line."""
    field = ".".join(str(part) for part in detail["loc"]) or "the file"
    message = detail["msg"].removeprefix("Value error, ")
    got = "" if detail["type"] in ("missing", "value_error") else f"; got {detail['input']!r}"
    if detail["type"] == "extra_forbidden":
        message = f"unknown field; expected one of {', '.join(_fields(detail['loc'][:-1]))}"
        got = ""
    return f"  {field}: {message}{got}"


def _fields(path: tuple[str | int, ...]) -> list[str]:
    """The valid fields of the table at this path."""
    section: type[BaseModel] = Config
    for part in path:
        # Tables are sections, and only these forbid extra fields.
        section = section.model_fields[str(part)].annotation  # type: ignore[assignment]
    return list(section.model_fields)
