"""What goes wrong between our library and a Hub: damage, lies, refusals and silence, over the wire.

None of it is trusted, none is left behind.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraprobe.hub.format import config_digest
from tests.helpers.hub import File, Hub
from tests.helpers.hub_client import Client
from tests.helpers.wire import USERS, peft_folder, refused, repo_of, saved, scores

pytestmark = pytest.mark.enable_socket  # the client knows no other endpoint than ours


@pytest.fixture
def hub(wire: tuple[Hub, Client]) -> Iterator[Hub]:
    wire[0].log.clear()
    yield wire[0]
    wire[0].faults.clear()
    assert wire[0].crashes == []


@pytest.fixture
def client(wire: tuple[Hub, Client]) -> Client:
    return wire[1]


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    return repo_of(request)


@pytest.fixture
def probe(client: Client, repo: str, tmp_path: Path) -> str:
    """The commit of a linear probe in `repo`."""
    commit: str = client("push", saved(tmp_path / "probe"), repo)
    return commit


@pytest.fixture
def adapter(client: Client, repo: str, tmp_path: Path) -> str:
    """The commit of an adapter in `repo`."""
    client("api", "create_repo", repo)
    commit: str = client(
        "api", "upload_folder", repo_id=repo, folder_path=peft_folder(tmp_path / "adapter")
    )["oid"]
    return commit


def only_whole_files(cache: Path) -> bool:
    """Whether every file in the cache has the content that its name says.

    Also the library itself, which checks nothing, may read them.
    """
    for blob in cache.glob("models--*/blobs/*"):
        data = blob.read_bytes()
        if blob.name not in (
            hashlib.sha256(data).hexdigest(),
            hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        ):
            return False
    return True


# --- damage


@pytest.mark.parametrize(
    ("path", "place"), [("head.safetensors", -1), ("config.json", 200), ("config.json", 0)]
)
def test_a_probe_that_is_damaged_on_the_way_is_refused_and_not_kept(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path, path: str, place: int
) -> None:
    hub.faults.add("flip", path, value=place)
    cache = {"cache_dir": tmp_path / "cache"}
    for revision in (None, probe, None):
        refused(
            client,
            f"{path}: what was downloaded is not what the Hub lists.*another network",
            "load",
            repo,
            revision=revision,
            **cache,
        )
        assert only_whole_files(tmp_path / "cache")
    hub.faults.clear()
    for revision in (probe, None):
        assert client("load", repo, revision=revision, **cache)["scores"] == scores()


# --- lies


def test_a_head_that_was_exchanged_after_pinning_is_refused(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path
) -> None:
    client("load", repo, revision=probe, cache_dir=tmp_path / "before")
    other = saved(tmp_path / "other", "cosine")
    hub.swap(repo, probe, "head.safetensors", (other / "head.safetensors").read_bytes())
    hub.log.clear()
    assert client("load", repo, revision=probe, cache_dir=tmp_path / "before")["scores"] == scores()
    assert hub.log == []
    for revision in (probe, None):
        refused(
            client,
            "sha256.*exchanged",
            "load",
            repo,
            revision=revision,
            cache_dir=tmp_path / "after",
        )
    hub.swap(
        repo, probe, "head.safetensors", (tmp_path / "probe" / "head.safetensors").read_bytes()
    )
    assert (
        client("load", repo, revision=probe, cache_dir=tmp_path / "after", force_download=True)[
            "scores"
        ]
        == scores()
    )


def test_a_file_of_another_commit_is_refused_and_stays_with_its_own(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path
) -> None:
    cache = {"cache_dir": tmp_path / "cache"}
    client("load", repo, revision=probe, **cache)
    new = client("push", saved(tmp_path / "new", signal=0.2), repo)
    hub.faults.add(
        "redirect",
        "head.safetensors",
        method="HEAD",
        times=1,
        value=f"/{repo}/resolve/{probe}/head.safetensors",
    )
    refused(client, f"another commit .*{probe}", "load", repo, revision=new, **cache)
    for name, reason in (
        (probe, f"another commit .*{probe}"),
        ("../../evil", "Invalid pointer path"),
    ):  # the right content under a wrong name
        hub.faults.add("commit", "config.json", value=name, times=1)
        refused(client, reason, "load", repo, revision=new, cache_dir=tmp_path / "other")
    assert not list(tmp_path.rglob("evil"))
    assert (
        client("load", repo, revision=probe, local_files_only=True, **cache)["scores"] == scores()
    )
    for options in ({}, {"local_files_only": True}):
        assert client("load", repo, revision=new, **cache, **options)["scores"] == scores(
            signal=0.2
        )


def test_a_file_that_is_longer_than_announced_is_refused(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path
) -> None:
    for name in ("config.json", "head.safetensors"):
        hub.faults.add("longer", name, value=100_000)
        refused(client, "Consistency check failed", "load", repo, cache_dir=tmp_path / "cache")
        hub.faults.clear()
    assert client("load", repo, cache_dir=tmp_path / "cache")["scores"] == scores()


def test_main_may_move_while_it_is_read(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path
) -> None:
    new = client("push", saved(tmp_path / "new", "xgboost"), repo)
    hub.faults.add("move", route="info", value=probe, times=1)
    loaded = client("load", repo, cache_dir=tmp_path / "cache")
    assert (loaded["commit"], loaded["head"], loaded["scores"]) == (
        new,
        "xgboost",
        scores("xgboost"),
    )
    asked = {
        match[1] for entry in hub.log if (match := re.search(r"/resolve/([^/]+)/", entry.path))
    }
    assert asked == {new}
    assert client("load", repo, cache_dir=tmp_path / "cache")["commit"] == probe


@pytest.mark.parametrize(
    ("method", "reason"), [("HEAD", "X-Repo-Commit"), ("GET", "not what the Hub lists")]
)
def test_a_redirect_elsewhere_gets_no_token_and_is_not_believed(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path, method: str, reason: str
) -> None:
    # of the same length
    evil = (
        (tmp_path / "probe" / "config.json")
        .read_bytes()
        .replace(b'"threshold": 0.8', b'"threshold": 0.9')
    )
    with Hub(USERS) as elsewhere:
        copy = elsewhere.create(repo)
        copy.commit("main", {"config.json": File(evil, lfs=False)}, "evil", "org")
        hub.faults.add(
            "redirect",
            "config.json",
            method=method,
            value=f"{elsewhere.url}/{repo}/resolve/main/config.json",
        )
        refused(client, reason, "load", repo, cache_dir=tmp_path / "cache")
    assert {(entry.method, entry.status, entry.token) for entry in elsewhere.log} == (
        {("GET", 200, False)} if method == "GET" else set()
    )
    hub.faults.clear()
    assert only_whole_files(tmp_path / "cache")
    assert client("load", repo, cache_dir=tmp_path / "cache")["scores"] == scores()


# --- refusals


def test_a_token_that_is_wrong_missing_or_only_for_reading_is_named(
    client: Client, repo: str, probe: str, tmp_path: Path
) -> None:
    cache, folder = {"cache_dir": tmp_path / "cache"}, saved(tmp_path / "other", "mlp")
    for revision in (None, probe):
        refused(
            client,
            "token.*HF_TOKEN.*Invalid credentials",
            "load",
            repo,
            revision=revision,
            token="wrong",
            **cache,
        )
    refused(client, "token.*HF_TOKEN", "push", folder, repo, token="wrong")
    refused(client, "token.*HF_TOKEN", "push", folder, f"{repo}-new", token=False)
    refused(client, "role 'write'.*write token", "push", folder, repo, token="reads")
    refused(client, "namespace", "push", folder, repo, token="stranger")
    refused(client, "namespace", "push", folder, "elsewhere/name")
    assert client("api", "model_info", repo)["sha"] == probe
    refused(client, "no such repository.*private.*token", "load", "org/not-there", **cache)
    refused(client, "no such revision.*branch", "load", repo, revision="v9", **cache)
    refused(client, "no such revision|none of", "load", repo, revision="f" * 40, **cache)


@pytest.mark.parametrize("force", [False, True])
def test_a_gated_probe_says_that_it_is_gated(
    client: Client, repo: str, probe: str, tmp_path: Path, force: bool
) -> None:
    client("api", "update_repo_settings", repo, gated="manual")
    for token in (False, "stranger"):
        refused(
            client,
            "gated.*conditions.*token",
            "load",
            repo,
            token=token,
            cache_dir=tmp_path / "cache",
            force_download=force,
        )
    client("api", "grant_access", repo, "somebody")
    assert (
        client("load", repo, token="stranger", cache_dir=tmp_path / "cache", force_download=force)[
            "scores"
        ]
        == scores()
    )


def test_a_card_that_the_hub_refuses_is_a_hub_error_with_the_reason(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "probe")
    config = json.loads((folder / "config.json").read_text())
    config["facts"]["licence"] = "my own"
    (folder / "config.json").write_text(json.dumps({**config, "digest": config_digest(config)}))
    refused(client, '"license" must be one of', "push", folder, repo)
    assert not any("/commit/" in entry.path for entry in hub.log)


def test_a_push_into_somebody_elses_new_commit_is_refused(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path
) -> None:
    theirs = client("commit", repo, {"notes.md": "theirs"}, revision="main")["oid"]
    # what was main when the push looked is not main when it commits
    hub.faults.add("move", route="info", value=probe, times=1)
    refused(client, "somebody else.*Push again", "push", saved(tmp_path / "new", "mlp"), repo)
    assert client("api", "model_info", repo)["sha"] == probe != theirs
    assert client("push", tmp_path / "new", repo) == client("api", "model_info", repo)["sha"]


def test_a_commit_that_is_not_what_was_pushed_is_reported(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    hub.faults.add("flip", route="commit", times=1)
    refused(
        client,
        "does not hold what was uploaded.*push again",
        "push",
        saved(tmp_path / "new", "mlp"),
        repo,
    )
    commit = client("push", tmp_path / "new", repo)
    assert client("load", repo, cache_dir=tmp_path / "cache") == {
        "commit": commit,
        "head": "mlp",
        "scores": scores("mlp"),
    }


# --- silence


def test_a_transfer_that_dies_for_good_is_refused_and_the_next_one_works(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path
) -> None:
    hub.faults.add("die", "head.safetensors", value=50)
    refused(client, "did not deliver.*network", "load", repo, cache_dir=tmp_path / "cache")
    hub.faults.clear()
    assert client("load", repo, cache_dir=tmp_path / "cache")["scores"] == scores()


def test_faults_that_pass_are_waited_for(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path
) -> None:
    hub.faults.add("die", "head.safetensors", value=50, times=1)
    hub.faults.add("status", "config.json", method="HEAD", value=503, times=1)
    assert client("load", repo, cache_dir=tmp_path / "cache")["scores"] == scores()


def test_a_hub_that_fails_does_not_matter_to_what_is_pinned_and_cached(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path
) -> None:
    cache = {"cache_dir": tmp_path / "cache"}
    client("load", repo, **cache)
    for kind, value, reason in (
        ("status", 500, "fault of its own.*500.*later"),
        ("drop", None, "network"),
    ):
        hub.faults.add(kind, route="info", value=value)
        refused(client, reason, "load", repo, **cache)
        assert client("load", repo, revision=probe, **cache)["scores"] == scores()
        assert client("load", repo, local_files_only=True, **cache)["scores"] == scores()
        hub.faults.clear()
    hub.faults.add("status", "config.json", method="HEAD", value=502)
    refused(client, "fault of its own.*502.*later", "load", repo, cache_dir=tmp_path / "other")


def test_a_hub_that_never_answers_is_not_waited_for_for_ever(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path
) -> None:
    hub.faults.add("hang", route="info")
    refused(client, "network", "load", repo, cache_dir=tmp_path / "cache")


def test_a_push_that_breaks_off_commits_nothing_and_works_the_next_time(
    hub: Hub, client: Client, repo: str, probe: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "new", "mlp")
    for route in ("storage_put", "commit"):
        hub.faults.add("drop", route=route, times=1)  # the first one is tried again unasked
    refused(client, "(?i)push again|try again", "push", folder, repo)
    assert client("api", "model_info", repo)["sha"] == probe
    commit = client("push", folder, repo)
    assert client("load", repo, cache_dir=tmp_path / "cache") == {
        "commit": commit,
        "head": "mlp",
        "scores": scores("mlp"),
    }
    assert len(client("api", "list_repo_commits", repo)) == 3


def test_a_client_that_has_xet_pushes_what_needs_no_storage_and_says_what_to_do_for_the_rest(
    tmp_path: Path,
) -> None:
    """Xet is the client's default, and takes a path of its own through it."""
    with (
        Hub(USERS, all_regular=True) as hub,
        Client(hub.url, tmp_path / "home", HF_TOKEN="writes", HF_HUB_DISABLE_XET="0") as client,
    ):
        folder = saved(tmp_path / "probe")
        first = client("push", folder, "org/name")
        assert client("push", folder, "org/name") == first
        asked = client("push", saved(tmp_path / "other", "cosine"), "org/name", create_pr=True)
        for revision, commit, head in (("main", first, "linear"), ("refs/pr/1", asked, "cosine")):
            assert client("load", "org/name", revision=revision) == {
                "commit": commit,
                "head": "linear",
                "scores": scores(head),
            }
        hub.all_regular = False
        refused(client, "HF_HUB_DISABLE_XET", "push", saved(tmp_path / "third", "mlp"), "org/name")
        assert client("api", "model_info", "org/name")["sha"] == first
    assert hub.crashes == []
