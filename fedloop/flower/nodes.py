"""Which Flower node is which client: a file on the server, written when keys are registered.

No node has a say in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraprobe.limits import RUN_CLIENTS, read_limited

from ..errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Node:
    """A registered client.

    Attributes:
        node_id: Flower's; it stays the same for as long as the key is registered.
        key: the public key, as OpenSSH writes it.
        examples: how many examples count for it; None for what it claims, capped (see
            `fedloop.defense.defense`).
    """

    node_id: int
    key: str
    examples: int | None = None


def read_nodes(path: Path) -> dict[str, Node]:
    """Client -> node, in the order of their names.

    Raises:
        ConfigError: the file is missing or damaged, names a node twice, or has example counts for
            some clients only.
    """
    try:
        plain = json.loads(read_limited(path, RUN_CLIENTS, ConfigError))
        nodes = {
            name: Node(int(entry["node"]), str(entry["key"]), entry.get("examples"))
            for name, entry in sorted(plain.items())
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"cannot read {path}: {error!r}. Expected the nodes that `fedloop flower register`"
            " wrote."
        ) from None
    if not nodes:
        raise ConfigError(
            f"{path} names no node; expected at least one: register its key with `fedloop flower"
            " register`"
        )
    if len({node.node_id for node in nodes.values()}) != len(nodes):
        raise ConfigError(f"{path} names a node twice; expected one client a node")
    counts = [node.examples for node in nodes.values()]
    if any(count is not None for count in counts) and not all(
        type(count) is int and count > 0 for count in counts
    ):
        raise ConfigError(
            f"{path} has the example counts {counts}; expected a whole number above 0 for every"
            " client, or for none"
        )
    return nodes


def write_nodes(path: Path, nodes: Mapping[str, Node]) -> None:
    """The inverse of `read_nodes`."""
    plain: dict[str, dict[str, object]] = {
        name: {"node": str(node.node_id), "key": node.key} for name, node in nodes.items()
    }
    for name, node in nodes.items():
        if node.examples is not None:
            plain[name]["examples"] = node.examples
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def check_name(name: str) -> None:
    """Whether a client can be called this: it stands in records, files and tables.

    Raises:
        ConfigError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"got the client name {name!r}; expected up to 64 letters, digits, dots, dashes or"
            " underscores"
        )
