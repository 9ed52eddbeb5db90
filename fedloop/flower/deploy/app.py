"""The Flower app that a run is started with: a template, copied."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ...errors import ConfigError

FILES = (
    "pyproject.toml",
    "config.toml",
    "fedloop_app/__init__.py",
    "fedloop_app/server_app.py",
    "fedloop_app/client_app.py",
)


def write_app(folder: Path) -> list[Path]:
    """The template's files in a new or empty folder; what was written.

    Raises:
        ConfigError: the folder holds something, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty; expected a new or empty folder for the app")
        source, written = files("fedloop.flower") / "template", []
        for name in FILES:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(source.joinpath(name).read_text(encoding="utf-8"), encoding="utf-8")
            written.append(path)
        return written
    except OSError as error:
        raise ConfigError(f"cannot write an app to {folder}: {error}") from error
