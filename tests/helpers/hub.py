"""A Hub in memory and a folder, which the real huggingface_hub pushes to and pulls from.

It answers requests in place of the network (`installed`). In a test `hub.faults.add(...)` makes
things go wrong and `hub.log` holds every request. As on the real Hub, large files come from another
origin, with a signed URL and without the token. Every commit is a folder, `hub.at(commit, repo)`:
what a test writes there is in that commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, get_session

from .hub_answers import Exchange, http
from .hub_facts import Entry, digest, flipped

_client = get_session()
__all__ = ["REPO", "Hub", "digest", "flipped", "installed"]
REPO = "org/name"  # where a test needs no more than one


@dataclass
class Fault:
    """One thing that goes wrong, for requests that match all of the patterns.

    Attributes:
        kind: flip (one bit, of byte `value` or the middle one), longer (by `value` bytes), die
            (after `value` bytes), drop (no answer), hang, status `value`, redirect to `value`,
            commit (name `value` instead), move (main to `value`, once answered).
        path: of the file in the repository; of the URL where the request names no file.
        route: info, resolve, storage_get, storage_put, commit, ...
        times: how often it happens; None for always.
    """

    kind: str
    path: str = "*"
    route: str = "*"
    method: str = "*"
    times: int | None = None
    value: Any = None


class Faults(list[Fault]):
    """The faults that are switched on."""

    def add(self, kind: str, path: str = "*", **options: Any) -> None:
        self.append(Fault(kind, path, **options))

    def take(self, kinds: tuple[str, ...], *subject: str) -> Fault | None:
        """The first fault that route, method and path match; it happens once less from now on."""
        for fault in self:
            patterns = (fault.route, fault.method, fault.path)
            if (
                fault.kind in kinds
                and fault.times != 0
                and all(map(fnmatchcase, subject, patterns))
            ):
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None


@dataclass
class Repository:
    """What is known of one repository beside its files.

    Attributes:
        refs: revision -> commit.
        titles: of the commits, in the order they were made in.
    """

    id: str
    private: bool = False
    gated: bool = False
    granted: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]


class Hub:
    """The two origins.

    Attributes:
        all_regular: nothing goes to the storage, as with some self-hosted Hubs.
        cache: the library's.
        contents: of large files that were uploaded, by SHA-256.
        error: raised by everything that goes to the network.
        listed: file name -> (size, digest) to say of it instead of the truth.
        etags: file name -> the name to deliver it under instead of its hash.
        neighbours: host -> another Hub.
    """

    def __init__(self, root: Path, cache: Path) -> None:
        self.root = root
        self.cache = cache
        self.all_regular = False
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.faults = Faults()
        self.log: list[Entry] = []
        self.error: Exception | None = None
        self.listed: dict[str, tuple[Any, Any]] = {}
        self.etags: dict[str, str] = {}
        self.neighbours: dict[str, Hub] = {}
        self._lock = threading.RLock()

    def new(self, repo: str, private: bool = False) -> Repository:
        self.repositories[repo] = Repository(repo, private)
        return self.repositories[repo]

    def pointer(self, commit: str, name: str, cache: Path | None = None) -> Path:
        """Where the cache has a file of a commit of `REPO`."""
        return (cache or self.cache) / "models--org--name" / "snapshots" / commit / name

    def commit(self, commit: str, repo: str = REPO) -> Path:
        """The folder of a new commit, for the test to fill; main leads to it from now on."""
        repository = self.repositories.get(repo) or self.new(repo)
        repository.refs["main"] = commit
        repository.titles[commit] = "made by the test"
        self.at(commit, repo).mkdir(parents=True, exist_ok=True)
        return self.at(commit, repo)

    def at(self, commit: str, repo: str = REPO) -> Path:
        return self.root / repo / commit

    @property
    def refs(self) -> dict[str, str]:
        """Of the repository `REPO`."""
        return self.repositories[REPO].refs

    @property
    def asked(self) -> list[tuple[str | None, str | None]]:
        """Revision and token of every question for a commit and its files."""
        return [
            (entry.found.get("revision"), entry.token or None)
            for entry in self.log
            if entry.route == "info"
        ]

    @property
    def fetched(self) -> list[str]:
        """The files that were downloaded."""
        return [
            entry.found["path"]
            for entry in self.log
            if entry.method == "GET" and entry.route in ("resolve", "storage_get")
        ]

    def clear(self) -> None:
        """Forget the requests."""
        self.log.clear()

    def files(self, commit: str, repo: str = REPO) -> dict[str, bytes]:
        folder = self.at(commit, repo)
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def grow(self, repository: Repository, ref: str, files: dict[str, bytes], title: str) -> str:
        """Let a ref stand for a new tree; one that stays as it was makes no commit."""
        head = repository.refs.get(ref)
        if head and self.files(head, repository.id) == files:
            return head
        tree = {name: digest(name, data) for name, data in files.items()}
        identity = json.dumps([repository.id, title, len(repository.titles), tree])
        commit = hashlib.sha1(identity.encode()).hexdigest()
        repository.refs[ref] = commit
        repository.titles[commit] = title
        for name, data in files.items():
            path = self.at(commit, repository.id) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return commit

    def __call__(self, request: Any) -> Any:
        """Answer a request."""
        if request.url.host in self.neighbours:
            return self.neighbours[request.url.host](request)
        with self._lock:
            return Exchange(self, request).answer()


@contextmanager
def installed(folder: Path) -> Iterator[Hub]:
    """A Hub that this process's huggingface_hub talks to, with nobody's token and a cache there."""
    hub = Hub(folder / "hub", folder / "cache")
    client = http.Client(
        transport=http.MockTransport(hub),
        event_hooks=_client.event_hooks,
        follow_redirects=True,
        timeout=None,
    )
    settings = {
        "HF_HUB_CACHE": str(hub.cache),
        "HF_TOKEN_PATH": str(folder / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HF_")]:
            patch.delenv(name)
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patient = SimpleNamespace(sleep=lambda seconds: None, time=lambda: 0.0)
        patch.setattr("huggingface_hub.utils._http.time", patient)
        huggingface_hub.set_client_factory(lambda: client)
        yield hub
    huggingface_hub.set_client_factory(lambda: _client)
