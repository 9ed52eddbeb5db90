"""One site: a SuperNode that talks to the server, and beside it the process that trains, as one
command that ends as a whole.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from ...errors import ConfigError
from .. import require_flower
from .processes import Processes, flower_command, free_port
from .runner import end_on_sigterm, node_app, run_tasks


def run_node(
    superlink: str, authority: Path, key: Path, config: Mapping[str, str | int]
) -> NoReturn:
    """Take part until SIGTERM.

    Args:
        superlink: host:port of the server, as in its certificate.
        authority: the certificate of the authority that signed it.
        key: this node's private key.
        config: what `fedloop.flower.client` reads of a node config.

    Raises:
        ConfigError: a file is missing.
        EngineError: the SuperNode has ended; its output says why.
        MissingExtra: flwr is not installed.
    """
    require_flower()
    for path in (authority, key):
        if not path.is_file():
            raise ConfigError(
                f"cannot find {path}; expected the server's ca.crt and this node's private key"
            )
    end_on_sigterm()
    # first, because it imports slowly: the server should take a node for connected once it can work
    app = node_app()
    with tempfile.TemporaryDirectory(prefix="fedloop-node-") as scratch:
        secret, port = new_secret(Path(scratch) / "secret"), free_port()
        written = write_node_config(Path(scratch) / "node.toml", config)
        with Processes(Path(scratch) / "flwr", None) as group:
            group.start(
                "the SuperNode", supernode(superlink, authority, key, port, secret, written)
            )
            run_tasks([f"127.0.0.1:{port}"], secret.read_bytes(), app, group.check)


def supernode(
    superlink: str, authority: Path, key: Path, port: int, secret: Path, config: Path
) -> list[str]:
    """The command of a SuperNode that leaves its work to whoever knows the secret."""
    return [
        str(flower_command("flower-supernode")),
        "--superlink",
        superlink,
        "--root-certificates",
        str(authority),
        "--auth-supernode-private-key",
        str(key),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--isolation",
        "process",
        "--superexec-auth-secret-file",
        str(secret),
        "--node-config",
        str(config),
    ]


def new_secret(path: Path) -> Path:
    """A file with a secret that nobody else can read."""
    path.touch(0o600)
    path.write_bytes(secrets.token_bytes(32))
    return path


def write_node_config(path: Path, config: Mapping[str, str | int]) -> Path:
    """A node config as the TOML file that a SuperNode reads."""
    import tomli_w

    path.write_text(tomli_w.dumps(dict(config)), encoding="utf-8")
    return path
