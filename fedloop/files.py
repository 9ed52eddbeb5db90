"""What has to be the same on every system: files that are whole or not there, and folders whose
entries outlive a power cut.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

IS_WINDOWS = os.name == "nt"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside the former one and put it in its place; on an error none is left beside.

    Raises:
        OSError: it cannot be written; the former file is as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        write_synced(part, content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except OSError:
        remove(part)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes, mode: str = "wb") -> None:
    """Write, or with mode "ab" append, and force it to the disk.

    Raises:
        OSError: it cannot be written; what was appended in part is taken back.
    """
    with path.open(mode, buffering=0) as file:
        former = file.tell()
        try:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(former)
            raise


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, so that a rename outlives a power cut.

    Windows opens no folders, and writes renames through by itself; some network file systems
    refuse.
    """
    if IS_WINDOWS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file if that can be done: Windows keeps those that are open or mapped."""
    with suppress(OSError):
        path.unlink()
