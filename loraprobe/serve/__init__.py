"""The HTTP scoring service.

`create_app` for an ASGI server, `loraprobe serve` on the command line, `client` to talk to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .settings import Settings

__all__ = ["create_app"]


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application; see `loraprobe.serve.app`.

    Torch and FastAPI are imported when it is called.

    Deadlines for headers and for clients that do not read belong to the connection: only
    `loraprobe.serve.server.run` has them. Behind another ASGI server, that server has to set its
    own.
    """
    from .app import create_app as create

    return create(settings)
