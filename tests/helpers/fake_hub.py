"""The Hub without a network.

The two functions of huggingface_hub that fetch, over commits made of folders, with a real cache
layout.

What the real library and a real server do with each other is in test_hub_wire.py.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

REPO = "org/name"
LARGE = (".safetensors", ".bin")  # kept in the large-file storage, and named by their SHA-256


def digest(name: str, data: bytes) -> str:
    """The name under which the Hub stores a file: SHA-256 of a large one, git's SHA-1 of others."""
    return (
        hashlib.sha256(data).hexdigest()
        if name.endswith(LARGE)
        else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    )


class FakeHub:
    """Commits of one repository, each a folder `root/<commit>`; `main` is the last one made.

    Attributes:
        asked: (revision, token) of every question for a commit and its files.
        fetched: (commit, name, forced) of every download, cached files left out.
        listed: name -> what to say of a file instead of the truth, (size, digest).
        etags: name -> the name to deliver a file under instead of its hash.
        damage: how many of the next downloads get one bit wrong.
        error: raised by everything that would go to the network.
        sha: the commit to name instead of the one asked for.
        links: whether the cache's file system has links.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.cache = root, root / "cache"
        self.asked: list[tuple[str | None, Any]] = []
        self.fetched: list[tuple[str, str, bool]] = []
        self.listed: dict[str, tuple[Any, Any]] = {}
        self.etags: dict[str, str] = {}
        self.refs: dict[str, str] = {}
        self.damage = 0
        self.error: Exception | None = None
        self.sha: str | None = ""
        self.links = True
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.cache))
        monkeypatch.setattr(
            huggingface_hub.HfApi,
            "model_info",
            lambda api, repo_id, **asked: self._model_info(api, repo_id, **asked),
        )
        monkeypatch.setattr(
            huggingface_hub.HfApi,
            "hf_hub_download",
            lambda api, repo_id, name, **asked: self._download(name, **asked),
        )

    def commit(self, name: str, *refs: str) -> Path:
        """The folder of a commit, for the test to fill; these names lead to it from now on."""
        self.refs |= dict.fromkeys(("main", *refs), name)
        (self.root / name).mkdir(exist_ok=True)
        return self.root / name

    def clear(self) -> None:
        self.asked.clear()
        self.fetched.clear()

    def pointer(self, commit: str, name: str, cache: Path | None = None) -> Path:
        """Where the cache has a file of a commit."""
        return (cache or self.cache) / "models--org--name" / "snapshots" / commit / name

    def _model_info(
        self, api: Any, repo_id: str, revision: str | None, files_metadata: bool, timeout: float
    ) -> SimpleNamespace:
        assert repo_id == REPO
        assert timeout > 0  # without one a silent Hub is waited for for ever
        self.asked.append((revision, api.token))
        if self.error:
            raise self.error
        commit = self.refs.get(revision or "main", revision or "main")
        folder = self.root / commit
        names = [
            path.relative_to(folder).as_posix()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        return SimpleNamespace(
            sha=commit if self.sha == "" else self.sha,
            siblings=[self._sibling(folder, name) for name in names],
        )

    def _sibling(self, folder: Path, name: str) -> SimpleNamespace:
        data = (folder / name).read_bytes()
        size, oid = self.listed.get(name, (len(data), digest(name, data)))
        lfs = SimpleNamespace(size=size, sha256=oid) if name.endswith(LARGE) else None
        return SimpleNamespace(
            rfilename=name, size=size, blob_id=oid if lfs is None else "0" * 40, lfs=lfs
        )

    def _download(
        self, name: str, *, revision: str, cache_dir: str | Path | None, force_download: bool
    ) -> str:
        pointer = self.pointer(revision, name, Path(cache_dir) if cache_dir else None)
        if pointer.is_file() and not force_download:
            return str(pointer)
        self.fetched.append((revision, name, force_download))
        if self.error:
            raise self.error
        data = (self.root / revision / name).read_bytes()
        storage = pointer.parents[len(Path(name).parts) + 1]
        blob = storage / "blobs" / self.etags.get(name, digest(name, data))
        blob.parent.mkdir(parents=True, exist_ok=True)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        if force_download or not blob.exists():
            if self.damage:
                self.damage -= 1
                data = flipped(data)
            blob.write_bytes(data)
        if not pointer.exists():  # as the library: a forced download leaves a pointer that is there
            if self.links:
                pointer.unlink(missing_ok=True)
                pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            else:
                blob.rename(pointer)
        return str(pointer)


def flipped(data: bytes, place: int = -2) -> bytes:
    """The same bytes but for one bit."""
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)
