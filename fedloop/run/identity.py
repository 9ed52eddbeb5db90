"""What a run is, by content: its configuration and digests of its data, its probe and its base.

It lies in every checkpoint. Files that moved are the same run; files that changed are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import Config
from ..data.clients import Client
from ..errors import StateError

if TYPE_CHECKING:
    from torch.nn import Module

CHANGEABLE = ("rounds", "evaluation")  # by a flag, and recorded
# Where something lies does not matter if it is known to be the same.
_PLACES = {
    "base": ("model.base", "model.revision"),
    "probe": ("defense.probe", "defense.probe_revision"),
    "data": ("clients.benign", "clients.malicious_source", "clients.hard_negative_source"),
}
_WORDS = {"base": "the base model's weights", "probe": "the probe", "data": "the clients' data"}

Content = Mapping[str, str | None]
"""{"base", "probe", "data"} -> a digest, or None where it is not known."""


def data_digest(clients: Sequence[Client]) -> str:
    """A hash of who holds which examples."""
    plain = [[client.client_id, list(map(str, client.examples))] for client in clients]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def base_digest(model: Module) -> str:
    """A hash of a base model's parameters, adapters left out."""
    whole = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            whole.update(f"{plain} {parameter.dtype} {tuple(parameter.shape)}\0".encode())
            numbers = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
            whole.update(numbers.numpy().data)
    return whole.hexdigest()


def check_content(folder: Path, former: Content, content: Content) -> dict[str, str | None]:
    """What is known of a run's content, once it is seen to be the same.

    Raises:
        StateError: a digest is another than the run began with.
    """
    other = [
        what
        for what, digest in content.items()
        if digest is not None and former.get(what) not in (None, digest)
    ]
    if other:
        raise StateError(
            f"{folder}: {' and '.join(_WORDS[what] for what in other)} changed since the run began;"
            " expected the same content, wherever it lies. Restore it, or use a new folder."
        )
    recorded = {what: digest for what, digest in former.items() if digest is not None}
    return {**content, **recorded}


def plain_config(config: Config) -> dict[str, Any]:
    """Everything of a configuration that decides the result; where it is written does not."""
    return config.model_dump(mode="json", exclude={"output", "name"})


def changes(former: Mapping[str, Any], config: Config, content: Content) -> dict[str, list[Any]]:
    """Field -> [former value, new value] of what differs.

    Args:
        former: as `plain_config` returned it.
        content: what is compared by digests, so that its place does not matter.
    """
    digested = {place for what, places in _PLACES.items() if content.get(what) for place in places}
    old, new = _flat(former), _flat(plain_config(config))
    return {
        field: [old.get(field), new.get(field)]
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field) and field not in digested
    }


def may_change(field: str, by: Collection[str] = CHANGEABLE) -> bool:
    """Whether one of these flags of `fedloop resume` changes this field."""
    return field.partition(".")[0] in by


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the sections, as "section.field"."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{field}": entry for field, entry in value.items()}
        else:
            flat[name] = value
    return flat
