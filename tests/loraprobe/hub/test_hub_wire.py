"""Probes and adapters over the wire.

The real huggingface_hub between our library and a loopback Hub.

What goes wrong on the way is in test_hub_wire_faults.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraprobe.hub.format import PROBE_FILES
from tests.helpers.hub import Hub
from tests.helpers.hub_client import Client
from tests.helpers.wire import norms, peft_folder, refused, repo_of, saved, scores

pytestmark = pytest.mark.enable_socket  # the client knows no other endpoint than ours


@pytest.fixture
def hub(wire: tuple[Hub, Client]) -> Iterator[Hub]:
    wire[0].log.clear()
    yield wire[0]
    assert wire[0].crashes == []


@pytest.fixture
def client(wire: tuple[Hub, Client]) -> Client:
    return wire[1]


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """It is not there yet."""
    return repo_of(request)


# --- push and pull


@pytest.mark.parametrize(
    ("head", "file"),
    [("linear", "head.safetensors"), ("mlp", "head.safetensors"), ("xgboost", "head.safetensors")],
)
def test_a_pushed_probe_comes_back_bit_for_bit(
    hub: Hub, client: Client, repo: str, tmp_path: Path, head: str, file: str
) -> None:
    folder = saved(tmp_path / "probe", head)
    commit = client("push", folder, repo)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert commit == client("api", "model_info", repo)["sha"]
    loaded = client("load", repo, cache_dir=tmp_path / "cache")
    assert (loaded["commit"], loaded["scores"]) == (commit, scores(head))
    assert set(client("api", "list_repo_files", repo)) - {"scores.png"} == {
        *".gitattributes config.json README.md featurizer.safetensors".split(),
        file,
    }
    stored = {entry.method for entry in hub.log if entry.origin == "storage"}
    assert stored == ({"PUT", "GET"} if file == "head.safetensors" else set())
    assert not any(entry.token for entry in hub.log if entry.origin == "storage")
    agents = {
        entry.agent.partition(";")[0]
        for entry in hub.log
        if "/resolve/" in entry.path or "/commit/" in entry.path
    }
    assert {agent.partition("/")[0] for agent in agents} == {"loraprobe"}


def test_the_card_names_the_repository_it_is_in(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    client("push", saved(tmp_path / "probe"), repo)
    card = Path(client("download", repo, "README.md", cache_dir=tmp_path / "cache")).read_text()
    assert card.startswith("---\n")
    assert f'Probe.from_pretrained("{repo}")' in card
    assert "library_name: loraprobe" in card
    assert {entry.status for entry in hub.log if entry.path == "/api/validate-yaml"} == {200}


def test_a_private_probe_is_there_for_whoever_may_read_it(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    commit = client("push", saved(tmp_path / "probe"), repo, private=True)
    assert client("api", "model_info", repo)["private"]
    for token in (False, "stranger"):
        refused(client, "private.*token", "load", repo, token=token, cache_dir=tmp_path / "cache")
        refused(
            client,
            "private.*token",
            "load",
            repo,
            revision=commit,
            token=token,
            cache_dir=tmp_path / "cache",
        )
    assert client("load", repo, token="reads", cache_dir=tmp_path / "cache")["scores"] == scores()
    refused(
        client,
        "private.*Nothing was uploaded",
        "push",
        saved(tmp_path / "other", "mlp"),
        repo,
        private=False,
    )
    assert client("api", "model_info", repo)["sha"] == commit


def test_a_repository_holds_several_probes_by_subfolder(
    client: Client, repo: str, tmp_path: Path
) -> None:
    heads = {"first": "linear", "second": "cosine", "deep/er": "mlp"}
    commits = [
        client("push", saved(tmp_path / head, head), repo, subfolder=name)
        for name, head in heads.items()
    ]
    assert len(set(commits)) == 3
    for revision in (None, commits[-1]):
        for name, head in heads.items():
            loaded = client("load", repo, name, revision, cache_dir=tmp_path / "cache")
            assert (loaded["scores"], loaded["commit"]) == (scores(head), commits[-1])
    refused(client, "subfolder", "load", repo, cache_dir=tmp_path / "cache")
    refused(client, "config.json", "load", repo, "second", commits[0], cache_dir=tmp_path / "cache")


def test_a_branch_and_a_pull_request_leave_main_alone(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    main = client("push", saved(tmp_path / "linear"), repo)
    branch = client(
        "push", saved(tmp_path / "mlp", "mlp"), repo, branch="dev", commit_message="another head"
    )
    asked = client("push", saved(tmp_path / "cosine", "cosine"), repo, create_pr=True)
    refs = client("api", "list_repo_refs", repo, include_pull_requests=True)
    assert {ref["ref"]: ref["target_commit"] for kind in refs.values() for ref in kind} == {
        "refs/heads/main": main,
        "refs/heads/dev": branch,
        "refs/pr/1": asked,
    }
    assert client("api", "list_repo_commits", repo, revision="dev")[0]["title"] == "another head"
    for revision, commit, head in (
        ("main", main, "linear"),
        ("dev", branch, "mlp"),
        ("refs/pr/1", asked, "cosine"),
    ):
        loaded = client("load", repo, revision=revision, cache_dir=tmp_path / "cache")
        assert (loaded["commit"], loaded["scores"]) == (commit, scores(head))
    more = client("push", saved(tmp_path / "xgboost", "xgboost"), repo, branch="refs/pr/1")
    assert (
        client("load", repo, revision="refs/pr/1", cache_dir=tmp_path / "cache")["commit"] == more
    )
    refused(client, "branch", "push", tmp_path / "linear", repo, branch="dev", create_pr=True)


def test_a_pinned_commit_keeps_its_scores_after_a_newer_push(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    old = client("push", saved(tmp_path / "old"), repo)
    new = client("push", saved(tmp_path / "new", "linear", signal=0.2), repo)
    assert old != new
    assert scores() != scores(signal=0.2)
    for cache in ("one", "one", "two"):  # the second time from the cache
        for revision, commit, expected in (
            (old, old, scores()),
            (new, new, scores(signal=0.2)),
            (None, new, scores(signal=0.2)),
        ):
            loaded = client("load", repo, revision=revision, cache_dir=tmp_path / cache)
            assert (loaded["commit"], loaded["scores"]) == (commit, expected)
    client("api", "create_tag", repo, tag="v1", revision=old)
    assert client("load", repo, revision="v1", cache_dir=tmp_path / "two")["scores"] == scores()
    for name in ("config.json", "head.safetensors"):
        assert (
            Path(
                client("download", repo, name, revision=old, cache_dir=tmp_path / "two")
            ).read_bytes()
            == (tmp_path / "old" / name).read_bytes()
        )


def test_an_identical_push_makes_no_commit(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "probe")
    first = client("push", folder, repo, subfolder="a")
    assert client("push", folder, repo, subfolder="a") == first
    assert client("push", folder, repo, subfolder="b") != first  # the control
    assert len(client("api", "list_repo_commits", repo)) == 3
    assert sum(entry.path.endswith("/commit/main") for entry in hub.log) == 2


def test_another_head_leaves_no_file_of_the_one_before_and_all_of_others(
    client: Client, repo: str, tmp_path: Path
) -> None:
    old = client("push", saved(tmp_path / "linear"), repo)
    client("commit", repo, {"notes.md": "mine", "other/head.safetensors": "mine"})
    new = client("push", saved(tmp_path / "xgboost", "xgboost"), repo)
    files = set(client("api", "list_repo_files", repo))
    assert files - {"scores.png"} == {
        ".gitattributes",
        "notes.md",
        "other/head.safetensors",
        "config.json",
        "head.safetensors",
        "featurizer.safetensors",
        "README.md",
    }
    for revision, head in ((old, "linear"), (new, "xgboost")):
        assert client("load", repo, revision=revision, cache_dir=tmp_path / "cache")["head"] == head


# --- what the cache is for


def test_offline_everything_that_was_loaded_once_works_without_a_request(
    wire: tuple[Hub, Client], tmp_path: Path
) -> None:
    hub, client = wire
    probe, adapter = "org/offline-probe", "org/offline-adapter"
    commit = client("push", saved(tmp_path / "probe"), probe, subfolder="a")
    client("api", "create_repo", adapter)
    weights = client(
        "api", "upload_folder", repo_id=adapter, folder_path=peft_folder(tmp_path / "adapter")
    )["oid"]
    options = {"cache_dir": tmp_path / "cache"}
    client("load", probe, "a", **options)
    client("adapter", adapter, **options)
    client("push", saved(tmp_path / "never", "mlp"), "org/never-loaded")
    hub.log.clear()
    with Client(hub.url, tmp_path / "home", HF_HUB_OFFLINE="1") as offline:
        for revision in (None, commit):
            loaded = offline("load", probe, "a", revision, **options)
            assert (loaded["commit"], loaded["scores"]) == (commit, scores())
        for revision in (None, weights):
            assert offline("adapter", adapter, revision, **options) == {
                "commit": weights,
                "norms": norms(),
            }
        refused(offline, "HF_HUB_OFFLINE|cache", "load", "org/never-loaded", **options)
        refused(offline, "HF_HUB_OFFLINE|cache", "load", probe, "b", **options)
        refused(offline, "HF_HUB_OFFLINE|cache", "push", tmp_path / "probe", probe)
    assert hub.log == []


# --- adapters


# --- the command


def test_the_command_pushes_pulls_and_scores(client: Client, repo: str, tmp_path: Path) -> None:
    probe = saved(tmp_path / "probe")
    pushed = client("cli", "push", str(probe), repo)
    commit = client("api", "model_info", repo)["sha"]
    assert pushed["code"] == 0
    assert commit in pushed["out"]
    pulled = client("cli", "pull", repo, "--out", str(tmp_path / "out"), "--revision", commit)
    assert pulled["code"] == 0
    assert commit in pulled["out"]
    for name in set(PROBE_FILES) & {path.name for path in probe.iterdir()} - {"README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (probe / name).read_bytes()
    start, end = peft_folder(tmp_path / "start", 1), peft_folder(tmp_path / "end", 2)
    client("api", "create_repo", f"{repo}-adapter")
    client("api", "upload_folder", repo_id=f"{repo}-adapter", folder_path=end)
    # what main is from now on is not what was pinned
    client("push", saved(tmp_path / "new", "mlp"), repo)
    scored = []
    for adapter, source in (
        (f"{repo}-adapter", (repo, "--revision", commit)),
        (str(end), (str(probe),)),
    ):
        result = client("cli", "score", adapter, "--base", str(start), "--json", "--probe", *source)
        scored.append(json.loads(result["out"]))
        assert result["code"] == scored[-1]["exit_code"] != 2
    assert scored[0]["results"][0]["score"] == scored[1]["results"][0]["score"]
    assert (scored[0]["commit"], scored[1]["commit"]) == (commit, None)
