"""What an operator does on the server's machine: enrol nodes, strike them, start runs."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...config import Config
from ...errors import ConfigError
from ..nodes import Node, check_name, read_nodes, write_nodes
from ..settings import EngineSettings
from .control import Control
from .launch import follow


def enrol(
    nodes: Path, name: str, key: Path, examples: int | None, address: str, authority: Path
) -> int:
    """Register a key and write its client into a nodes file: the node id.

    Raises:
        ConfigError: the name is taken or not valid, or the key cannot be read.
        EngineError: the key is registered already, or the SuperLink cannot be reached.
    """
    check_name(name)
    clients = read_nodes(nodes) if nodes.exists() else {}
    if name in clients:
        raise ConfigError(
            f"{nodes} has a client {name} already; expected a new name, or `fedloop flower"
            " unregister` first"
        )
    with Control(address, authority) as control:
        node_id, text = control.register(key)
    write_nodes(nodes, {**clients, name: Node(node_id, text, examples)})
    return node_id


def strike(nodes: Path, name: str, address: str, authority: Path) -> None:
    """Shut a client's node out and strike it from a nodes file.

    Raises:
        ConfigError: there is no such client.
        EngineError: the SuperLink cannot be reached, or does not know the node.
    """
    clients = read_nodes(nodes)
    if name not in clients:
        raise ConfigError(f"{nodes} has no client {name!r}; expected one of {', '.join(clients)}")
    with Control(address, authority) as control:
        control.unregister(clients[name].node_id)
    write_nodes(nodes, {client: node for client, node in clients.items() if client != name})


def start_and_follow(
    folder: Path, out: Path, address: str, authority: Path, say: Callable[[str], None]
) -> None:
    """Start the run of an app's folder, or go on with it, and report its rounds until it ends.

    Raises:
        ConfigError: configuration, nodes or settings are wrong.
        EngineError: the SuperLink cannot be reached, or the run fails.
    """
    config, nodes = Config.read(folder / "config.toml"), read_nodes(folder / "nodes.json")
    if config.clients.count != len(nodes):
        raise ConfigError(
            f"clients.count: got {config.clients.count}; expected {len(nodes)}, the number of"
            f" registered nodes: {', '.join(nodes)}"
        )
    EngineSettings.of(_defaults(folder / "pyproject.toml"))
    paths = {"config": folder / "config.toml", "nodes": folder / "nodes.json", "folder": out}
    with Control(address, authority) as control:
        run = control.start(folder, {name: str(path.resolve()) for name, path in paths.items()})
        say(f"run {run} started with {len(nodes)} nodes")

        def watch(what: str, number: int, client: str, value: float) -> None:
            if what == "round":
                say(f"round {number} of {config.rounds}: mean factor {value:.2f}")

        follow(control, run, out.resolve(), watch=watch)


def _defaults(path: Path) -> dict[str, Any]:
    """The run config of an app."""
    try:
        defaults: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]["flwr"][
            "app"
        ]["config"]
        return defaults
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not that of a Flower app: {error!r}. Expected a folder that `fedloop flower"
            " init` wrote."
        ) from None
