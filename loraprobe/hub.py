"""The only network code: fetch one pinned commit of a repository from the Hugging Face Hub.

A revision that can move (a branch, a tag) is resolved to a commit once, and every file is then taken
from that commit, so that what is checked and what is loaded are the same. With a full commit hash in
the cache nothing is asked of the network at all.
"""

from __future__ import annotations

import re
from pathlib import Path

from .errors import HubError
from .format import PROBE_FILES
from .peft_io import CONFIG_NAME, WEIGHT_NAMES

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def looks_like_repo_id(source: str) -> bool:
    """Whether a string has the form org/name.

    >>> looks_like_repo_id("org/name"), looks_like_repo_id("./folder/name"), looks_like_repo_id("name")
    (True, False, False)
    """
    return bool(_REPO_ID.fullmatch(source)) and ".." not in source


def fetch_probe(
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> tuple[Path, str]:
    """Download a probe's files at one commit: (its folder, the commit).

    Raises:
        HubError: the repository, revision or network does not give it.
    """
    root = _fetch(repo_id, PROBE_FILES, subfolder, revision, cache_dir, force_download, local_files_only, token)
    return root / _prefix(subfolder), root.name


def fetch_adapter(repo_id: str, *, revision: str | None = None, subfolder: str | None = None, token: str | bool | None = None) -> Path:
    """Download a PEFT adapter's files at one commit; the root of the snapshot.

    Raises:
        HubError: the repository, revision or network does not give it.
    """
    return _fetch(repo_id, (CONFIG_NAME, *WEIGHT_NAMES), subfolder, revision, None, False, False, token)


def _fetch(
    repo_id: str,
    files: tuple[str, ...],
    subfolder: str | None,
    revision: str | None,
    cache_dir: str | Path | None,
    force_download: bool,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    """The snapshot of one commit in the cache: a folder that has the commit's name."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        HTTPError,  # of httpx or httpx2, whichever this version stands on
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repo_id}@{revision or 'main'}"
    prefix = _prefix(subfolder)
    try:
        commit = revision
        if not local_files_only and not (revision and _COMMIT.fullmatch(revision)):
            commit = HfApi(token=token).model_info(repo_id, revision=revision).sha
            if not commit or not _COMMIT.fullmatch(commit):
                raise HubError(f"{where}: the Hub named the commit {commit!r}; expected 40 hexadecimal digits. Give the commit as revision.")
        root = snapshot_download(
            repo_id, revision=commit, cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only, token=token,
            allow_patterns=[prefix + name for name in files],
        )  # fmt: skip
    except GatedRepoError as error:
        raise HubError(f"{where}: the repository is gated. Accept its conditions on the Hub, then pass the token of that account.") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{where}: no such repository, or it is private and the token does not open it. Check the id and token.") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{where}: no such revision. Give a commit, tag or branch of the repository.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"{where}: not in the local cache, and the Hub was not asked or not reached. Go online once, or give a commit that is cached."
        ) from error
    except HFValidationError as error:
        raise HubError(f"{where}: the Hub knows no such name ({_first_line(error)}). Check the id and revision.") from error
    except (EntryNotFoundError, HTTPError, OSError) as error:
        raise HubError(f"{where}: the Hub did not deliver it ({type(error).__name__}: {_first_line(error)}). Try again later.") from error
    if not (Path(root) / prefix).is_dir():
        raise HubError(f"{where}: the repository has none of {', '.join(prefix + name for name in files)}")
    return Path(root)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0][:200]


def _prefix(subfolder: str | None) -> str:
    """The subfolder as the start of a file pattern; it may not leave the repository."""
    if not subfolder:
        return ""
    parts = subfolder.strip("/").split("/")
    if any(part in ("", ".", "..") or not re.fullmatch(r"[\w.-]+", part) for part in parts):
        raise HubError(f"got subfolder {subfolder!r}; expected plain folder names separated by /")
    return "/".join(parts) + "/"
