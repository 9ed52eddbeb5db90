"""The parts of a defence from what its caller gives: a probe, a level, names of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraprobe.adapters.layout import Layout
from loraprobe.probe import Probe

from ..errors import ConfigError, EvidenceError
from .levels import LEVELS, UPDATE_FEATURES, Level, make_level
from .scoring import makes_unit_vectors

DEFAULT = "default"  # the level's name: "cumulative" with a probe, none without
OF_PROBE = ("threshold", "floor", "gap", "watch")  # of the cumulative level, in a probe's facts


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


def checked_layout(layout: Any) -> Layout | None:
    """A layout or None as it is; raise ConfigError for anything else."""
    if not isinstance(layout, Layout | None):
        raise ConfigError(
            f"got a layout of type {type(layout).__name__}; expected a Layout, such as"
            " Layout.of(adapter), or None for that of the round's start"
        )
    return layout


def level_for(probe: Probe, name: str, options: Mapping[str, Any] | None = None) -> Level:
    """A level with fields as fits a probe.

    The cumulative level leaves means as long as they are where the probe's features are no unit
    vectors; threshold, floor, gap and watch are those of the probe's facts "cumulative", if it has
    any: what was measured on benign data that the probe has not seen. Other fields have their
    defaults, and an option goes before all.

    Raises:
        ConfigError: no such level or field, or a value that is not valid.
    """
    values = dict(options or {})
    if name != "cumulative" or values.get("evidence", UPDATE_FEATURES) != UPDATE_FEATURES:
        return make_level(name, **values)
    facts = {} if values.keys() >= set(OF_PROBE) else _facts_of_rounds(probe)
    fitting = {"normalize": makes_unit_vectors(probe.featurizer), **facts}
    return make_level("cumulative", **fitting | values)


def _facts_of_rounds(probe: Probe) -> Mapping[str, Any]:
    """A probe's facts "cumulative", checked: whoever published it wrote them."""
    facts = probe.facts.get("cumulative", {})
    try:
        if not isinstance(facts, Mapping) or set(facts) - set(OF_PROBE):
            raise ConfigError(f"got {facts!r:.200}; expected some of {', '.join(OF_PROBE)}")
        make_level("cumulative", **facts)
    except ConfigError as error:
        raise ConfigError(
            f"the probe's facts on the cumulative level: {error}. Use another probe, or give all of"
            f" {', '.join(OF_PROBE)} yourself."
        ) from None
    return facts


def named_level(level: Level | str | None, probe: Probe | None) -> Level | None:
    """A level as it is, or the one of a name with fields as fits the probe.

    Raises:
        ConfigError: it is no level.
        EvidenceError: a level without a probe, or a probe without a level.
    """
    name = level
    if name == DEFAULT:
        name = "cumulative" if probe is not None else None
    if isinstance(name, str) and probe is not None:
        return level_for(probe, name)
    instance = make_level(name) if isinstance(name, str) else name
    if instance is not None and not isinstance(instance, Level):
        raise ConfigError(
            f"got a level of type {type(instance).__name__}; expected one of {', '.join(LEVELS)}"
        )
    if (probe is None) != (instance is None):
        raise EvidenceError(
            "got a probe without a level or a level without a probe; expected both, or neither"
            " for no defence"
        )
    return instance
