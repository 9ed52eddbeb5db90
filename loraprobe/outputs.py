"""Where a command writes: never over what is there, unless it is told to."""

from __future__ import annotations

from pathlib import Path

from .errors import OutputError


def free_path(path: Path, force: bool = False) -> Path:
    """The path, if nothing is there but perhaps an empty folder, or if `force` says so.

    Raises:
        OutputError: something is there.
    """
    taken = any(path.iterdir()) if path.is_dir() else path.exists() or path.is_symlink()
    if taken and not force:
        kind = "is a folder that is not empty" if path.is_dir() else "exists"
        raise OutputError(f"{path} {kind}; name another, or pass --force to write over it")
    return path
