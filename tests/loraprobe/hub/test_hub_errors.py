"""What the Hub does not give, and the library's errors: every failure has a name and an advice."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors as hub_errors_of_library

from loraprobe import Probe, load_adapter
from loraprobe.errors import HubError, ProbeFormatError
from loraprobe.hub.hub import fetch_adapter, fetch_probe, push_probe
from loraprobe.hub.names import looks_like_repo_id
from tests.helpers.hub import REPO, Hub
from tests.helpers.hub_probes import NEWER, SHA, filled
from tests.helpers.probes import tiny_probe


@pytest.fixture
def hub(hub: Hub) -> Hub:
    return filled(hub)


# --- what cannot be had


@pytest.mark.parametrize(
    "subfolder",
    [
        *".. ../x a/../.. a//b . ./a a/. / * a* a? [a]".split(),
        "a\\b",
        "a\nb",
        "a b",
        "a\0",
        "C:/x",
        "~",
    ],
)
def test_folders_that_leave_the_repository_or_match_others_are_refused_unasked(
    hub: Hub, subfolder: str
) -> None:
    for fetch in (
        fetch_probe,
        fetch_adapter,
        lambda repo, subfolder: push_probe(tiny_probe(), repo, subfolder=subfolder),
    ):
        with pytest.raises(HubError, match="plain folder names"):
            fetch(REPO, subfolder=subfolder)
    assert hub.asked == hub.fetched == []


@pytest.mark.parametrize("sha", [None, "main", "abc", "../../etc", SHA.upper()])
def test_an_answer_that_is_no_commit_is_refused(hub: Hub, sha: str | None) -> None:
    hub.faults.add("commit", route="info", value=sha)
    with pytest.raises(HubError, match="40 hexadecimal digits"):
        Probe.from_pretrained(REPO)
    assert hub.fetched == []


def test_an_answer_about_another_commit_is_refused(hub: Hub) -> None:
    hub.faults.add("commit", route="info", value=NEWER)
    with pytest.raises(HubError, match=f"answered for the commit {NEWER}"):
        Probe.from_pretrained(REPO, revision=SHA)
    assert hub.fetched == []


def test_a_repository_without_what_is_asked_for_says_where_there_is_some(hub: Hub) -> None:
    with pytest.raises(
        HubError, match=r"has none of c/config\.json\. There is one in a/b: pass it as subfolder"
    ):
        Probe.from_pretrained(REPO, subfolder="c")
    with pytest.raises(HubError, match=r"has none of adapter_config\.json\.$"):
        fetch_adapter(REPO)
    (hub.at(NEWER) / "adapter_config.json").write_text("{}")
    with pytest.raises(HubError, match=r"has none of adapter_model\.safetensors\.$"):
        fetch_adapter(REPO)
    (hub.at(NEWER) / "head.safetensors").unlink()
    with pytest.raises(HubError, match=r"has none of head\.safetensors"):
        Probe.from_pretrained(REPO)


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{}",
        '{"head": 3}',
        '{"head": {"kind": []}}',
        '{"head": {"kind": "pickle"}}',
        '{"model_type": "llama"}',
        "x",
    ],
)
def test_a_config_of_something_else_is_no_probe(hub: Hub, config: str) -> None:
    (hub.at(NEWER) / "config.json").write_text(config)
    with pytest.raises(ProbeFormatError):
        Probe.from_pretrained(REPO)
    assert hub.fetched == ["config.json"]


def test_that_no_local_folder_has_the_name_is_said_too(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.error = ConnectionError("no network")
    with pytest.raises(HubError, match=r"no network.*no local file or folder 'org/name' either"):
        Probe.from_pretrained(REPO)
    with pytest.raises(HubError, match=r"no network.*no local file or folder 'org/name' either"):
        load_adapter(REPO)


@pytest.mark.parametrize("text", ["org/name", "o/n", "Org-1/na.me_2", "1/2"])
def test_repository_ids(text: str) -> None:
    assert looks_like_repo_id(text)


BAD_IDS = [
    *"name a/b/c /a/b ./a/b ../a a/.. a/b..c a/ /a".split(),
    "a\\b",
    "a /b",
    "a/b\n",
    "",
    *"~/a -a/b a/.b a/é".split(),
]


@pytest.mark.parametrize("text", [*BAD_IDS, "a/" + "b" * 97])
def test_other_texts_are_paths_and_nothing_is_pushed_there(hub: Hub, text: str) -> None:
    assert not looks_like_repo_id(text)
    with pytest.raises(ProbeFormatError if text else HubError):  # "" is no path either
        Probe.from_pretrained(text)
    with pytest.raises(HubError, match="expected org/name"):
        tiny_probe().push_to_hub(text)
    assert hub.asked == hub.fetched == []


def test_a_local_folder_wins_over_a_repository_of_that_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_probe("linear").save_pretrained(tmp_path / "org" / "name")
    assert Probe.from_pretrained(REPO).commit is None
    assert hub.asked == hub.fetched == []
    with pytest.raises(
        HubError, match="revision"
    ):  # rather than an unpinned folder for a pinned repository
        Probe.from_pretrained(REPO, revision=SHA)


# --- the library's errors


@pytest.mark.parametrize("revision", ["main", SHA])
@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("RepositoryNotFoundError", "no such repository.*private.*token"),
        ("GatedRepoError", "gated.*[Aa]ccept"),
        ("RevisionNotFoundError", "no such revision.*commit, tag or branch"),
        ("LocalEntryNotFoundError", "not in the local cache.*online"),
        ("OfflineModeIsEnabled", "not in the local cache.*HF_HUB_OFFLINE.*online"),
        ("RemoteEntryNotFoundError", "did not deliver"),
        ("EntryNotFoundError", "did not deliver"),
        ("HfHubHTTPError", "did not deliver.*HfHubHTTPError.*HF_ENDPOINT.*later"),
        ("HTTPError", "did not deliver"),  # a connection that fails: of httpx, and no OSError
        ("LocalTokenNotFoundError", "did not deliver"),
        ("HFValidationError", "knows no such name.*id"),
        ("XetDownloadError", "did not deliver"),
    ],
)
def test_every_error_of_the_library_becomes_a_hub_error_with_advice(
    hub: Hub, error: str, advice: str, revision: str
) -> None:
    kind = getattr(hub_errors_of_library, error)
    # some cannot be made without a response; all of them can be without a message
    hub.error = kind.__new__(kind)
    hub.error.response = SimpleNamespace(status_code=0)
    for message in ((), ("the reason\nand a page of HTML",)):
        hub.error.args = message
        with pytest.raises(HubError, match=rf"^org/name@{revision}: .*{advice}") as caught:
            fetch_probe(REPO, revision=revision)
        assert "HTML" not in str(caught.value)
        assert caught.value.__cause__ is hub.error


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (400, "refused the request.*the server's words"),
        (401, "HF_TOKEN.*hf auth login"),
        (403, "role 'write'"),
        (409, "conflicts"),
        (412, "somebody else.*Push again"),
        (413, "too large"),
        (429, "too often.*Wait"),
        (500, "fault of its own.*later"),
        (503, "503.*later"),
    ],
)
def test_every_status_has_its_advice_and_the_servers_words(
    hub: Hub, status: int, advice: str
) -> None:
    kind = hub_errors_of_library.HfHubHTTPError
    hub.error = kind.__new__(kind, f"{status} Error\n<html>")
    hub.error.response, hub.error.server_message = (
        SimpleNamespace(status_code=status),
        "the server's words",
    )
    with pytest.raises(HubError, match=advice) as caught:
        fetch_probe(REPO)
    assert f"HTTP {status}" in str(caught.value)
    assert "the server's words" in str(caught.value)
    assert "html" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("slow"),
        ConnectionResetError(),
        PermissionError(13, "denied"),
        ValueError("no JSON"),
        KeyError("sha"),
    ],
)
def test_errors_of_the_system_and_answers_of_another_form_too(hub: Hub, error: Exception) -> None:
    hub.error = error
    with pytest.raises(HubError, match=re.escape(type(error).__name__)):
        Probe.from_pretrained(REPO)


def test_what_the_library_wraps_is_named_for_what_it_is(hub: Hub) -> None:
    gated = hub_errors_of_library.GatedRepoError
    hub.error = ValueError("Force download failed due to the above error.")
    hub.error.__cause__ = gated.__new__(gated)
    with pytest.raises(HubError, match="gated"):
        fetch_probe(REPO)
    hub.error = RuntimeError("Error while uploading 'head.safetensors' to the Hub.")
    hub.error.__cause__ = TimeoutError("the storage is silent")
    with pytest.raises(
        HubError, match=r"large file.*head\.safetensors.*the storage is silent.*Push again"
    ):
        fetch_probe(REPO)
    hub.error = ConnectionError("404 at http://x/api/models/org/name/xet-write-token/main")
    with pytest.raises(HubError, match="HF_HUB_DISABLE_XET=1"):
        fetch_probe(REPO)
