"""Publish the zoo on the Hugging Face Hub: a repository a probe, and ORG/zoo with all of them.

    python -m zoo.publish --namespace ORG            # a dry run: what would be pushed, and how it
    differs from what is there
    python -m zoo.publish --namespace ORG --push     # does it, with HF_TOKEN or the login of `hf
    auth login`

    ORG/loraprobe-chat-1m-linear, ...   a probe each, so that its downloads are counted
    ORG/chat-1m, ORG/chat-1m-adapters   the small base model, and the adapters of clients that no
    probe was fitted on
    ORG/zoo                             every probe in a folder: `loraprobe zoo list ORG/zoo`,
    `loraprobe zoo pull NAME --repo ORG/zoo`

Probes, records and held-out clients are verified first (zoo.verify). What is there already is not
pushed again: a second run makes no commit, and an interrupted one goes on. Files that this does not
write are left alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from loraprobe._version import __version__
from loraprobe.errors import HubError, LoraprobeError, MissingExtra
from loraprobe.hub.card import CARD_NAME, card
from loraprobe.hub.errors import hub_errors
from loraprobe.hub.format import CONFIG_NAME
from loraprobe.hub.hub import PUBLISHED_FILES
from loraprobe.hub.names import looks_like_repo_id
from loraprobe.hub.snapshot import hub_api, listing
from loraprobe.probe import Probe

from .labelled.deltas import sha256
from .labelled.diff_records import Comparison
from .labelled.records import Record, read_record
from .program import documented
from .publish_pages import adapters_card, base_card, collection_card
from .report import ZOO
from .verify import TOLERANCE, Shown, verify_probe, zoo_probes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COLLECTION, ADAPTERS = "zoo", "adapters"
_LISTED = 30  # files of a repository that are named one by one


@dataclass(frozen=True)
class Target:
    """A repository as it should be: name in the repository -> the file.

    And the probe, where it is the repository of one.
    """

    repo_id: str
    files: Mapping[str, Path]
    probe: Probe | None = None


@dataclass(frozen=True)
class State:
    """What the Hub has: the commit, None without a repository, "" if it was not asked.

    And which of the target's files differ there.
    """

    commit: str | None
    new: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether there is anything to push."""
        return bool(self.new or self.changed or self.deleted)


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then say or do what is to be done."""
    from huggingface_hub.utils import disable_progress_bars

    options = _options(arguments)
    if not looks_like_repo_id(f"{options.namespace}/{COLLECTION}"):
        sys.exit(
            f"got --namespace {options.namespace!r}; expected the name of a user or an organisation"
            " on the Hub"
        )
    shown, comparison = zoo_probes(options.zoo), Comparison(TOLERANCE)
    for one in shown:
        verify_probe(one, comparison)
    print(f"verified: {comparison.outcome()}", flush=True)
    if comparison.lines:
        sys.exit(
            "\n".join(
                [
                    *comparison.lines,
                    "nothing is published that its record does not show; see python -m zoo.verify",
                ]
            )
        )
    with TemporaryDirectory(prefix="loraprobe-zoo-") as scratch:
        wanted = targets(shown, options.zoo, options.namespace, Path(scratch))
        if options.push:
            disable_progress_bars()  # of hundreds of small files; a line a repository says more
            for target in wanted:
                print(
                    f"{target.repo_id}: {push(hub_api(None), target, options.private)}", flush=True
                )
        else:
            print("a dry run: nothing is pushed without --push", flush=True)
            _show(wanted)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = documented(__doc__)
    parser.add_argument(
        "--namespace", required=True, metavar="ORG", help="user or organisation on the Hub"
    )
    parser.add_argument(
        "--push", action="store_true", help="do it; without, nothing is changed anywhere"
    )
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="what the repositories must be [default: the account's default]",
    )
    parser.add_argument(
        "--zoo", type=Path, default=ZOO, help="another folder of probes, records and adapters"
    )
    return parser.parse_args(arguments)


def targets(shown: Sequence[Shown], zoo: Path, namespace: str, scratch: Path) -> list[Target]:
    """Every repository of the zoo.

    The collection comes last, since its page leads to the others.
    """
    records = {one.name: read_record(one.record) for one in shown}
    repos = {name: probe_repo(namespace, record) for name, record in records.items()}
    together, found = f"{namespace}/{COLLECTION}", []
    collection = {CARD_NAME: _page(scratch / COLLECTION, collection_card(records, together, repos))}
    for one in shown:
        probe = Probe.from_pretrained(one.probe)
        found.append(
            Target(
                repos[one.name],
                _files_of_probe(probe, scratch / "alone" / one.name, repos[one.name]),
                probe,
            )
        )
        inside = _files_of_probe(probe, scratch / COLLECTION / one.name, together, one.name)
        collection |= {f"{one.name}/{name}": path for name, path in inside.items()}
    own = [record["base_model"] for record in records.values() if record["adapters"] == ADAPTERS]
    if own and (zoo / "base").is_dir():
        base = f"{namespace}/{own[0].rpartition('/')[2]}"
        found.append(
            _folder(
                zoo / "base",
                base,
                base_card(zoo / "base", base, f"{base}-adapters"),
                scratch / "base",
            )
        )
        found.append(
            _folder(
                zoo / ADAPTERS,
                f"{base}-adapters",
                adapters_card(zoo / ADAPTERS, base, f"{base}-adapters"),
                scratch / ADAPTERS,
            )
        )
    return [*found, Target(together, collection)]


def _files_of_probe(
    probe: Probe, folder: Path, repo_id: str, subfolder: str | None = None
) -> dict[str, Path]:
    """The files of a probe as push_to_hub writes them: the card names the repository."""
    probe.save_pretrained(folder)
    _page(folder, card(probe, repo_id, subfolder))
    return {path.name: path for path in sorted(folder.iterdir()) if path.name in PUBLISHED_FILES}


def _folder(folder: Path, repo_id: str, page: str, scratch: Path) -> Target:
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _of_another_base(path, folder)
    }
    return Target(repo_id, {**files, CARD_NAME: _page(scratch, page)})


def _of_another_base(path: Path, folder: Path) -> bool:
    """Whether it belongs to adapters with a manifest of their own, below the folder's."""
    between = path.relative_to(folder).parents[:-1]
    return any((folder / one / "manifest.csv").is_file() for one in between)


def _page(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    return folder / CARD_NAME


def probe_repo(namespace: str, record: Record) -> str:
    """The repository of one probe.

    >>> probe_repo("org", {"probe": "linear", "base_model": "meta/llama-8b"})
    'org/loraprobe-llama-8b-linear'
    """
    base, name = record["base_model"].rpartition("/")[2], record["probe"]
    return f"{namespace}/loraprobe-{name if name.startswith(base) else f'{base}-{name}'}"


def state_of(api: HfApi, target: Target) -> State:
    """What a repository has of its target, in one or two requests.

    Raises:
        HubError: the Hub cannot be reached, or refuses.
    """
    with hub_errors(target.repo_id):
        exists = api.repo_exists(target.repo_id)
    if not exists:
        return State(None, tuple(target.files))
    commit, there = listing(api, target.repo_id, None)
    new = tuple(name for name in target.files if name not in there)
    changed = tuple(
        name
        for name, path in target.files.items()
        if name in there and not ((blob := there[name]) and blob.is_in(path))
    )
    # push_to_hub deletes what an earlier probe left, a head of another kind: so does this in every
    # folder of a probe.
    folders = {
        name.rpartition("/")[0] for name in target.files if name.rpartition("/")[2] == CONFIG_NAME
    }
    stale = [
        name
        for name in there
        if name.rpartition("/")[0] in folders and name.rpartition("/")[2] in PUBLISHED_FILES
    ]
    return State(commit, new, changed, tuple(name for name in stale if name not in target.files))


def push(api: HfApi, target: Target, private: bool | None = None) -> str:
    """Bring a repository to its target in one commit, if it is not there yet.

    What was done, for people.

    Raises:
        HubError: the Hub refuses or cannot be reached, or the commit does not hold what was pushed.
    """
    before = state_of(api, target)
    if not before.differs:
        return f"unchanged at {before.commit}"
    commit = (
        target.probe.push_to_hub(target.repo_id, private=private)
        if target.probe
        else _commit(api, target, before, private)
    )
    after = state_of(api, target)
    if after.commit != commit or after.differs:
        raise HubError(
            f"{target.repo_id}: pushed {commit}, and the Hub has {after}. Somebody else commits"
            " there too? Run this again."
        )
    return f"pushed {commit}: {_counted(before)}"


def _commit(api: HfApi, target: Target, before: State, private: bool | None) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with hub_errors(target.repo_id):
        api.create_repo(target.repo_id, private=private, exist_ok=True)
        parent = api.model_info(target.repo_id).sha
        add = [
            CommitOperationAdd(name, target.files[name]) for name in (*before.new, *before.changed)
        ]
        delete = [CommitOperationDelete(name) for name in before.deleted]
        message = f"Upload the zoo with loraprobe {__version__}"
        return str(
            api.create_commit(
                target.repo_id, [*add, *delete], commit_message=message, parent_commit=parent
            ).oid
        )


def _show(wanted: Sequence[Target]) -> None:
    """Print what would be pushed. The Hub need not be there for that: then everything is listed."""
    api, unreached = hub_api(None), False
    for target in wanted:
        state = State("", tuple(target.files))
        try:
            state = state if unreached else state_of(api, target)
        except HubError as error:
            unreached = True
            print(
                "the Hub was not reached, so what it has is not known and everything is listed:"
                f" {error}",
                flush=True,
            )
        print("\n".join(described(target, state)), flush=True)


def described(target: Target, state: State) -> list[str]:
    """A repository's lines: what differs, with sizes and hashes."""
    if not state.differs:
        return [f"{target.repo_id}: unchanged at {state.commit}"]
    where = {None: "a new repository", "": "not known"}.get(state.commit, f"at {state.commit}")
    lines = [
        f"{target.repo_id}: {where}, {_counted(state)},"
        f" {sum(target.files[name].stat().st_size for name in (*state.new, *state.changed))} bytes"
    ]
    marks = [
        (mark, name)
        for mark, names in (("+", state.new), ("~", state.changed), ("-", state.deleted))
        for name in names
    ]
    for mark, name in marks[:_LISTED]:
        path = target.files.get(name)
        lines.append(
            f"  {mark} {name}"
            + (f"  {path.stat().st_size} bytes  sha256 {sha256(path)}" if path else "")
        )
    return lines + [f"  ... and {len(marks) - _LISTED} more"] * (len(marks) > _LISTED)


def _counted(state: State) -> str:
    return f"{len(state.new)} new, {len(state.changed)} changed, {len(state.deleted)} deleted files"


if __name__ == "__main__":
    try:
        main()
    except (LoraprobeError, MissingExtra) as error:
        sys.exit(f"{type(error).__name__}: {error}")
