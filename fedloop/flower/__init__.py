"""Flower as the engine.

The server's half of a federation in a ServerApp, one client's in a ClientApp.

Importing this package switches off Flower's telemetry and update checks in this process and in
those it starts.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtra, missing_extra

if TYPE_CHECKING:
    from .client import client_app
    from .server import server_app
    from .strategy import EngineStrategy

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
os.environ.update(QUIET)  # flwr reads them when it is imported, which is after this

_MODULE_OF = {
    "EngineStrategy": "strategy",
    "client_app": "client",
    "server_app": "server",
}

__all__ = ["QUIET", "EngineStrategy", "client_app", "server_app"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fedloop.flower' has no attribute {name!r}")
    try:
        module = import_module(f".{_MODULE_OF[name]}", __name__)
    except ImportError as error:
        raise missing_extra(error, f"{__name__}.{name}") from error
    return getattr(module, name)


def require_flower() -> None:
    """Say what a deployment lacks before anything of it is started.

    Raises:
        MissingExtra: flwr is not installed.
    """
    try:
        import flwr  # noqa: F401
    except ImportError as error:
        raise MissingExtra("flwr", "flower-deploy", "the Flower engine") from error
