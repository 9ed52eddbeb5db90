"""The process: an application on uvicorn, until it is told to stop."""

from __future__ import annotations

import gc
import signal
import socket
import sys
from dataclasses import replace

from ..errors import MissingExtra
from .logs import log, log_to_stderr
from .settings import Settings, is_address

FINISHING_SECONDS = 30
"""How long requests in flight may take after the word to stop.

Scoring in a thread is finished in any case.
"""
BACKLOG = 1024


def run(settings: Settings, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT.

    Requests in flight are finished, new ones refused, then the process exits with 0.

    Raises:
        MissingExtra: the extra is not installed.
        ServiceError: the settings ask for something that cannot be.
        OSError: the address cannot be listened on.
        SystemExit: at the end.
    """
    try:
        import httptools  # noqa: F401  # uvicorn would take h11 instead
        import uvicorn
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "serve", "The scoring service") from None
    from . import create_app

    if host and not is_address(host):
        settings = replace(settings, hosts=(*settings.hosts, host))
    app = create_app(settings)
    listening = _listening(host, port)
    log_to_stderr()
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=max(1, round(settings.timeout)),
        timeout_graceful_shutdown=FINISHING_SECONDS,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again when it has finished
        signal.signal(number, lambda *_: sys.exit(0))
    gc.collect()
    # What was imported stays; to look through it again and again would be the slowest requests.
    gc.freeze()
    address = listening.getsockname()
    log("serving", {"host": address[0], "port": address[1], "probes": sorted(settings.probes)})
    uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that asyncio takes for TCP and sends from without delay.

    For one without the protocol's number it does not.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening
