"""The process: an application behind guarded connections, until it is told to stop."""

from __future__ import annotations

import gc
import signal
import socket
import sys
from functools import partial
from typing import Any

from ..errors import MissingExtra
from .answers import Refusal
from .app import create_app
from .logs import log, log_to_stderr
from .metrics import Metrics
from .settings import Settings

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
        OSError: the address cannot be listened on.
        SystemExit: at the end.
    """
    try:
        import uvicorn

        from .protocol import GuardedProtocol
    except ImportError:
        raise MissingExtra("uvicorn", "serve", "The scoring service") from None
    import torch

    # Requests run beside each other; threads inside one would only wait for those of the next.
    torch.set_num_threads(1)
    metrics = Metrics()
    app = create_app(settings, metrics)
    listening = _listening(host, port)
    log_to_stderr()

    def refused(refusal: Refusal) -> None:
        metrics.count_request("none", refusal.status, refusal.type)
        log("refused", {"status": refusal.status, "error": refusal.type})

    protocol: Any = partial(GuardedProtocol, settings, refused)  # called as a class would be
    config = uvicorn.Config(
        app,
        http=protocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=FINISHING_SECONDS,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, lambda *_: sys.exit(0)
        )  # uvicorn raises the signal again when it has finished
    gc.collect()
    # what was imported stays; to look through it again and again would be the slowest requests
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
