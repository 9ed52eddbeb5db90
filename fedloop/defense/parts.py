"""The parts of a defence from what its caller gives: a probe, a level, names of them."""

from __future__ import annotations

from pathlib import Path

from loraprobe.probe import Probe

from ..errors import ConfigError, EvidenceError
from .levels import LEVELS, Level, make_level
from .scoring import makes_unit_vectors

DEFAULT = "default"  # the level's name: "cumulative" with a probe, none without


def loaded_probe(probe: Probe | str | Path | None) -> Probe | None:
    """A probe as it is, or the one of a folder or Hub id.

    Raises:
        ConfigError: it is none of these. ProbeFormatError, HubError: it cannot be loaded.
    """
    if probe is None or isinstance(probe, Probe):
        return probe
    if isinstance(probe, str | Path):
        return Probe.from_pretrained(probe)
    raise ConfigError(
        f"got a probe of type {type(probe).__name__}; expected a Probe, or the folder or Hub id of"
        " one"
    )


def named_level(level: Level | str | None, probe: Probe | None) -> Level | None:
    """A level as it is, or the one of a name with its default fields, as fits the probe.

    Raises:
        ConfigError: it is no level.
        EvidenceError: a level without a probe, or a probe without a level.
    """
    name = level
    if name == DEFAULT:
        name = "cumulative" if probe is not None else None
    if name == "cumulative" and probe is not None:
        return make_level("cumulative", normalize=makes_unit_vectors(probe.featurizer))
    found = make_level(name) if isinstance(name, str) else name
    if found is not None and not isinstance(found, Level):
        raise ConfigError(
            f"got a level of type {type(found).__name__}; expected one of {', '.join(LEVELS)}"
        )
    if (probe is None) != (found is None):
        raise EvidenceError(
            "got a probe without a level or a level without a probe; expected both, or neither"
            " for no defence"
        )
    return found
