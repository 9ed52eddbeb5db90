"""What goes wrong on the way to a Hub and back: damage, lies, refusals and silence.

None of it is trusted, none is left behind. Damage in the cache is in test_hub_damage.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from loraprobe import Probe
from loraprobe.hub.format import config_digest
from tests.helpers.hub import REPO, Hub
from tests.helpers.hub_probes import refused, scores
from tests.helpers.probes import tiny_probe

load = Probe.from_pretrained


@pytest.fixture(autouse=True)
def writes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "writes")


@pytest.fixture
def probe(hub: Hub) -> str:
    """The commit of a linear probe."""
    return tiny_probe().push_to_hub(REPO)


def is_as_pushed(**options: object) -> bool:
    return scores(load(REPO, **options)) == scores(tiny_probe())  # type: ignore[arg-type]


def only_whole_files(cache: Path) -> bool:
    """Whether every file in the cache has the content that its name says.

    Also the library itself, which checks nothing, may read them.
    """
    blobs = [(blob.name, blob.read_bytes()) for blob in cache.glob("models--*/blobs/*")]
    return all(
        name
        in (
            hashlib.sha256(data).hexdigest(),
            hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        )
        for name, data in blobs
    )


# --- lies


def test_a_head_that_was_exchanged_after_pinning_is_refused(
    hub: Hub, probe: str, tmp_path: Path
) -> None:
    load(REPO, revision=probe, cache_dir=tmp_path / "before")
    tiny_probe("cosine").save_pretrained(tmp_path / "other")
    head = hub.at(probe) / "head.safetensors"
    former = head.read_bytes()
    head.write_bytes((tmp_path / "other/head.safetensors").read_bytes())
    hub.clear()
    assert is_as_pushed(revision=probe, cache_dir=tmp_path / "before")
    assert hub.log == []
    for revision in (probe, None):
        refused("sha256.*exchanged", load, REPO, revision=revision)
    head.write_bytes(former)
    assert is_as_pushed(revision=probe, force_download=True)


def test_a_file_of_another_commit_is_refused_and_stays_with_its_own(
    hub: Hub, probe: str, tmp_path: Path
) -> None:
    load(REPO, revision=probe)
    new = tiny_probe(signal=0.2).push_to_hub(REPO)
    there = f"/{REPO}/resolve/{probe}/head.safetensors"
    hub.faults.add("redirect", "head.safetensors", method="HEAD", times=1, value=there)
    refused(f"another commit .*{probe}", load, REPO, revision=new)
    for name, reason in (
        (probe, f"another commit .*{probe}"),
        ("../../evil", "Invalid pointer path"),
    ):  # the right content under a wrong name
        hub.faults.add("commit", "config.json", value=name, times=1)
        refused(reason, load, REPO, revision=new, cache_dir=tmp_path / "other")
    assert not list(tmp_path.rglob("evil"))
    assert is_as_pushed(revision=probe, local_files_only=True)
    for options in ({}, {"local_files_only": True}):
        assert scores(load(REPO, revision=new, **options)) == scores(tiny_probe(signal=0.2))


def test_a_file_that_is_longer_than_announced_is_refused(hub: Hub, probe: str) -> None:
    for name in ("config.json", "head.safetensors"):
        hub.faults.add("longer", name, value=100_000)
        refused("Consistency check failed", load, REPO)
        hub.faults.clear()
    assert is_as_pushed()


def test_main_may_move_while_it_is_read(hub: Hub, probe: str) -> None:
    new = tiny_probe("xgboost").push_to_hub(REPO)
    hub.faults.add("move", route="info", value=probe, times=1)
    hub.clear()
    loaded = load(REPO)
    assert (loaded.commit, loaded.head.name) == (new, "xgboost")
    assert {e.found["revision"] for e in hub.log if e.route == "resolve"} == {new}
    assert load(REPO).commit == probe


@pytest.mark.parametrize(
    ("method", "reason"), [("HEAD", "X-Repo-Commit"), ("GET", "not what the Hub lists")]
)
def test_a_redirect_elsewhere_gets_no_token_and_is_not_believed(
    hub: Hub, probe: str, tmp_path: Path, method: str, reason: str
) -> None:
    elsewhere = hub.neighbours["elsewhere.test"] = Hub(tmp_path / "elsewhere", tmp_path)
    config = (hub.at(probe) / "config.json").read_bytes()
    evil = config.replace(b'"threshold": 0.8', b'"threshold": 0.9')  # of the same length
    (elsewhere.commit(probe) / "config.json").write_bytes(evil)
    there = f"https://elsewhere.test/{REPO}/resolve/main/config.json"
    hub.faults.add("redirect", "config.json", method=method, value=there)
    refused(reason, load, REPO)
    assert {(entry.method, entry.status, entry.token) for entry in elsewhere.log} == (
        {("GET", 200, "")} if method == "GET" else set()
    )
    hub.faults.clear()
    assert only_whole_files(hub.cache)
    assert is_as_pushed()


# --- refusals


def test_a_token_that_is_wrong_missing_or_only_for_reading_is_named(hub: Hub, probe: str) -> None:
    other = tiny_probe("mlp").push_to_hub
    for revision in (None, probe):
        reason = "token.*HF_TOKEN.*Invalid credentials"
        refused(reason, load, REPO, revision=revision, token="wrong")
    for reason, repo, token in (
        ("token.*HF_TOKEN", REPO, "wrong"),
        ("token.*HF_TOKEN", "org/new", False),
        ("role 'write'.*write token", REPO, "reads"),
        ("namespace", REPO, "stranger"),
        ("namespace", "elsewhere/name", None),
    ):
        refused(reason, other, repo, token=token)
    assert hub.refs["main"] == probe
    refused("no such repository.*private.*token", load, "org/not-there")
    refused("no such revision.*branch", load, REPO, revision="v9")
    refused("no such revision|none of", load, REPO, revision="f" * 40)


@pytest.mark.parametrize("force", [False, True])
def test_a_gated_probe_says_that_it_is_gated(hub: Hub, probe: str, force: bool) -> None:
    hub.repositories[REPO].gated = True
    for token in (False, "stranger"):
        refused("gated.*conditions.*token", load, REPO, token=token, force_download=force)
    hub.repositories[REPO].granted.append("somebody")
    assert is_as_pushed(token="stranger", force_download=force)


def test_a_card_that_the_hub_refuses_is_a_hub_error_with_the_reason(
    hub: Hub, tmp_path: Path
) -> None:
    folder = tiny_probe().save_pretrained(tmp_path / "probe")
    config = json.loads((folder / "config.json").read_text())
    config["facts"]["licence"] = "my own"
    (folder / "config.json").write_text(json.dumps({**config, "digest": config_digest(config)}))
    refused('"license" must be one of', load(folder).push_to_hub, REPO)
    assert "commit" not in {entry.route for entry in hub.log}


def test_a_push_into_somebody_elses_new_commit_is_refused(hub: Hub, probe: str) -> None:
    repository = hub.repositories[REPO]
    theirs = hub.grow(repository, "main", {**hub.files(probe), "notes.md": b"theirs"}, "theirs")
    # what was main when the push looked is not main when it commits
    hub.faults.add("move", route="info", value=probe, times=1)
    refused("somebody else.*Push again", tiny_probe("mlp").push_to_hub, REPO)
    assert hub.refs["main"] == probe != theirs
    assert tiny_probe("mlp").push_to_hub(REPO) == hub.refs["main"]


def test_a_commit_that_is_not_what_was_pushed_is_reported(hub: Hub) -> None:
    hub.faults.add("flip", route="commit", times=1)
    refused("does not hold what was uploaded.*push again", tiny_probe("mlp").push_to_hub, REPO)
    commit = tiny_probe("mlp").push_to_hub(REPO)
    assert (load(REPO).commit, load(REPO).head.name) == (commit, "mlp")


# --- silence


def test_a_transfer_that_dies_is_resumed_or_refused_and_the_next_one_works(
    hub: Hub, probe: str, tmp_path: Path
) -> None:
    hub.faults.add("die", "head.safetensors", value=50)
    refused("did not deliver.*network", load, REPO)
    hub.faults.clear()
    assert is_as_pushed()
    hub.faults.add("die", "head.safetensors", value=50, times=1)
    hub.faults.add("status", "config.json", method="HEAD", value=503, times=1)
    assert is_as_pushed(cache_dir=tmp_path / "other")


def test_a_hub_that_fails_does_not_matter_to_what_is_pinned_and_cached(
    hub: Hub, probe: str, tmp_path: Path
) -> None:
    load(REPO)
    for kind, value, reason in (
        ("status", 500, "fault of its own.*500.*later"),
        ("drop", None, "network"),
        ("hang", None, "network"),
    ):
        hub.faults.add(kind, route="info", value=value)
        refused(reason, load, REPO)
        assert is_as_pushed(revision=probe)
        assert is_as_pushed(local_files_only=True)
        hub.faults.clear()
    hub.faults.add("status", "config.json", method="HEAD", value=502)
    refused("fault of its own.*502.*later", load, REPO, cache_dir=tmp_path / "other")


def test_a_push_that_breaks_off_commits_nothing_and_works_the_next_time(
    hub: Hub, probe: str
) -> None:
    for route in ("storage_put", "commit"):
        hub.faults.add("drop", route=route, times=1)  # the first one is tried again unasked
    refused("(?i)push again|try again", tiny_probe("mlp").push_to_hub, REPO)
    assert hub.refs["main"] == probe
    commit = tiny_probe("mlp").push_to_hub(REPO)
    assert (load(REPO).commit, scores(load(REPO))) == (commit, scores(tiny_probe("mlp")))
    assert len(hub.repositories[REPO].titles) == 3


def test_a_client_that_has_xet_pushes_what_needs_no_storage_and_says_what_to_do_for_the_rest(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Xet is the client's default, and takes a path of its own through it."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.all_regular = True
    first = tiny_probe().push_to_hub(REPO)
    assert tiny_probe().push_to_hub(REPO) == first
    assert is_as_pushed()
    hub.all_regular = False
    refused("HF_HUB_DISABLE_XET", tiny_probe("mlp").push_to_hub, REPO)
    assert hub.refs["main"] == first
