"""Probes and adapters on the Hugging Face Hub: publish, fetch, list.

With `loraprobe.hub.snapshot`, which downloads.

Whatever is fetched comes from one commit: a name that can move (a branch, a tag) is resolved once,
and what is checked and what is loaded are the same. With a full commit hash in the cache nothing is
asked of the network at all. `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what
they always mean.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapters.config import CONFIG_NAME as ADAPTER_CONFIG_NAME
from ..adapters.files import PICKLE_NAME, two_files
from ..adapters.formats import WEIGHTS_NAME, pickle_advice
from ..adapters.strict_json import read_json
from ..errors import AdapterFormatError, HubError
from ..limits import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    PROBE_CONFIG,
    PROBE_FEATURIZER,
    read_limited,
)
from ..trust import check_trusted, users_list
from .card import CARD_NAME, card
from .card_figure import FIGURE_NAME
from .errors import hub_errors
from .format import (
    CONFIG_NAME,
    PROBE_FILES,
    SIGNATURE_NAME,
    check_ours,
    load_probe,
    save_probe,
    weight_files,
)
from .names import looks_like_repo_id
from .signing import check_signature, sign_folder
from .snapshot import Place, Snapshot, hub_api, listing, repo_info
from .zoo import check_zoo

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from ..probe import Probe

PUBLISHED_FILES = (
    *PROBE_FILES,
    FIGURE_NAME,
)  # what push_probe writes, and the only files that it ever deletes

_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_probe(
    repo_id: str, *, subfolder: str | None = None, revision: str | None = None, **options: Any
) -> tuple[Path, str]:
    """Download what makes up a probe at one commit, and check it.

    (its folder in the cache, the commit).

    That is config.json and the files it names; the card and its figure are for reading only.
    Every file is compared with its hash, also when it comes from the cache (`Snapshot.fetch` has
    the cost).

    Args:
        options: cache_dir, force_download, local_files_only and token, as in Probe.from_pretrained.

    Raises:
        HubError: the repository, revision or network does not give it, or gives something else.
    """
    prefix = _prefix(subfolder)
    snapshot = Snapshot(Place(repo_id, revision, **options))
    config = snapshot.fetch(prefix + CONFIG_NAME, PROBE_CONFIG)
    for name in _weight_files(config):  # if none, it is no probe, and load_probe says why
        snapshot.fetch(prefix + name, PROBE_FEATURIZER)
    snapshot.remember()
    return config.parent, snapshot.commit


def fetch_adapter(
    repo_id: str, *, subfolder: str | None = None, revision: str | None = None, **options: Any
) -> tuple[Path, str]:
    """Download a PEFT adapter at one commit, and check it: (its folder in the cache, the commit).

    Args:
        subfolder, revision, options: as `fetch_probe`.

    Raises:
        HubError: as `fetch_probe`.
        AdapterFormatError: the weights are a pickle, or there is one beside them.
    """
    prefix = _prefix(subfolder)
    snapshot = Snapshot(Place(repo_id, revision, **options))
    config = snapshot.fetch(prefix + ADAPTER_CONFIG_NAME, ADAPTER_CONFIG)
    weights = prefix + WEIGHTS_NAME
    pickled = prefix + PICKLE_NAME
    if not snapshot.has_cached(weights) and pickled in (listed := snapshot.names()):
        if weights in listed:
            raise two_files(f"{snapshot.where}: {weights}", PICKLE_NAME)
        raise AdapterFormatError(f"{snapshot.where}: {pickled} is {pickle_advice(PICKLE_NAME)}")
    snapshot.fetch(weights, ADAPTER_WEIGHTS)
    snapshot.remember()
    return config.parent, snapshot.commit


def probe_names(
    repo_id: str, *, revision: str | None = None, **options: Any
) -> tuple[str, list[str]]:
    """The folders of a repository that hold a config.json: (the commit, their names).

    Whether they are probes, loading shows.

    Raises:
        HubError: as `fetch_probe`.
    """
    snapshot = Snapshot(Place(repo_id, revision, **options))
    paths = [PurePosixPath(name) for name in snapshot.names()]
    return snapshot.commit, [
        path.parts[0] for path in paths if len(path.parts) == 2 and path.name == CONFIG_NAME
    ]


def pull_probe(
    repo_id: str,
    out: Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    key: str | Path | None = None,
    **options: Any,
) -> str:
    """Write a checked copy of a published probe into a folder: card, figure and signature too.

    The commit.

    The files are those of the commit, byte by byte; files of an earlier probe in the folder are
    replaced.

    Args:
        key: a public key, by whose owner it has to be signed.

    Raises:
        HubError: as `fetch_probe`; or the target is a file.
        ProbeFormatError: what is published is no probe that this version reads.
        OutputError: the folder holds files of a probe's names and no probe.
        TrustError: it is not on the user's list, or not signed by that key.
    """
    if out.exists() and not out.is_dir():
        raise HubError(f"got {out}, which is a file; expected a folder to write the probe into")
    check_ours(out)
    folder, commit = fetch_probe(repo_id, subfolder=subfolder, revision=revision, **options)
    digest = load_probe(folder).digest
    check_zoo(repo_id, subfolder, digest)
    check_trusted(users_list(), repo_id, commit, digest)
    prefix = _prefix(subfolder)
    snapshot = Snapshot(Place(repo_id, commit, **options))
    beside = (CARD_NAME, FIGURE_NAME, SIGNATURE_NAME)
    pages = [name for name in beside if prefix + name in snapshot.names()]
    files = {name: snapshot.fetch(prefix + name, CARD) for name in pages}
    files |= {name: folder / name for name in _weight_files(folder / CONFIG_NAME)}
    files[CONFIG_NAME] = folder / CONFIG_NAME
    if key is not None:
        check_signature(folder, Path(key))
    out.mkdir(parents=True, exist_ok=True)
    for name in set(PUBLISHED_FILES) - set(files):
        (out / name).unlink(missing_ok=True)
    for name, path in files.items():
        shutil.copyfile(path, out / name)
    return commit


def push_probe(
    probe: Probe,
    repo_id: str,
    *,
    subfolder: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    key: str | Path | None = None,
) -> str:
    """Publish a probe in one commit, and return that commit: 40 hexadecimal digits to pin it by.

    Before anything is sent, the probe is saved, read back and compared; afterwards the hashes of
    the commit's files are compared with those that were meant. In the probe's folder of the
    repository, files of an earlier probe are deleted (a head of another kind, a figure); nothing
    else ever is. The card is written from the probe's facts, for this repository. If all of it is
    there already, no commit is made and the present one returned.

    One probe a repository is the default, and the way to have downloads counted: the Hub counts
    requests for a config.json at the root, not in subfolders. Subfolders are for collections such
    as the zoo.

    Args:
        repo_id: "org/name"; it is created if it does not exist.
        private: whether it must be private; what the account's default or the repository is, if
            None.
        token: the library's login or HF_TOKEN, if None.
        branch: where to commit, "main" if None; it is created if it does not exist. "refs/pr/3"
            adds to that pull request.
        create_pr: open a pull request against main instead.
        key: the private key to sign the probe with (`loraprobe.hub.signing`); None for no
            signature. An earlier one is removed, as it was of another probe.

    Raises:
        HubError: the id is not valid, the Hub refuses or cannot be reached, the repository is
            public where private is asked for (or the reverse), or somebody else committed in the
            meantime.
        ProbeFormatError: the probe cannot be saved, or does not come back as it was.
        TrustError: it cannot be signed with that key.
    """
    if not looks_like_repo_id(repo_id):
        raise HubError(f"got the repository {repo_id!r}; expected org/name")
    if branch is not None and create_pr:
        raise HubError(
            "got a branch and create_pr: a pull request is made against main. Leave one of them"
            " out."
        )
    from .._version import __version__

    prefix, api = _prefix(subfolder), hub_api(token)
    with TemporaryDirectory(prefix="loraprobe-") as scratch:
        folder = _written(probe, Path(scratch) / "probe", repo_id, subfolder)
        if key is not None:
            sign_folder(folder, Path(key))
        with hub_errors(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            _check_visibility(api, repo_id, private)
            if branch is not None and not branch.startswith("refs/"):
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            parent = None if create_pr else repo_info(api, repo_id, branch).sha
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=prefix.rstrip("/"),
                allow_patterns=list(PUBLISHED_FILES),
                delete_patterns=list(PUBLISHED_FILES),
                revision=branch,
                create_pr=create_pr,
                parent_commit=parent,
                commit_message=commit_message or f"Upload a probe with loraprobe {__version__}",
            ).oid
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise HubError(
                f"{repo_id}: the Hub named the commit {commit!r}; expected 40 hexadecimal digits."
                " Look at the repository's history."
            )
        _check_published(api, repo_id, commit, prefix, folder)
    return commit


def _written(probe: Probe, folder: Path, repo_id: str, subfolder: str | None) -> Path:
    """Save the probe with the repository's card, after making sure that it reads back alike."""
    save_probe(probe, folder)
    copy = load_probe(folder)
    rows = np.random.default_rng(0).standard_normal((8, probe.head.num_features), dtype=np.float32)
    # All but the facts, which are JSON there and may hold tuples here.
    alike = replace(copy, head=probe.head, facts=probe.facts, commit=probe.commit) == probe
    if not alike or copy.score_features(rows).tobytes() != probe.score_features(rows).tobytes():
        raise HubError(
            "the saved probe does not read back as it was; nothing was published. Report this with"
            " the probe's config.json."
        )
    (folder / CARD_NAME).write_text(card(probe, repo_id, subfolder), encoding="utf-8")
    return folder


def _check_visibility(api: HfApi, repo_id: str, private: bool | None) -> None:
    """An existing repository keeps its visibility whatever create_repo is told.

    A probe meant to be private must not go public.
    """
    if private is None:
        return
    is_private = bool(repo_info(api, repo_id).private)
    if is_private != private:
        words = {True: "private", False: "public"}
        raise HubError(
            f"{repo_id} is {words[is_private]}, and {words[private]} was asked for. Nothing was"
            " uploaded: change the repository's settings, or leave private out."
        )


def _check_published(api: HfApi, repo_id: str, commit: str, prefix: str, folder: Path) -> None:
    _, files = listing(api, repo_id, commit)
    wrong = []
    for name in PUBLISHED_FILES:
        meant, blob = folder / name, files.get(prefix + name)
        if meant.is_file() != (prefix + name in files) or (blob and not blob.is_in(meant)):
            wrong.append(prefix + name)
    if wrong:
        raise HubError(
            f"{repo_id}@{commit}: the commit does not hold what was uploaded: {', '.join(wrong)}."
            " Do not use it; push again."
        )


def _weight_files(config: Path) -> list[str]:
    """The files that a config.json which nobody has checked yet names; [] if it is no probe's."""
    try:
        return weight_files(read_json(read_limited(config, PROBE_CONFIG, HubError)))
    except ValueError:
        return []


def _prefix(subfolder: str | None) -> str:
    """The subfolder as the start of a file's name; it may not leave the repository."""
    if not subfolder:
        return ""
    parts = subfolder.strip("/").split("/")
    if any(part in ("", ".", "..") or not re.fullmatch(r"[\w.-]+", part) for part in parts):
        raise HubError(f"got subfolder {subfolder!r}; expected plain folder names separated by /")
    return "/".join(parts) + "/"
