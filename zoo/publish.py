"""Publish the zoo on the Hugging Face Hub: a repository a probe, and ORG/zoo with all of them.

    python -m zoo.publish --namespace ORG            # a dry run: the repositories that would be
    python -m zoo.publish --namespace ORG --push     # with HF_TOKEN or the login of `hf auth login`

    ORG/loraprobe-chat-1m-linear, ...   a probe each, so that its downloads are counted
    ORG/chat-1m, ORG/chat-1m-adapters   the small base model, and the adapters of clients that no
                                        probe was fitted on
    ORG/zoo                             every probe in a folder: `loraprobe zoo list ORG/zoo`,
                                        `loraprobe zoo pull NAME --repo ORG/zoo`

Probes, records and held-out clients are verified first (zoo.verify). The Hub's client sends what
differs: a second run makes no commit, and an interrupted one goes on. Files that this does not
write are left alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from loraprobe._version import __version__
from loraprobe.errors import LoraprobeError, MissingExtra
from loraprobe.hub.card import CARD_NAME, card
from loraprobe.hub.errors import hub_errors
from loraprobe.hub.hub import PUBLISHED_FILES
from loraprobe.hub.names import looks_like_repo_id
from loraprobe.hub.snapshot import hub_api
from loraprobe.probe import Probe

from .labelled.diff_records import Comparison
from .labelled.records import Record, read_record
from .program import documented
from .publish_pages import adapters_card, base_card, collection_card
from .report import ZOO
from .verify import TOLERANCE, Shown, verify_probe, zoo_probes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COLLECTION, ADAPTERS = "zoo", "adapters"


@dataclass(frozen=True)
class Repository:
    """A repository as it should be: a folder of its files, and the probe where it holds one."""

    repo_id: str
    folder: Path
    probe: Probe | None = None

    def __str__(self) -> str:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        return f"{self.repo_id}: {len(files)} files, {size:,} bytes"


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify, then say or do what is to be done."""
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
        last = "nothing is published that its record does not show; see python -m zoo.verify"
        sys.exit("\n".join([*comparison.lines, last]))
    with TemporaryDirectory(prefix="loraprobe-zoo-") as scratch:
        wanted = repositories(shown, options.zoo, options.namespace, Path(scratch))
        if not options.push:
            print("a dry run: nothing is pushed without --push", flush=True)
            print("\n".join(map(str, wanted)))
            return
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # of hundreds of small files; a line a repository says more
        for repository in wanted:
            outcome = push(hub_api(None), repository, options.private)
            print(f"{repository.repo_id}: {outcome}", flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = documented(__doc__)
    add = parser.add_argument
    add("--namespace", required=True, metavar="ORG", help="user or organisation on the Hub")
    add("--push", action="store_true", help="do it; without, nothing is changed anywhere")
    add(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="what new repositories are [default: the account's default]",
    )
    add("--zoo", type=Path, default=ZOO, help="another folder of probes, records and adapters")
    return parser.parse_args(arguments)


def repositories(
    shown: Sequence[Shown], zoo: Path, namespace: str, scratch: Path
) -> list[Repository]:
    """Every repository of the zoo, written into `scratch`.

    The collection comes last, since its page leads to the others.
    """
    records = {one.name: read_record(one.record) for one in shown}
    repos = {name: probe_repo(namespace, record) for name, record in records.items()}
    together = Repository(f"{namespace}/{COLLECTION}", scratch / COLLECTION)
    found = []
    for one in shown:
        probe = Probe.from_pretrained(one.probe)
        alone = Repository(repos[one.name], scratch / "alone" / one.name, probe)
        probe.save_pretrained(alone.folder)
        found.append(alone)
        probe.save_pretrained(together.folder / one.name)
        page = card(probe, together.repo_id, one.name)
        (together.folder / one.name / CARD_NAME).write_text(page, encoding="utf-8")
    index = collection_card(records, together.repo_id, repos)
    (together.folder / CARD_NAME).write_text(index, encoding="utf-8")
    own = [record["base_model"] for record in records.values() if record["adapters"] == ADAPTERS]
    if own and (zoo / "base").is_dir():
        base = f"{namespace}/{own[0].rpartition('/')[2]}"
        pages = {
            "base": (base, base_card(zoo / "base", base, f"{base}-adapters")),
            ADAPTERS: (
                f"{base}-adapters",
                adapters_card(zoo / ADAPTERS, base, f"{base}-adapters"),
            ),
        }
        for name, (repo_id, page) in pages.items():
            shutil.copytree(zoo / name, scratch / name, ignore=_of_another_base)
            (scratch / name / CARD_NAME).write_text(page, encoding="utf-8")
            found.append(Repository(repo_id, scratch / name))
    return [*found, together]


def _of_another_base(folder: str, names: list[str]) -> list[str]:
    """Folders of adapters with a manifest of their own."""
    return [name for name in names if (Path(folder) / name / "manifest.csv").is_file()]


def probe_repo(namespace: str, record: Record) -> str:
    """The repository of one probe.

    >>> probe_repo("org", {"probe": "linear", "base_model": "meta/llama-8b"})
    'org/loraprobe-llama-8b-linear'
    """
    base, name = record["base_model"].rpartition("/")[2], record["probe"]
    return f"{namespace}/loraprobe-{name if name.startswith(base) else f'{base}-{name}'}"


def push(api: HfApi, repository: Repository, private: bool | None = None) -> str:
    """Bring a repository to what it should be in one commit, if it is not there yet.

    What was done, for people.

    Raises:
        HubError: the Hub refuses or cannot be reached.
    """
    repo_id = repository.repo_id
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        before = api.model_info(repo_id).sha
    if repository.probe is not None:  # checks what the Hub then holds
        commit = repository.probe.push_to_hub(repo_id)
    else:
        # What an earlier probe left, a head of another kind, in the folders of the collection.
        stale = [f"*/{name}" for name in PUBLISHED_FILES]
        with hub_errors(repo_id):
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=repository.folder,
                delete_patterns=stale if repo_id.endswith(f"/{COLLECTION}") else None,
                parent_commit=before,
                commit_message=f"Upload the zoo with loraprobe {__version__}",
            ).oid
    return f"{'unchanged at' if commit == before else 'pushed'} {commit}"


if __name__ == "__main__":
    try:
        main()
    except (LoraprobeError, MissingExtra) as error:
        sys.exit(f"{type(error).__name__}: {error}")
