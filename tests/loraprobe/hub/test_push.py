"""Probes on their way to a Hub and back; what goes wrong on it is in test_hub_faults.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from loraprobe import Probe
from loraprobe.hub.format import PROBE_FILES
from tests.helpers.boxed import invoke
from tests.helpers.hub import REPO, Hub
from tests.helpers.hub_probes import refused, scores
from tests.helpers.probes import tiny_probe

load = Probe.from_pretrained


@pytest.fixture(autouse=True)
def writes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "writes")


@pytest.mark.parametrize("head", ["linear", "mlp", "xgboost"])
def test_a_pushed_probe_comes_back_bit_for_bit_with_a_card(hub: Hub, head: str) -> None:
    commit = tiny_probe(head).push_to_hub(REPO)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert commit == hub.refs["main"]
    loaded = load(REPO)
    assert (loaded.commit, scores(loaded)) == (commit, scores(tiny_probe(head)))
    files = hub.files(commit)
    assert set(files) - {"scores.png"} == {
        *".gitattributes config.json README.md featurizer.safetensors head.safetensors".split()
    }
    stored = [entry for entry in hub.log if entry.origin == "storage"]
    assert {entry.method for entry in stored} == {"PUT", "GET"}
    assert not any(entry.token for entry in stored)
    used = [entry for entry in hub.log if entry.route in ("resolve", "commit")]
    assert {entry.agent.partition("/")[0] for entry in used} == {"loraprobe"}
    card = files["README.md"].decode()
    assert card.startswith("---\n")
    assert f'Probe.from_pretrained("{REPO}")' in card
    assert "library_name: loraprobe" in card
    assert {entry.status for entry in hub.log if entry.route == "validate_yaml"} == {200}


def test_a_private_probe_is_there_for_whoever_may_read_it(hub: Hub, tmp_path: Path) -> None:
    commit = tiny_probe().push_to_hub(REPO, private=True)
    assert hub.repositories[REPO].private
    for token in (False, "stranger"):
        for revision in (None, commit):
            refused("private.*token", load, REPO, revision=revision, token=token)
    assert scores(load(REPO, token="reads")) == scores(tiny_probe())
    refused("private.*Nothing was uploaded", tiny_probe("mlp").push_to_hub, REPO, private=False)
    assert hub.refs["main"] == commit


def test_a_repository_holds_several_probes_by_subfolder(hub: Hub) -> None:
    heads = {"first": "linear", "second": "cosine", "deep/er": "mlp"}
    commits = [tiny_probe(head).push_to_hub(REPO, subfolder=name) for name, head in heads.items()]
    assert len(set(commits)) == 3
    for revision in (None, commits[-1]):
        for name, head in heads.items():
            loaded = load(REPO, name, revision)
            assert (scores(loaded), loaded.commit) == (scores(tiny_probe(head)), commits[-1])
    refused("subfolder", load, REPO)
    refused("config.json", load, REPO, "second", commits[0])


def test_a_branch_and_a_pull_request_leave_main_alone(hub: Hub) -> None:
    pushed = {
        "main": tiny_probe().push_to_hub(REPO),
        "dev": tiny_probe("mlp").push_to_hub(REPO, branch="dev", commit_message="another head"),
        "refs/pr/1": tiny_probe("cosine").push_to_hub(REPO, create_pr=True),
    }
    assert hub.refs == pushed
    assert hub.repositories[REPO].titles[pushed["dev"]] == "another head"
    for (revision, commit), head in zip(pushed.items(), ("linear", "mlp", "cosine"), strict=True):
        loaded = load(REPO, revision=revision)
        assert (loaded.commit, scores(loaded)) == (commit, scores(tiny_probe(head)))
    more = tiny_probe("xgboost").push_to_hub(REPO, branch="refs/pr/1")
    assert load(REPO, revision="refs/pr/1").commit == more
    refused("against main", tiny_probe().push_to_hub, REPO, branch="dev", create_pr=True)


def test_an_identical_push_makes_no_commit(hub: Hub) -> None:
    first = tiny_probe().push_to_hub(REPO, subfolder="a")
    assert tiny_probe().push_to_hub(REPO, subfolder="a") == first
    assert tiny_probe().push_to_hub(REPO, subfolder="b") != first  # the control
    assert len(hub.repositories[REPO].titles) == 3


def test_another_head_leaves_no_file_of_the_one_before_and_all_of_others(hub: Hub) -> None:
    old = tiny_probe().push_to_hub(REPO)
    theirs = {"notes.md": b"mine", "other/head.safetensors": b"mine", "head.json": b"earlier"}
    hub.grow(hub.repositories[REPO], "main", {**hub.files(old), **theirs}, "somebody else's")
    new = tiny_probe("xgboost").push_to_hub(REPO)
    assert set(hub.files(new)) - {"scores.png"} == {
        *".gitattributes notes.md other/head.safetensors README.md".split(),
        *"config.json head.safetensors featurizer.safetensors".split(),
    }
    for revision, head in ((old, "linear"), (new, "xgboost")):
        assert load(REPO, revision=revision).head.name == head


def test_offline_nothing_is_pushed_or_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded once is read: test_hub_cache.py."""
    tiny_probe("mlp").push_to_hub("org/never-loaded")
    hub.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for operation, repo in ((load, "org/never-loaded"), (tiny_probe("mlp").push_to_hub, REPO)):
        refused("HF_HUB_OFFLINE|cache", operation, repo)
    assert hub.log == []


def test_the_command_pushes_and_pulls(hub: Hub, tmp_path: Path) -> None:
    probe = tiny_probe().save_pretrained(tmp_path / "probe")
    pushed = invoke("push", probe, REPO, "--private", "-m", "why").stdout.splitlines()
    commit = hub.refs["main"]
    assert pushed == [commit, f'Probe.from_pretrained("{REPO}", revision="{commit}")']
    assert (hub.repositories[REPO].titles[commit], hub.repositories[REPO].private) == ("why", True)
    for options, ref in (
        (("--branch", "dev", "--subfolder", "a/b"), "dev"),
        (("--create-pr", "--subfolder", "c"), "refs/pr/1"),
    ):
        made, how = invoke("push", probe, REPO, *options).stdout.splitlines()
        assert (made, hub.refs["main"]) == (hub.refs[ref], commit)
        assert f'subfolder="{options[-1]}"' in how
    assert "Nothing was uploaded" in invoke("push", probe, REPO, "--public", code=2).stderr
    invoke("pull", REPO, "--out", tmp_path / "out", "--revision", commit)
    for name in set(PROBE_FILES) & {path.name for path in probe.iterdir()} - {"README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (probe / name).read_bytes()
