"""What the loopback Hub keeps in its folder: contents by sha256, and one JSON file a repository.

A commit holds its whole tree, so that whatever is asked of a revision is answered from that
revision.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import yaml  # huggingface_hub needs it too

COMMIT = re.compile(r"[0-9a-f]{40}")
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".ubj", ".gguf", ".zip")
LICENSES = (
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc0-1.0",
    "gpl-3.0",
    "llama3.1",
    "other",
    "unknown",
)
GITATTRIBUTES = "".join(
    f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS
).encode()


class StoreError(Exception):
    """A commit that cannot be made: its path, its parent or its content is wrong.

    `status` is for HTTP.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class File:
    """One file of a tree."""

    sha256: str
    size: int
    blob_id: str  # git's: of the content, or of the LFS pointer
    lfs: bool
    pointer_size: int = 0

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, File]


@dataclass
class Repository:
    """Everything known of one repository. Pull requests are branches by number.

    `granted` may read a gated one.
    """

    kind: str  # "models" or "datasets"
    id: str
    private: bool = False
    gated: str | bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)  # of the pull requests
    granted: list[str] = field(default_factory=list)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, tag, refs/pr/N, full or short hash stands for."""
        named = {
            **{f"refs/heads/{name}": sha for name, sha in self.branches.items()},
            **self._pull_request_refs(),
        }
        sha = self.branches.get(revision) or self.tags.get(revision) or named.get(revision)
        if sha is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = [known for known in self.commits if known.startswith(revision)]
            sha = found[0] if len(found) == 1 else None
        return self.commits.get(sha) if sha else None

    def move(self, revision: str, sha: str) -> None:
        """Let a branch or pull request stand for another commit.

        Raises:
            StoreError: 404 for a revision that is neither.
        """
        if revision in self._pull_request_refs():
            self.pull_requests[revision.rpartition("/")[2]] = sha
        elif revision.removeprefix("refs/heads/") in self.branches:
            self.branches[revision.removeprefix("refs/heads/")] = sha
        else:
            raise StoreError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def open_pull_request(self, title: str, sha: str) -> str:
        number = str(len(self.pull_requests) + 1)
        self.pull_requests[number], self.titles[number] = sha, title
        return number

    def history(self, commit: Commit) -> list[Commit]:
        found = [commit]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found

    def _pull_request_refs(self) -> dict[str, str]:
        return {f"refs/pr/{number}": sha for number, sha in self.pull_requests.items()}


class Store:
    """Repositories and contents in a folder; every change is on disk before it is answered."""

    def __init__(self, folder: Path) -> None:
        self.lock = threading.RLock()
        self._objects, self._repositories = folder / "objects", folder / "repositories"
        for path in (self._objects, self._repositories):
            path.mkdir(parents=True, exist_ok=True)
        found = [
            _from_json(json.loads(path.read_text())) for path in self._repositories.glob("*.json")
        ]
        self._known = {(repository.kind, repository.id): repository for repository in found}

    def get(self, kind: str, repo_id: str) -> Repository | None:
        return self._known.get((kind, repo_id))

    def create(self, kind: str, repo_id: str, author: str, private: bool = False) -> Repository:
        """A new repository: like the Hub's, with one commit that says which endings are large
        files.
        """
        repository = self._known[kind, repo_id] = Repository(kind, repo_id, private=private)
        first = self._new_commit(
            repository,
            None,
            "initial commit",
            "",
            author,
            {".gitattributes": self.put(GITATTRIBUTES, lfs=False)},
        )
        repository.branches["main"] = first.id
        self.save(repository)
        return repository

    def delete(self, repository: Repository) -> None:
        del self._known[repository.kind, repository.id]
        self._path(repository).unlink()

    def save(self, repository: Repository) -> None:
        self._write(self._path(repository), json.dumps(asdict(repository)).encode())

    def put(self, data: bytes, *, lfs: bool) -> File:
        """Keep a content; the file that it makes in a tree."""
        digest = hashlib.sha256(data).hexdigest()
        if not self.content(digest).exists():
            self._write(self.content(digest), data)
        return self.file(digest, lfs=lfs)

    def content(self, digest: str) -> Path:
        """Where the content with this sha256 is, or would be."""
        return self._objects / digest

    def file(self, digest: str, *, lfs: bool) -> File:
        """The file that a kept content makes in a tree."""
        path = self.content(digest)
        size = path.stat().st_size
        data = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
            if lfs
            else path.read_bytes()
        )
        blob_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return File(digest, size, blob_id, lfs, len(data) if lfs else 0)

    def commit(
        self,
        repository: Repository,
        revision: str,
        changes: Mapping[str, File | None],
        title: str,
        message: str,
        author: str,
        parent: str | None,
    ) -> Commit:
        """Change files (None deletes.

        A name that ends in / is a folder) on a branch or pull request.

        A tree that stays as it was makes no commit.

        Raises:
            StoreError: an unknown revision, a parent that is not its head, a bad path, nothing
                there to delete.
        """
        with self.lock:
            head = repository.find(revision)
            if head is None:
                raise StoreError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            if parent and not head.id.startswith(parent):
                raise StoreError(412, "A commit has happened since. Please refresh and try again.")
            files = changed(head.files, changes)
            if files == head.files:
                return head
            made = self._new_commit(repository, head.id, title, message, author, files)
            repository.move(revision, made.id)
            self.save(repository)
            return made

    def swap(self, repository: Repository, commit: str, path: str, data: bytes) -> None:
        """Exchange a file in a commit that has been made: what no honest server does."""
        with self.lock:
            old = repository.commits[commit]
            new = self.put(data, lfs=old.files[path].lfs)
            repository.commits[commit] = replace(old, files={**old.files, path: new})
            self.save(repository)

    def _new_commit(
        self,
        repository: Repository,
        parent: str | None,
        title: str,
        message: str,
        author: str,
        files: Mapping[str, File],
    ) -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        tree = {path: file.blob_id for path, file in files.items()}
        identity = [
            repository.kind,
            repository.id,
            parent,
            title,
            message,
            author,
            date,
            len(repository.commits),
            tree,
        ]
        sha = hashlib.sha1(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        repository.commits[sha] = Commit(
            sha, parent, title, message, author, date, dict(sorted(files.items()))
        )
        return repository.commits[sha]

    def _path(self, repository: Repository) -> Path:
        return self._repositories / f"{repository.kind}--{repository.id.replace('/', '--')}.json"

    def _write(self, path: Path, data: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=path.parent.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        shutil.move(name, path)


def changed(files: Mapping[str, File], changes: Mapping[str, File | None]) -> dict[str, File]:
    """A tree after changes: deletions first, as they ride in one commit with what replaces them."""
    kept = dict(files)
    for path in (path for path, file in changes.items() if file is None):
        doomed = [
            name for name in kept if name == path or (path.endswith("/") and name.startswith(path))
        ]
        if not doomed:
            raise StoreError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in doomed:
            del kept[name]
    for path, file in changes.items():
        if file is None:
            continue
        parts = PurePosixPath(path).parts
        if (
            not parts
            or path != "/".join(parts)
            or set(parts) & {"..", ".", ".git", "/"}
            or any(not part.isprintable() for part in parts)
        ):
            raise StoreError(400, f"Invalid path: {path}")
        if any(name.startswith(f"{path}/") for name in kept) or any(
            str(folder) in kept for folder in PurePosixPath(path).parents
        ):
            raise StoreError(400, f"{path} cannot be a file and a folder at once")
        kept[path] = file
    return dict(sorted(kept.items()))


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub would keep a file as a large one.

    By its ending, its size, or because it is no text.
    """
    return path.endswith(LFS_ENDINGS) or size > 10 << 20 or b"\0" in sample


def entries(files: Mapping[str, File]) -> dict[str, dict[str, Any]]:
    """Path -> what the Hub's API tells of it, for the files of a tree and the folders that they
    make.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, file in files.items():
        for folder in reversed(PurePosixPath(path).parents[:-1]):
            inside = "".join(
                f"{name} {other.blob_id}\n"
                for name, other in files.items()
                if name.startswith(f"{folder}/")
            )
            found.setdefault(
                str(folder),
                {
                    "type": "directory",
                    "oid": hashlib.sha1(inside.encode()).hexdigest(),
                    "size": 0,
                    "path": str(folder),
                },
            )
        lfs = (
            {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}}
            if file.lfs
            else {}
        )
        found[path] = {"type": "file", "oid": file.blob_id, "size": file.size, "path": path, **lfs}
    return dict(sorted(found.items()))


def card_errors(card: str) -> list[str]:
    """What the Hub does not accept in the front matter of a card.

    The part of its rules that probes can break.
    """
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    if not isinstance(front, dict):
        return ["the metadata must be an object"]
    errors = []
    if "license" in front and front["license"] not in LICENSES:
        errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    for name in ("base_model", "datasets"):
        values = front.get(name) or []
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", str(value)):
                errors.append(
                    f'"{name}" with value "{value}" is not valid. Use an id from https://hf.co'
                )
    if not all(isinstance(tag, str) for tag in front.get("tags") or []):
        errors.append('"tags" must be an array of strings')
    for model in front.get("model-index") or []:
        for row in model.get("results", [{}]):
            texts = [
                row.get("task", {}).get("type"),
                *(row.get("dataset", {}).get(name) for name in ("type", "name")),
            ]
            metrics = row.get("metrics") or [{}]
            if (
                not model.get("name")
                or not all(isinstance(text, str) for text in texts)
                or not all({"type", "value"} <= set(metric) for metric in metrics)
            ):
                errors.append(
                    '"model-index" needs a name, and of every result task.type, dataset.type,'
                    " dataset.name and metrics of type and value"
                )
    return errors


def _from_json(values: dict[str, Any]) -> Repository:
    commits = {}
    for sha, commit in values.pop("commits").items():
        commits[sha] = Commit(
            **{**commit, "files": {path: File(**file) for path, file in commit["files"].items()}}
        )
    return Repository(**values, commits=commits)
