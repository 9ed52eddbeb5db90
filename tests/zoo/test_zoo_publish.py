"""zoo.publish against the Hub of the tests.

A dry run changes nothing, a push is whole, a second one makes no commit.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loraprobe import Probe
from loraprobe.errors import LoraprobeError
from tests.helpers.boxed import invoke
from tests.helpers.hub import Hub
from tests.helpers.small_zoo import NAME, ROOT, a_zoo, base, edit
from zoo.labelled.records import facts_of, fitted_facts, read_record
from zoo.publish import main, probe_repo

ALONE, BASE, ADAPTERS, ZOO = (
    *"org/loraprobe-llama-tiny-linear org/llama org/llama-adapters org/zoo".split(),
)
PROBE_FILES = {
    *("config.json", "featurizer.safetensors", "head.safetensors", "README.md", "scores.png")
}


class Served(NamedTuple):
    hub: Hub

    def publish(self, zoo: Path, *options: str, namespace: str = "org") -> tuple[Any, str]:
        """Exit code of `python -m zoo.publish`, and what it prints."""
        printed = io.StringIO()
        code: Any = 0
        with redirect_stdout(printed):
            try:
                main(["--zoo", str(zoo), "--namespace", namespace, *options])
            except (SystemExit, LoraprobeError) as error:
                code = str(error)
        return code, printed.getvalue()

    def heads(self) -> dict[str, str]:
        """Repository -> the commit it is at."""
        return {repo: found.refs["main"] for repo, found in self.hub.repositories.items()}

    def files(self, repo: str) -> set[str]:
        return set(self.hub.files(self.heads()[repo], repo)) - {".gitattributes"}

    def add(self, repo: str, **texts: bytes) -> None:
        """A commit of somebody else."""
        files = {**self.hub.files(self.heads()[repo], repo), **texts}
        self.hub.grow(self.hub.repositories[repo], "main", files, "theirs")


@pytest.fixture
def served(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setenv("HF_TOKEN", "writes")
    monkeypatch.chdir(ROOT)
    return Served(hub)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A zoo of one probe that was fitted on updates of the zoo's own base model."""
    zoo = a_zoo(tmp_path / "zoo")
    shutil.copytree(base(), zoo / "base")
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
    # a dry run lists everything and asks nobody
    code, printed = served.publish(zoo)
    assert code == 0
    assert "a dry run" in printed
    assert re.findall(r"^(org/\S+): \d+ files", printed, re.M) == [ALONE, BASE, ADAPTERS, ZOO]
    assert served.hub.log == []

    # a push brings all of it, and each repository is what it should be
    code, printed = served.publish(zoo, "--push")
    assert code == 0, printed
    pushed = served.heads()
    assert set(re.findall(r"(\S+): pushed ([0-9a-f]{40})", printed)) == set(pushed.items())
    assert (len(pushed), served.files(ALONE)) == (4, PROBE_FILES)
    assert served.files(ZOO) == {"README.md", *(f"{NAME}/{name}" for name in PROBE_FILES)}
    assert {"manifest.csv", "initial/adapter_config.json", "README.md"} <= served.files(ADAPTERS)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= served.files(BASE)
    assert {entry.status for entry in served.hub.log if entry.route == "validate_yaml"} == {200}

    # a second push finds nothing to do
    code, printed = served.publish(zoo, "--push")
    assert code == 0
    for repo, commit in pushed.items():
        assert f"{repo}: unchanged at {commit}" in printed
    assert served.heads() == pushed

    # a changed probe makes one commit in its own repository and one in the collection
    refit(zoo)
    code, printed = served.publish(zoo, "--push")
    assert code == 0, printed
    changed = {repo for repo, commit in served.heads().items() if commit != pushed[repo]}
    assert changed == {ALONE, ZOO}


def test_what_was_pushed_is_found_by_the_command_line(
    served: Served, zoo: Path, tmp_path: Path
) -> None:
    assert served.publish(zoo, "--push", "--private")[0] == 0
    listed = json.loads(invoke("zoo", "list", ZOO, "--json").stdout)
    assert [probe["name"] for probe in listed] == [NAME]
    invoke("zoo", "pull", NAME, "--repo", ZOO, "--out", tmp_path / "pulled")
    probe = Probe.from_pretrained(tmp_path / "pulled")
    assert probe.facts == Probe.from_pretrained(zoo / f"probes/{NAME}").facts
    assert (
        f'Probe.from_pretrained("{ZOO}", subfolder="{NAME}")'
        in (tmp_path / "pulled/README.md").read_text()
    )
    assert all(found.private for found in served.hub.repositories.values())
    index = (served.hub.at(served.heads()[ZOO], ZOO) / "README.md").read_text()
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
    theirs = {"notes.txt": b"somebody else's"}
    served.add(BASE, **theirs)
    served.add(ALONE, **theirs, **{"head.json": b"of an earlier head"})
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
