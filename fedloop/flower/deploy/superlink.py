"""A SuperLink that sites can reach and only its own machine can command.

Flower 1.41 serves three APIs on one port. Nodes need the Fleet API, and sign every call to it. The
Control API (register nodes, start any code on the server and on the clients) and the Runtime API
have no authentication in the free edition: whoever reaches the port could use them. Here they
answer to this machine alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .. import require_flower
from .processes import child_environment

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]

_FOR_NODES = "/v1/fleet/"
_THIS_MACHINE = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


class LocalCommand:
    """ASGI middleware: from other machines, nothing but the Fleet API."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        peer = (scope.get("client") or ("unknown",))[0]
        if (
            scope["type"] == "lifespan"
            or peer in _THIS_MACHINE
            or (scope["type"] == "http" and str(scope["path"]).startswith(_FOR_NODES))
        ):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send(
                {
                    "type": "http.response.start",
                    "status": 403,
                    "headers": [(b"content-type", b"text/plain")],
                }
            )
            await send(
                {
                    "type": "http.response.body",
                    "body": b"only the server's own machine may command it\n",
                }
            )
        else:
            await send({"type": "websocket.close", "code": 1008})


def run_superlink(host: str, port: int, certificates: Path, database: Path) -> None:
    """Serve until SIGTERM or SIGINT.

    With TLS, registered node keys only, and commands from this machine only.

    Args:
        certificates: a folder with ca.crt, server.pem and server.key.
        database: keeps the registered nodes over a restart; Flower's own files go to a folder
            `flwr` beside it, unless FLWR_HOME is set.
            Adapters on their way are in memory alone: what a site sends does not end up on the
            server's disk, and a restart loses nothing that a run goes on from.

    Raises:
        ConfigError: a certificate is missing.
        MissingExtra: flwr is not installed.
    """
    require_flower()
    files = {
        flag: certificates / name
        for flag, name in (
            ("ca-certfile", "ca.crt"),
            ("certfile", "server.pem"),
            ("keyfile", "server.key"),
        )
    }
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise ConfigError(
            f"cannot find {', '.join(missing)}; expected ca.crt, server.pem and server.key:"
            " docs/flower.md says how to make them"
        )
    os.environ.update(
        child_environment(Path(os.environ.get("FLWR_HOME", database.resolve().parent / "flwr")))
    )
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink import config_loader, main
    from flwr.superlink.cli.flower_superlink import flower_superlink

    plain: Callable[..., Any] = main.create_app

    def create_app(*arguments: Any, **options: Any) -> Any:
        app = plain(*arguments, **options)
        app.add_middleware(LocalCommand)
        return app

    main.create_app = create_app
    config_loader.ObjectStoreFactory = lambda _database: ObjectStoreFactory()  # type: ignore[assignment,attr-defined,misc]
    os.environ["FORWARDED_ALLOW_IPS"] = (
        "127.0.0.1"  # whom uvicorn believes that a request comes from somewhere else
    )
    sys.argv = [
        "flower-superlink",
        "--host",
        host,
        "--port",
        str(port),
        "--database",
        str(database),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *(part for flag, path in files.items() for part in (f"--ssl-{flag}", str(path))),
    ]
    flower_superlink()


if __name__ == "__main__":
    _host, _port, _certificates, _database = sys.argv[1:]
    run_superlink(_host, int(_port), Path(_certificates), Path(_database))
