"""The HTTP scoring service.

`loraprobe serve` on the command line, `create_app` for an ASGI server, `ScoringClient` to ask it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .client import ScoringClient
from .settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["ScoringClient", "Settings", "create_app"]


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application; FastAPI is imported when it is called.

    Raises:
        MissingExtra: FastAPI, another part of the extra or a head's library is not installed.
        ServiceError: the settings ask for something that cannot be.
    """
    from ..errors import MissingExtra

    try:
        from .app import create_app as create
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "serve", "The scoring service") from None
    return create(settings)
