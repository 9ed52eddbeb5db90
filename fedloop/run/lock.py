"""One process a run: a lock on its folder that is gone when its process is, however that ends."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import StateError

NAME = ".lock"


def lock(folder: Path, name: str = NAME) -> FileLock:
    """The lock of a run's folder, taken; `release()` gives it back.

    Raises:
        StateError: another process, or another run of this one, has it; or the folder cannot be
            written to.
    """
    taken = FileLock(folder / name)
    try:
        taken.acquire(timeout=0)
    except Timeout:
        raise StateError(
            f"{folder} is in use by another process; expected one run at a time. Wait for it, stop"
            " it, or use another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise StateError(
            f"cannot lock the folder {folder}: {error}. Expected a folder that can be written to,"
            " on a file system with locks."
        ) from error
    return taken
