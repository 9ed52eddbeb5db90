"""The ServerApp: an experiment's file, a folder, the registered nodes.

It goes on where the folder's run was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraprobe.limits import RUN_CLIENTS, read_limited

from ..client.training import quiet
from ..config import Config
from ..errors import ConfigError, MissingExtra, StateError
from ..run.build import build_defended, build_federation
from ..run.folder import RunFolder, read_config, written_to
from ..run.global_lora import GlobalLoRA
from ..run.identity import base_digest
from ..run.plan import plan_round
from ..run.run import Model, Run, RunResult
from .agreement import Agreement
from .nodes import Node, read_nodes
from .settings import EngineSettings, check_experiment

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp


def server_app() -> ServerApp:
    """A ServerApp for `flwr run`.

    Its run config names `config`, `nodes` and `folder`, and the fields of `EngineSettings`.

    Raises:
        MissingExtra: flwr is not installed.
    """
    try:
        from flwr.serverapp import ServerApp
    except ImportError as error:
        raise MissingExtra("flwr", "flower", "the Flower engine") from error
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, context.run_config)

    return app


def serve(grid: Grid, run_config: Mapping[str, Any]) -> RunResult:
    """Play a run to its end, or from where it stopped.

    Raises:
        ConfigError: the configuration, or the nodes do not fit it.
        EngineError: nobody sent anything usable for too long.
        StateError: the folder holds another experiment or a damaged one.
    """
    from .strategy import EngineStrategy

    quiet()
    settings = EngineSettings.of(run_config)
    folder = Path(str(run_config["folder"]))
    config = _config(Path(str(run_config["config"])), folder)
    nodes = read_nodes(Path(str(run_config["nodes"])))
    if config.clients.count != len(nodes):
        raise ConfigError(
            f"clients.count: got {config.clients.count}; expected {len(nodes)}, the number of"
            f" registered nodes: {', '.join(nodes)}"
        )
    roles = _roles(folder, nodes)
    malicious = [client for client, role in roles.items() if role["role"] == "malicious"]
    with RunFolder.create(folder, config, roles) as run_folder:
        federation, model = _federation(config, _registered(nodes), folder)
        with Run(config, federation, run_folder, model=model) as run:
            agreement = Agreement.of(config, federation, settings.wire)
            EngineStrategy(
                federation,
                {name: node.node_id for name, node in nodes.items()},
                partial(plan_round, config),
                agreement,
                settings,
                run.finish,
                run.ahead(),
                malicious=malicious,
            ).start(grid)
        return run.result(roles)


def _config(path: Path, folder: Path) -> Config:
    """The experiment: a TOML file, or a run's own config.json."""
    config = read_config(path.parent) if path.suffix == ".json" else Config.read(path)
    check_experiment(config)
    return written_to(config, folder)


def _roles(folder: Path, nodes: Mapping[str, Node]) -> dict[str, dict[str, Any]]:
    """What an experiment knows of its clients; of a real client nobody knows what it is."""
    try:
        roles: dict[str, dict[str, Any]] = json.loads(
            read_limited(folder / "clients.json", RUN_CLIENTS, StateError)
        )
    except FileNotFoundError:
        return {name: {"role": "unknown", "source": "its own data", "share": 1.0} for name in nodes}
    return roles


def _registered(nodes: Mapping[str, Node]) -> dict[str, int] | None:
    """Client -> example count, if that of every node was registered."""
    counts = {name: node.examples for name, node in nodes.items() if node.examples is not None}
    return counts if len(counts) == len(nodes) else None


def _federation(
    config: Config, registered: Mapping[str, int] | None, folder: Path
) -> tuple[GlobalLoRA, Model | None]:
    """The server's half, and a function that gives the model to measure.

    Without measurements the model is not kept in memory.
    """
    measured = config.evaluation
    if measured.harmful or measured.safe or measured.utility:
        federation = build_federation(config, folder, registered)
        return federation, federation.model_for_measuring
    adapted, _, initial, defense = build_defended(config, registered)
    digest = base_digest(adapted)
    return GlobalLoRA(initial, defense, config, folder=folder, base_digest=digest), None
