"""Files are whole or not there on every system, as far as that can be simulated on one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedloop import files


@pytest.mark.parametrize("system", ["posix", "nt"])
def test_a_file_is_whole_or_as_it_was(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    real = os.open

    def spied(path: object, *rest: int) -> int:
        opened.append(path)
        return real(path, *rest)  # type: ignore[arg-type]

    path = tmp_path / "file"
    with monkeypatch.context() as patched:
        patched.setattr(files, "IS_WINDOWS", system == "nt")
        patched.setattr(os, "open", spied)
        files.write_whole(path, "one")
    assert (tmp_path in opened) is (system == "posix")  # Windows opens no folders
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            files.write_whole(path, "two")
    assert path.read_text() == "one"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_what_was_appended_in_part_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    files.write_synced(path, b"one\n")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            files.write_synced(path, b"two\n", "ab")
    files.write_synced(path, b"three\n", "ab")
    assert path.read_text() == "one\nthree\n"


def test_what_cannot_be_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mapped(path: Path) -> None:
        raise PermissionError("the file is mapped")  # as on Windows

    (tmp_path / "file").write_text("x")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", mapped)
        files.remove(tmp_path / "file")
    assert (tmp_path / "file").exists()
    files.remove(tmp_path / "file")
    assert not (tmp_path / "file").exists()
