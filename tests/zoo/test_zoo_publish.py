"""zoo.publish against a loopback Hub.

A dry run changes nothing, a push is whole, a second one makes no commit.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pytest

from loraprobe import Probe
from tests.helpers.contributed import NAME, ROOT, a_zoo, edit, made
from tests.helpers.hub import Hub
from tests.helpers.hub_client import Client
from tests.helpers.wire import serving
from zoo.publish import probe_repo
from zoo.records import facts_of, fitted_facts, read_record

# on the loopback interface only: the client knows no other endpoint
pytestmark = pytest.mark.enable_socket

ALONE, BASE, ADAPTERS, ZOO = (
    *"org/loraprobe-llama-tiny-linear org/llama org/llama-adapters org/zoo".split(),
)
PROBE_FILES = {
    *("config.json", "featurizer.safetensors", "head.safetensors", "README.md", "scores.png")
}
# huggingface_hub reads its environment once, and importing everything takes longer than publishing:
# one process runs several commands.
RUNNER = """
import contextlib, io, json, sys
from zoo.publish import main
from loraprobe.errors import LoraprobeError
for line in sys.stdin:
    printed, sys.argv, code = io.StringIO(), ["zoo.publish", *json.loads(line)], 0
    with contextlib.redirect_stdout(printed):
        try:
            main()
        except (SystemExit, LoraprobeError) as error:
            code = str(error)
    print(json.dumps([code, printed.getvalue()]), flush=True)
"""


class Publisher:
    """`python -m zoo.publish`, again and again in one process."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, "-c", RUNNER]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, zoo: Path, *options: str, namespace: str = "org") -> tuple[Any, str]:
        """Exit code and what is printed."""
        orders, answers = (
            cast("IO[str]", self._process.stdin),
            cast("IO[str]", self._process.stdout),
        )
        orders.write(json.dumps(["--zoo", str(zoo), "--namespace", namespace, *options]) + "\n")
        orders.flush()
        code, printed = json.loads(answers.readline())
        return code, printed

    def close(self) -> None:
        self._process.communicate(timeout=30)


class Served(NamedTuple):
    hub: Hub
    client: Client
    publish: Publisher

    def heads(self) -> dict[str, str]:
        """Repository -> the commit it is at; the ones that exist."""
        found = {repo: self.hub.head(repo) for repo in (ALONE, BASE, ADAPTERS, ZOO)}
        return {repo: commit for repo, commit in found.items() if commit is not None}

    def files(self, repo: str) -> set[str]:
        return set(self.client("api", "list_repo_files", repo)) - {".gitattributes"}


@pytest.fixture(scope="module")
def wired(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A Hub, and a process that publishes there: starting it takes longer than publishing."""
    with serving(tmp_path_factory.mktemp("wire")) as (hub, client):
        publish = Publisher(client.environment)
        yield Served(hub, client, publish)
        publish.close()


@pytest.fixture
def served(wired: Served) -> Served:
    """With nothing on the Hub."""
    hub = wired.hub
    for kept in (hub.repositories, hub.contents, hub.faults, hub.log):
        kept.clear()
    return wired


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A zoo of one probe that was fitted on updates of the zoo's own base model."""
    zoo = a_zoo(tmp_path / "zoo")
    (zoo / f"contributed/{NAME}").rename(zoo / "adapters")
    edit(zoo / f"records/{NAME}.json", "adapters", value="adapters")
    shutil.copytree(made().parent / "base", zoo / "base")
    shutil.copy(ROOT / "zoo/base/facts.json", zoo / "base")
    return zoo


def refit(zoo: Path) -> None:
    """Another probe under the same name, its record with it."""
    path, folder = zoo / f"records/{NAME}.json", zoo / f"probes/{NAME}"
    record, probe = read_record(path), Probe.from_pretrained(folder)
    record["about"]["detects"] += " A second edition."
    probe = replace(probe, facts={**facts_of(record), "training": probe.facts["training"]})
    probe.save_pretrained(folder)
    path.write_text(json.dumps({**record, "fitted": fitted_facts(probe, folder)}))


def test_a_dry_run_a_push_a_second_push_and_a_push_of_a_changed_probe(
    served: Served, zoo: Path
) -> None:
    # a dry run lists everything, with sizes and hashes, and changes nothing
    code, printed = served.publish(zoo)
    assert code == 0
    assert "a dry run" in printed
    head = (zoo / f"probes/{NAME}/head.safetensors").read_bytes()
    for name in ("head.safetensors", f"{NAME}/head.safetensors"):
        assert (
            f"  + {name}  {len(head)} bytes  sha256 {hashlib.sha256(head).hexdigest()}" in printed
        )
    assert [f"{repo}: a new repository" in printed for repo in (ALONE, BASE, ADAPTERS, ZOO)] == [
        True
    ] * 4
    assert served.heads() == {}
    assert {entry.method for entry in served.hub.log} <= {"GET", "HEAD"}

    # a push brings all of it, and each repository is what it should be
    code, printed = served.publish(zoo, "--push")
    assert code == 0, printed
    pushed = served.heads()
    assert set(re.findall(r"(\S+): pushed ([0-9a-f]{40})", printed)) == set(pushed.items())
    assert (len(pushed), served.files(ALONE)) == (4, PROBE_FILES)
    assert served.files(ZOO) == {"README.md", *(f"{NAME}/{name}" for name in PROBE_FILES)}
    assert {"manifest.csv", "initial/adapter_config.json", "README.md"} <= served.files(ADAPTERS)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= served.files(BASE)
    assert {entry.status for entry in served.hub.log if entry.path == "/api/validate-yaml"} == {200}

    # neither a dry run nor a second push finds anything to do
    for options in ((), ("--push",)):
        code, printed = served.publish(zoo, *options)
        assert code == 0
        assert [f"{repo}: unchanged at {commit}" in printed for repo, commit in pushed.items()] == [
            True
        ] * 4
        assert served.heads() == pushed

    # a changed probe makes one commit in its own repository and one in the collection
    refit(zoo)
    code, printed = served.publish(zoo)
    assert "  ~ config.json" in printed
    assert "  ~ head.safetensors" not in printed
    assert served.heads() == pushed
    code, printed = served.publish(zoo, "--push")
    assert code == 0, printed
    changed = {repo for repo, commit in served.heads().items() if commit != pushed[repo]}
    assert changed == {ALONE, ZOO}
    counts = {repo: len(served.client("api", "list_repo_commits", repo)) for repo in pushed}
    # the first one is the Hub's own
    assert {repo: count - 1 for repo, count in counts.items()} == {
        ALONE: 2,
        BASE: 1,
        ADAPTERS: 1,
        ZOO: 2,
    }


def test_what_was_pushed_is_found_by_the_command_line(
    served: Served, zoo: Path, tmp_path: Path
) -> None:
    assert served.publish(zoo, "--push", "--private")[0] == 0
    listed = served.client("cli", "zoo", "list", ZOO, "--json")
    assert [probe["name"] for probe in json.loads(listed["out"])] == [NAME]
    pulled = served.client(
        "cli", "zoo", "pull", NAME, "--repo", ZOO, "--out", str(tmp_path / "pulled")
    )
    assert pulled["code"] == 0, pulled["err"]
    probe = Probe.from_pretrained(tmp_path / "pulled")
    assert probe.facts == Probe.from_pretrained(zoo / f"probes/{NAME}").facts
    assert (
        f'Probe.from_pretrained("{ZOO}", subfolder="{NAME}")'
        in (tmp_path / "pulled/README.md").read_text()
    )
    assert all(
        served.client("api", "model_info", repo)["private"] for repo in (ALONE, ZOO, ADAPTERS, BASE)
    )
    index = Path(
        served.client("download", ZOO, "README.md", cache_dir=tmp_path / "cache")
    ).read_text()
    assert f"[{NAME}]({NAME}/README.md)" in index
    assert f"[{ALONE}](/{ALONE})" in index


def test_an_interrupted_push_goes_on_and_leaves_strangers_files_alone(
    served: Served, zoo: Path
) -> None:
    served.hub.faults.add("status", f"*{ADAPTERS}*", route="commit", value=403)
    code, printed = served.publish(zoo, "--push")
    assert code.startswith(f"{ADAPTERS}: ")
    assert (f"{ALONE}: pushed" in printed, ZOO in served.heads()) == (True, False)
    served.hub.faults.clear()
    before = served.heads()
    served.client("commit", BASE, {"notes.txt": "somebody else's"})
    served.client(
        "commit", ALONE, {"head.json": "of an earlier head", "notes.txt": "somebody else's"}
    )
    code, printed = served.publish(zoo)
    assert "  - head.json" in printed
    code, printed = served.publish(zoo, "--push")
    assert code == 0, printed
    assert f"{BASE}: unchanged at {served.heads()[BASE]}" in printed
    assert served.files(ALONE) == {*PROBE_FILES, "notes.txt"}
    assert "notes.txt" in served.files(BASE)
    assert before.keys() < served.heads().keys() == {ALONE, BASE, ADAPTERS, ZOO}
    assert served.publish(zoo, "--push")[1].count("unchanged at") == 4


def test_nothing_is_pushed_that_a_record_does_not_show_or_to_a_place_that_cannot_be(
    served: Served, zoo: Path
) -> None:
    assert "user or an organisation" in served.publish(zoo, "--push", namespace="a/b")[0]
    code, _ = served.publish(zoo, "--push", namespace="nobody")
    assert code.startswith("nobody/loraprobe-llama-tiny-linear: the token may not do this")
    edit(zoo / f"records/{NAME}.json", "held_out_clients", "auroc", value=0.999)
    code, _ = served.publish(zoo, "--push")
    assert "held_out_clients.auroc: the record says 0.999" in code
    assert "nothing is published that its record does not show" in code
    assert served.heads() == {}


def test_a_dry_run_needs_no_hub(served: Served, zoo: Path) -> None:
    publish = Publisher(
        {**served.client.environment, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    )
    code, printed = publish(zoo)
    assert publish(zoo, "--push")[0].startswith(f"{ALONE}: ")
    publish.close()
    assert code == 0
    assert printed.count("the Hub was not reached") == 1
    assert printed.count("a new repository") == 0
    assert [f"{repo}: " in printed for repo in (ALONE, BASE, ADAPTERS, ZOO)] == [True] * 4


@pytest.mark.parametrize(
    ("name", "base", "repo"),
    [
        ("linear", "loraprobe/chat-1m", "org/loraprobe-chat-1m-linear"),
        ("linear", "chat-1m", "org/loraprobe-chat-1m-linear"),
        ("llama-8b-linear", "meta/llama-8b", "org/loraprobe-llama-8b-linear"),
    ],
)
def test_a_probes_repository_is_named_after_base_and_probe(name: str, base: str, repo: str) -> None:
    assert probe_repo("org", {"probe": name, "base_model": base}) == repo
