"""Where a command writes: never over what is there, unless it is told to."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import OutputError


def free_path(path: Path, force: bool = False, *, file: bool = False) -> Path:
    """The path, if nothing is there but perhaps an empty folder, or if `force` says so; the folder
    that it is to lie in is made.

    Args:
        file: whether a file is to be written, which no folder may stand in the way of.

    Raises:
        OutputError: something is there, or nothing can be written: before any work is done.
    """
    is_folder = path.is_dir()
    if file and is_folder:
        raise OutputError(f"{path} is a folder; expected the name of a file")
    taken = any(path.iterdir()) if is_folder else path.exists() or path.is_symlink()
    if taken and not force:
        kind = "is a folder that is not empty" if is_folder else "exists"
        raise OutputError(f"{path} {kind}; name another, or pass --force to write over it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path if taken or is_folder else path.parent, os.W_OK)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}. Name another") from None
    if not writable:
        raise OutputError(f"cannot write {path}: permission denied. Name another")
    return path
