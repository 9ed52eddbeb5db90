"""One commit of a repository on the Hub: files in the library's cache, compared with hashes.

The library checks the size of what it downloads over HTTP and nothing else, and what is in the
cache it takes as it is. Here every file is hashed each time it is asked for. In the cache a file is
a link to blobs/<name>, and that name is the content's SHA-256 (large files) or git's SHA-1 (small
ones), so that it can be checked without a network. That costs a pass over the file, about half a
second for 300 MB, each time it is loaded from the Hub's cache; one flipped bit in a weight is found
by nothing else.

The hashes are the Hub's own. They show damage on the way and on the disk, and an answer that does
not belong to the commit; they are no protection from the Hub itself, nor from who can write to the
cache.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..errors import HubError
from .errors import hub_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo
    from huggingface_hub.hf_api import RepoSibling

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Place:
    """Which repository to fetch from and how: arguments of Probe.from_pretrained."""

    repo_id: str
    revision: str | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False
    token: str | bool | None = None


@dataclass(frozen=True)
class Blob:
    """A file's size in bytes, and its SHA-256 (64 digits) or git's SHA-1 of it (40)."""

    size: int
    digest: str

    def is_in(self, path: Path) -> bool:
        """Whether a file has this content."""
        return path.stat().st_size == self.size and has_digest(path, self.digest)


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file's content has this SHA-256 (64 hexadecimal digits) or git blob SHA-1 (40)."""
    with path.open("rb") as file:
        if len(digest) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
        sha1 = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: sha1).hexdigest() == digest


class Snapshot:
    """The files of one commit; the Hub is asked only for what the cache lacks.

    A name that can move (a branch, a tag) is resolved to a commit at once, by the request that also
    brings the files' sizes and hashes. Offline (`local_files_only`, or HF_HUB_OFFLINE=1) it is the
    commit it was when it was last loaded from here.

    Attributes:
        commit: 40 hexadecimal digits.
        where: repository and commit, for messages.

    Raises:
        HubError: there is no such repository or revision, or it cannot be reached.
    """

    def __init__(self, place: Place) -> None:
        from huggingface_hub import constants

        self._place = place
        self._api = hub_api(place.token)
        self._offline = place.local_files_only or constants.HF_HUB_OFFLINE
        self._listing: dict[str, Blob | None] | None = None
        self._root: Path | None = None  # of the commit, in the cache; known once a file of it is
        name = place.revision or "main"
        self.where = f"{place.repo_id}@{name}"
        if place.force_download and self._offline:
            raise HubError(
                f"{self.where}: force_download needs the Hub, and it may not be asked"
                " (local_files_only, HF_HUB_OFFLINE). Drop one."
            )
        if _COMMIT.fullmatch(name):
            self.commit = name
        elif self._offline:
            self.commit = self._cached_root(name).name
        else:
            self.commit, self._listing = listing(self._api, place.repo_id, place.revision)
        self.where = f"{place.repo_id}@{self.commit}"

    def names(self) -> list[str]:
        """The names of all files of the commit; offline, of those that are in the cache."""
        if not self._offline:
            return sorted(self._files())
        root = self._cached_root(self.commit)
        return sorted(
            path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()
        )

    def has_cached(self, name: str) -> bool:
        """Whether a file need not be asked for."""
        return not self._place.force_download and self._cached(name) is not None

    def fetch(self, name: str, limit: int) -> Path:
        """The path of a file in the cache, after its content was compared with its hash.

        What is in the cache already is not asked for again. Damaged content is removed from the
        cache and fetched once more. A cache without links (systems that have none,
        HF_HUB_DISABLE_SYMLINKS)
        does not keep the hashes: there every use needs one request for them, and offline nothing of
        it can be read.

        Args:
            limit: more bytes than that are not downloaded.

        Raises:
            HubError: there is no such file, it is too large, it is damaged and cannot be fetched
                again, or the Hub gives other content than it lists.
        """
        path = None if self._place.force_download else self._cached(name)
        if path:
            self._check_size(name, path.stat().st_size, limit)
            if self._is_intact(path, name):
                return path
            self._remove(path)
        if self._offline:
            state = (
                "was damaged in the local cache and has been removed"
                if path
                else "is not in the local cache, and the Hub was not asked"
            )
            raise HubError(
                f"{self.where}: {name} {state}. Go online once, or give a commit that is cached."
            )
        blob = self._blob(name)
        self._check_size(name, blob.size, limit)
        return self._download(name, blob, force=self._place.force_download or path is not None)

    def remember(self) -> None:
        """Let the name that was asked for lead to this commit offline, as after a download.

        Called when all files are there, so that the name never leads to half a probe.
        """
        name = self._place.revision or "main"
        if (
            self._root is None
            or self._offline
            or name == self.commit
            or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name)
            or ".." in name
        ):
            return
        reference = self._root.parent.parent / "refs" / name
        draft = reference.with_name(f"{reference.name}.{os.getpid()}.tmp")
        try:
            reference.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(self.commit)
            draft.replace(reference)
        except OSError:  # a cache that may only be read: then the name has to be asked for again
            return

    def _download(self, name: str, blob: Blob, force: bool) -> Path:
        for again in (False, True):
            with hub_errors(f"{self.where}, {name}"):
                downloaded = self._api.hf_hub_download(
                    self._place.repo_id,
                    name,
                    revision=self.commit,
                    cache_dir=self._place.cache_dir,
                    force_download=force or again,
                )
            path = Path(downloaded)
            if not self._is_placed(path, name):
                raise HubError(
                    f"{self.where}, {name}: the Hub delivers it for another commit ({path}). Do not"
                    " use it; tell who runs the Hub."
                )
            linked = _linked_digest(path)
            if linked in (None, blob.digest) and blob.is_in(path):
                return path
            self._remove(
                path
            )  # also a link to other content, which a forced download leaves as it is
        if linked not in (None, blob.digest):
            raise HubError(
                f"{self.where}, {name}: the Hub delivers {linked} and lists {blob.digest}. Do not"
                " use it; tell who runs the Hub."
            )
        raise HubError(
            f"{self.where}, {name}: what was downloaded is not what the Hub lists ({blob.digest}),"
            " twice. It was removed again. Try another network, or tell the repository's owner."
        )

    def _files(self) -> dict[str, Blob | None]:
        if self._listing is None:
            commit, self._listing = listing(self._api, self._place.repo_id, self.commit)
            if commit != self.commit:
                raise HubError(
                    f"{self.where}: the Hub answered for the commit {commit}. Do not use it; tell"
                    " who runs the Hub."
                )
        return self._listing

    def _blob(self, name: str) -> Blob:
        if name not in self._files():
            raise HubError(f"{self.where}: {self._lacks(name)}")
        blob = self._files()[name]
        if blob is None:
            raise HubError(
                f"{self.where}: the Hub does not say size and hash of {name}, so it cannot be"
                " checked. It was not downloaded."
            )
        return blob

    def _is_intact(self, path: Path, name: str) -> bool:
        digest = _linked_digest(path)
        if digest:
            return has_digest(path, digest)
        if self._offline:
            raise HubError(
                f"{self.where}, {name}: this cache has no links that hold the hashes, so the file"
                " cannot be checked offline. Go online, or keep a checked copy: loraprobe pull."
            )
        return self._blob(name).is_in(path)

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        for _ in range(2):  # once more if it was led elsewhere
            with hub_errors(self.where):
                cached = try_to_load_from_cache(
                    self._place.repo_id, name, cache_dir=self._place.cache_dir, revision=self.commit
                )
            if not isinstance(cached, str):
                return None
            if self._is_placed(Path(cached), name):
                return Path(cached)
        return None

    def _is_placed(self, path: Path, name: str) -> bool:
        """Whether the path lies under the commit's folder in the cache."""
        root = path.parents[len(PurePosixPath(name).parts) - 1]
        if root.name == self.commit:
            self._root = root
            return True
        # Of an answer that names another commit the library keeps a note under this one's name, and
        # follows it from then on.
        with suppress(OSError):
            (root.parent.parent / "refs" / self.commit).unlink(missing_ok=True)
        return False

    def _cached_root(self, revision: str) -> Path:
        """The folder of a revision in the cache, without asking the Hub."""
        with hub_errors(self.where):
            # With no file wanted this is nothing but a look-up.
            folder = self._api.snapshot_download(
                self._place.repo_id,
                revision=revision,
                cache_dir=self._place.cache_dir,
                local_files_only=True,
                allow_patterns=[],
            )
        root = Path(folder)
        if not _COMMIT.fullmatch(root.name):
            raise HubError(
                f"{self.where}: the cache does not say which commit that is. Give the commit, or go"
                " online once."
            )
        return root

    def _remove(self, path: Path) -> None:
        """Take a file out of the commit's folder in the cache, and its content if that is damaged.

        Nothing outside the cache is touched.
        """
        blobs = self._root.parent.parent / "blobs" if self._root else None
        try:
            linked = _linked_digest(path)
            target = (
                Path(os.path.normpath(path.parent / os.readlink(path)))
                if linked and not has_digest(path, linked)
                else None
            )
            path.unlink(missing_ok=True)
            if target and target.parent == blobs:
                target.unlink(missing_ok=True)
        except OSError as error:
            raise HubError(
                f"{self.where}: {path} does not have the content that it should have, and cannot be"
                f" removed ({error}). Use another cache_dir."
            ) from error

    def _check_size(self, name: str, size: int, limit: int) -> None:
        if size > limit:
            raise HubError(
                f"{self.where}: {name} has {size} bytes; expected at most {limit}. It was not read."
            )

    def _lacks(self, name: str) -> str:
        if self._offline:
            return (
                f"{name} is not in the local cache, and the Hub was not asked. Go online once, or"
                " give a commit that is cached."
            )
        last = PurePosixPath(name).name
        folders = sorted(
            {
                str(PurePosixPath(other).parent)
                for other in self._files()
                if PurePosixPath(other).name == last
            }
            - {"."}
        )
        hint = (
            f" There is one in {', '.join(folders[:8])}: pass it as subfolder." if folders else ""
        )
        return f"the repository has none of {name}.{hint}"


def hub_api(token: str | bool | None) -> HfApi:
    """The library's client, which tells the Hub who is asking."""
    from huggingface_hub import HfApi

    from .._version import __version__

    return HfApi(token=token, library_name="loraprobe", library_version=__version__)


def repo_info(
    api: HfApi, repo_id: str, revision: str | None = None, files: bool = False
) -> ModelInfo:
    """The library's model_info, which without a timeout waits for a silent Hub for ever."""
    from huggingface_hub import constants

    return api.model_info(
        repo_id, revision=revision, files_metadata=files, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )


def listing(api: HfApi, repo_id: str, revision: str | None) -> tuple[str, dict[str, Blob | None]]:
    """Commit and files of a revision, in one request.

    Returns:
        (commit, file name -> size and hash, None where the Hub does not say them).

    Raises:
        HubError: there is none, or the answer is not of the expected form.
    """
    where = f"{repo_id}@{revision or 'main'}"
    with hub_errors(where):
        info = repo_info(api, repo_id, revision, files=True)
        files = {sibling.rfilename: _blob(sibling) for sibling in info.siblings or ()}
    if not info.sha or not _COMMIT.fullmatch(info.sha):
        raise HubError(
            f"{where}: the Hub named the commit {info.sha!r}; expected 40 hexadecimal digits. Give"
            " the commit as revision."
        )
    return info.sha, files


def _blob(sibling: RepoSibling) -> Blob | None:
    size, digest = (
        (sibling.lfs.size, sibling.lfs.sha256) if sibling.lfs else (sibling.size, sibling.blob_id)
    )
    if type(size) is not int or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        return None
    return Blob(size, digest)


def _linked_digest(path: Path) -> str | None:
    """The hash that a file of the cache is linked under, if it is a link and the name is a hash."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if _DIGEST.fullmatch(name) else None
