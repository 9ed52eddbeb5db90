"""Fetching from the Hub, without a Hub: one commit is pinned, little is asked for, and every failure has a name."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import make
import pytest
from huggingface_hub import errors as hub_errors
from probes import labelled_adapter, new_data, tiny_probe

from loraprobe import Probe, load_adapter
from loraprobe.errors import HubError, ProbeFormatError
from loraprobe.format import PROBE_FILES
from loraprobe.hub import fetch_adapter, fetch_probe, looks_like_repo_id

SHA = "0123456789abcdef0123456789abcdef01234567"
MOVED = "f" * 40


class FakeHub:
    """Stands in for the two functions that speak to the Hub, and remembers what it was asked."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.asked: list[Any] = []
        self.fetched: list[dict[str, Any]] = []
        self.sha: str | None = SHA
        self.error: Exception | None = None
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, repo_id, **asked: self.model_info(api, repo_id, **asked))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, api: Any, repo_id: str, **asked: Any) -> SimpleNamespace:
        self.asked.append((repo_id, asked["revision"], api.token))
        if self.error:
            raise self.error
        return SimpleNamespace(sha=self.sha)

    def snapshot_download(self, repo_id: str, **asked: Any) -> str:
        self.fetched.append({"repo_id": repo_id, **asked})
        if self.error:
            raise self.error
        return str(self.root / SHA if asked["local_files_only"] else self.root / asked["revision"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A Hub with a probe at the root and in the folder a/b, in two commits."""
    for commit, head in ((SHA, "linear"), (MOVED, "cosine")):
        tiny_probe(head).save_pretrained(tmp_path / commit)
        tiny_probe(head).save_pretrained(tmp_path / commit / "a" / "b")
    return FakeHub(tmp_path, monkeypatch)


@pytest.mark.parametrize("revision", [None, "main", "v1", SHA[:12], SHA.upper(), "refs/pr/1"])
def test_a_name_that_moves_is_resolved_once_and_the_commit_passed_on(hub: FakeHub, revision: str | None) -> None:
    probe = Probe.from_pretrained("org/name", revision=revision, token="t")
    assert hub.asked == [("org/name", revision, "t")]
    assert [call["revision"] for call in hub.fetched] == [SHA]
    assert probe.commit == SHA
    assert probe(new_data().adapters).tobytes() == tiny_probe("linear")(new_data().adapters).tobytes()


def test_a_full_commit_is_fetched_without_a_question(hub: FakeHub) -> None:
    probe = Probe.from_pretrained("org/name", revision=MOVED, cache_dir="c", force_download=True, token=False)
    assert hub.asked == []
    assert hub.fetched == [
        {
            "repo_id": "org/name", "revision": MOVED, "cache_dir": "c", "force_download": True, "local_files_only": False, "token": False,
            "allow_patterns": list(PROBE_FILES),
        }
    ]  # fmt: skip
    assert probe.commit == MOVED
    assert probe(new_data().adapters).tobytes() == tiny_probe("cosine")(new_data().adapters).tobytes()


def test_only_the_files_of_a_probe_in_its_folder_are_fetched(hub: FakeHub) -> None:
    assert set(PROBE_FILES) == {"config.json", "head.safetensors", "head.json", "README.md"}
    for subfolder in ("a/b", "a/b/", "/a/b"):
        folder, commit = fetch_probe("org/name", subfolder=subfolder)
        assert (folder, commit) == (hub.root / SHA / "a" / "b", SHA)
        assert hub.fetched[-1]["allow_patterns"] == [f"a/b/{name}" for name in PROBE_FILES]
    assert Probe.from_pretrained("org/name", "a/b").commit == SHA


def test_adapters_are_fetched_in_the_same_way(hub: FakeHub) -> None:
    adapter = labelled_adapter(1, kind="weights")
    for folder in (hub.root / SHA, hub.root / SHA / "a" / "b"):
        make.folder(folder, adapter.state_dict(), r=2, lora_alpha=4)
    for subfolder in (None, "a/b", "/a/b/"):
        assert fetch_adapter("org/name", subfolder=subfolder) == hub.root / SHA
    assert hub.fetched[1]["allow_patterns"] == ["a/b/adapter_config.json", "a/b/adapter_model.safetensors", "a/b/adapter_model.bin"]
    assert list(load_adapter("org/name", revision=SHA, subfolder="a/b")) == list(adapter)


@pytest.mark.parametrize(
    "subfolder", ["..", "../x", "a/../..", "a//b", ".", "./a", "a/.", "/", "*", "a*", "a?", "[a]", "a\\b", "a\nb", "a b", "a\0", "C:/x", "~"]
)
def test_folders_that_leave_the_repository_or_match_others_are_refused_unasked(hub: FakeHub, subfolder: str) -> None:
    for fetch in (fetch_probe, fetch_adapter):
        with pytest.raises(HubError, match="plain folder names"):
            fetch("org/name", subfolder=subfolder)
    assert hub.asked == hub.fetched == []


@pytest.mark.parametrize("sha", [None, "", "main", "abc", "../../etc"])
def test_an_answer_that_is_no_commit_is_refused(hub: FakeHub, sha: str | None) -> None:
    hub.sha = sha
    with pytest.raises(HubError, match="40 hexadecimal digits"):
        Probe.from_pretrained("org/name")
    assert hub.fetched == []


@pytest.mark.parametrize("revision", ["main", SHA])
@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("RepositoryNotFoundError", "no such repository.*private.*token"),
        ("GatedRepoError", "gated.*[Aa]ccept"),
        ("RevisionNotFoundError", "no such revision.*commit, tag or branch"),
        ("LocalEntryNotFoundError", "not in the local cache.*online"),
        ("OfflineModeIsEnabled", "not in the local cache.*online"),
        ("RemoteEntryNotFoundError", "did not deliver"),
        ("EntryNotFoundError", "did not deliver"),
        ("HfHubHTTPError", "did not deliver.*HfHubHTTPError.*later"),
        ("HTTPError", "did not deliver"),  # a connection that fails: of httpx, and no OSError
        ("LocalTokenNotFoundError", "did not deliver"),
        ("HFValidationError", "knows no such name.*id"),
    ],
)
def test_every_error_of_the_library_becomes_a_hub_error_with_advice(hub: FakeHub, error: str, advice: str, revision: str) -> None:
    kind = getattr(hub_errors, error)
    hub.error = kind.__new__(kind)  # some cannot be made without a response; all of them can be without a message
    for message in ((), ("the reason\nand a page of HTML",)):
        hub.error.args = message
        with pytest.raises(HubError, match=rf"^org/name@{revision}: .*{advice}") as caught:
            Probe.from_pretrained("org/name", revision=revision)
        assert "HTML" not in str(caught.value)
        assert caught.value.__cause__ is hub.error


@pytest.mark.parametrize("error", [TimeoutError("slow"), ConnectionResetError(), PermissionError(13, "denied")])
def test_errors_of_the_system_too(hub: FakeHub, error: OSError) -> None:
    hub.error = error
    with pytest.raises(HubError, match=re.escape(type(error).__name__)):
        Probe.from_pretrained("org/name")


def test_a_repository_without_a_probe_is_refused(hub: FakeHub) -> None:
    with pytest.raises(HubError, match=r"has none of c/config\.json"):
        Probe.from_pretrained("org/name", subfolder="c")
    (hub.root / SHA / "config.json").unlink()
    with pytest.raises(ProbeFormatError, match=r"no config\.json"):
        Probe.from_pretrained("org/name")


def test_what_comes_from_the_hub_is_checked_as_any_folder(hub: FakeHub) -> None:
    head = hub.root / SHA / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"\x7f")  # a download that checks nothing but its size
    with pytest.raises(ProbeFormatError, match="sha256"):
        Probe.from_pretrained("org/name")


@pytest.mark.parametrize("text", ["org/name", "o/n", "Org-1/na.me_2", "1/2"])
def test_repository_ids(text: str) -> None:
    assert looks_like_repo_id(text)


@pytest.mark.parametrize(
    "text",
    ["name", "a/b/c", "/a/b", "./a/b", "../a", "a/..", "a/b..c", "a/", "/a", "a\\b", "a /b", "a/b\n", "", "~/a", "-a/b", "a/.b", "a/" + "b" * 97],
)
def test_other_texts_are_paths(hub: FakeHub, text: str) -> None:
    assert not looks_like_repo_id(text)
    with pytest.raises(ProbeFormatError):
        Probe.from_pretrained(text)
    assert hub.asked == hub.fetched == []


def test_a_local_folder_wins_over_a_repository_of_that_name(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_probe("linear").save_pretrained(tmp_path / "org" / "name")
    assert Probe.from_pretrained("org/name").commit is None
    assert hub.asked == hub.fetched == []
    with pytest.raises(ProbeFormatError, match="revision"):  # rather than an unpinned folder for a pinned repository
        Probe.from_pretrained("org/name", revision=SHA)


def test_local_files_only_reads_the_cache_of_the_library_itself(tmp_path: Path) -> None:
    """No stand-in here: the library's own code finds the snapshot, with the network blocked."""
    repository = tmp_path / "models--org--name"
    tiny_probe("linear").save_pretrained(repository / "snapshots" / SHA)
    for revision in (SHA, "main", None):
        cached = {"revision": revision, "cache_dir": tmp_path, "local_files_only": True}
        if revision != SHA:
            with pytest.raises(HubError, match="not in the local cache"):  # a name that was never resolved here
                Probe.from_pretrained("org/name", **cached)
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / "main").write_text(SHA)
        probe = Probe.from_pretrained("org/name", **cached)
        assert probe.commit == SHA
        assert probe(new_data().adapters).tobytes() == tiny_probe("linear")(new_data().adapters).tobytes()
        (repository / "refs" / "main").unlink(missing_ok=True)
    with pytest.raises(HubError, match="not in the local cache"):
        Probe.from_pretrained("org/name", revision=MOVED, cache_dir=tmp_path, local_files_only=True)


def test_local_files_only_asks_nothing(hub: FakeHub) -> None:
    assert Probe.from_pretrained("org/name", revision="main", local_files_only=True, cache_dir="c").commit == SHA
    assert hub.asked == []
    assert (hub.fetched[0]["revision"], hub.fetched[0]["local_files_only"]) == ("main", True)
