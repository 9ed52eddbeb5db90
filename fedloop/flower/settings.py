"""The settings of the engine itself: how long to wait, how to send.

What is trained stands in the experiment's own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..checks import check_names, is_integer, is_number
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config import Config

DTYPES = ("float32", "float16")
PATHS = ("config", "nodes", "folder")  # what a run config names beside the settings


@dataclass(frozen=True)
class EngineSettings:
    """How the server talks to its clients.

    Attributes:
        round_timeout: seconds from sending a round until who has not answered is missing; also how
            long a message lives. A client's first round includes loading its base model.
        connect_timeout: seconds to wait for the clients of the first round to come online, and for
            anybody at all later on.
        wire: the type of all arrays that are sent; float16 halves the bytes.
        max_empty_rounds: after so many rounds in a row without a single usable reply the run stops.

    Raises:
        ConfigError: a value is out of range.
    """

    round_timeout: float = 600.0
    connect_timeout: float = 120.0
    wire: str = "float32"
    max_empty_rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("round_timeout", "connect_timeout"):
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise ConfigError(
                    f"{key(name)}: got {value!r}; expected a number of seconds above 0"
                )
        if self.wire not in DTYPES:
            raise ConfigError(f"wire: got {self.wire!r}; expected one of {', '.join(DTYPES)}")
        if not is_integer(self.max_empty_rounds, 1):
            raise ConfigError(
                f"max-empty-rounds: got {self.max_empty_rounds!r}; expected a whole number of at"
                " least 1"
            )

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> EngineSettings:
        """From a Flower app's run config; what it does not name keeps its default.

        Raises:
            ConfigError: a name is unknown, or a value out of range.
        """
        names = [*PATHS, *(key(field.name) for field in fields(cls))]
        check_names("the run config has no", run_config, names)
        return cls(
            **{
                field.name: run_config[key(field.name)]
                for field in fields(cls)
                if key(field.name) in run_config
            }
        )

    def run_config(self) -> dict[str, Any]:
        """The inverse of `of`."""
        return {key(field.name): getattr(self, field.name) for field in fields(self)}


def key(name: str) -> str:
    """A field as a Flower app writes it."""
    return name.replace("_", "-")


def check_experiment(config: Config) -> None:
    """Raise ConfigError where an experiment has what nodes are not told of."""
    alone = {"evade_probe": None, "attack_from": 1}
    if fields := [name for name, none in alone.items() if getattr(config.clients, name) != none]:
        raise ConfigError(
            f"got clients.{fields[0]}; expected it in a run of one process (`fedloop run`): nodes"
            " are not told of it"
        )
