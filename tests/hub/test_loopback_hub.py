"""The loopback Hub agrees with the real huggingface_hub.

What is pushed comes back, and every refusal has the client's name for it.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pytest

from tests.helpers.loopback_client import Client, Raised
from tests.helpers.loopback_hub import Hub
from tests.helpers.loopback_store import File, StoreError, card_errors, changed, is_large
from tests.helpers.wire import USERS, repo_of

pytestmark = (
    pytest.mark.enable_socket
)  # on the loopback interface only: the client knows no other endpoint

LARGE = bytes(range(256)) * 16


@pytest.fixture
def hub(wire: tuple[Hub, Client]) -> Iterator[Hub]:
    yield wire[0]
    wire[0].faults.clear()
    assert wire[0].crashes == []


@pytest.fixture
def client(wire: tuple[Hub, Client]) -> Client:
    return wire[1]


@pytest.fixture
def repo(hub: Hub, client: Client, request: pytest.FixtureRequest) -> str:
    """A new repository of this test's with config.json, head.safetensors and a/b/notes.txt.

    The log starts after it.
    """
    name = repo_of(request)
    client("api", "create_repo", name)
    client(
        "commit",
        name,
        {
            "config.json": '{"version": 1}',
            "head.safetensors": LARGE.decode("latin-1"),
            "a/b/notes.txt": "notes",
        },
    )
    hub.log.clear()
    return name


def head(client: Client, repo: str, revision: str | None = None, token: str | None = None) -> str:
    sha: str = client("api", "model_info", repo, revision=revision, token=token)["sha"]
    return sha


def refused(client: Client, error: str, *operation: Any, **options: Any) -> str:
    """The message of an operation that the client has to refuse with an error of this name."""
    with pytest.raises(Raised) as caught:
        client(*operation, **options)
    assert error in caught.value.names, caught.value
    return caught.value.message


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# --- what is pushed comes back
# ----------------------------------------------------------------------------------------


def test_text_goes_in_the_commit_and_large_files_by_the_storage(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights.safetensors").write_bytes(LARGE + b"new")
    made = client("api", "upload_folder", repo_id=repo, folder_path=folder)
    assert re.fullmatch("[0-9a-f]{40}", made["oid"])
    assert [entry.method for entry in hub.log if entry.origin == "storage"] == ["PUT"]
    root = Path(client("snapshot", repo, cache_dir=tmp_path / "cache"))
    assert root.name == made["oid"] == head(client, repo)
    assert (root / "sub" / "weights.safetensors").read_bytes() == LARGE + b"new"
    assert {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".safetensors"
    } == {
        ".gitattributes": (root / ".gitattributes").read_bytes(),
        "config.json": b"{}",
        "a/b/notes.txt": b"notes",
    }


def test_the_token_goes_to_the_hub_and_never_to_the_storage(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    client("commit", repo, {"new.safetensors": "x" * 100})
    client("snapshot", repo, cache_dir=tmp_path)
    assert {(entry.origin, entry.token) for entry in hub.log} == {("hub", True), ("storage", False)}
    assert {(entry.method, entry.status) for entry in hub.log if entry.origin == "storage"} == {
        ("PUT", 200),
        ("GET", 200),
    }
    # The control: with the token, and without the signature, the storage says no.
    _, headers, _ = client(
        "request", "GET", f"{hub.url}/{repo}/resolve/main/head.safetensors", token="writes"
    )
    assert headers["Location"].startswith(hub.storage_url)
    assert client("request", "GET", headers["Location"])[0] == 200
    assert client("request", "GET", headers["Location"], token="writes")[0] == 400
    assert hub.log[-1].token
    assert client("request", "GET", headers["Location"].partition("?")[0])[0] == 403


def test_a_revision_keeps_its_bytes_and_its_etags(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    old = head(client, repo)
    client("commit", repo, {"config.json": '{"version": 2}', "head.safetensors": "other"})
    for revision, config, weights in (
        (old, b'{"version": 1}', LARGE.decode("latin-1").encode()),
        ("main", b'{"version": 2}', b"other"),
    ):
        _, headers, text = client(
            "request", "GET", f"{hub.url}/{repo}/resolve/{revision}/config.json"
        )
        assert (headers["ETag"], text.encode()) == (f'"{git_blob(config)}"', config)
        assert headers["X-Repo-Commit"] == head(client, repo, revision)
        status, headers, _ = client(
            "request", "GET", f"{hub.url}/{repo}/resolve/{revision}/head.safetensors"
        )
        linked = headers["X-Linked-Etag"], headers["X-Linked-Size"]
        assert (status, *linked) == (
            302,
            f'"{hashlib.sha256(weights).hexdigest()}"',
            str(len(weights)),
        )
        assert (
            Path(
                client("download", repo, "config.json", revision=revision, cache_dir=tmp_path)
            ).read_bytes()
            == config
        )
        assert (
            Path(
                client("download", repo, "head.safetensors", revision=revision, cache_dir=tmp_path)
            ).read_bytes()
            == weights
        )


def test_what_is_told_of_files_is_gits(client: Client, repo: str) -> None:
    content = LARGE.decode("latin-1").encode()
    pointer = (
        "version https://git-lfs.github.com/spec/v1\noid"
        f" sha256:{hashlib.sha256(content).hexdigest()}\nsize {len(content)}\n".encode()
    )
    expected = {
        "config.json": (14, git_blob(b'{"version": 1}'), None),
        "head.safetensors": (len(content), git_blob(pointer), hashlib.sha256(content).hexdigest()),
    }
    siblings = {
        file["rfilename"]: file
        for file in client("api", "model_info", repo, files_metadata=True)["siblings"]
    }
    listed = {file["path"]: file for file in client("api", "list_repo_tree", repo, recursive=True)}
    asked = {
        file["path"]: file
        for file in client(
            "api", "get_paths_info", repo, ["config.json", "head.safetensors", "not there"]
        )
    }
    assert set(asked) == set(expected)
    for source in (siblings, listed, asked):
        for path, (size, blob, sha256) in expected.items():
            assert (
                source[path]["size"],
                source[path]["blob_id"],
                (source[path]["lfs"] or {}).get("sha256"),
            ) == (size, blob, sha256)


def test_an_identical_upload_makes_no_commit(hub: Hub, client: Client, repo: str) -> None:
    same = {"config.json": '{"version": 1}', "head.safetensors": LARGE.decode("latin-1")}
    before = head(client, repo)
    assert client("commit", repo, same)["oid"] == before
    assert client("commit", repo, {**same, "config.json": "{}"})["oid"] != before
    assert len(client("api", "list_repo_commits", repo)) == 3
    sent = [entry for entry in hub.log if entry.path.endswith("commit/main")]
    assert len(sent) == 1  # the client itself knew that there was nothing to send


def test_a_commit_on_another_parent_is_refused(client: Client, repo: str) -> None:
    old = head(client, repo)
    client("commit", repo, {"config.json": "{}"}, parent_commit=old)
    assert "412" in refused(
        client, "HfHubHTTPError", "commit", repo, {"config.json": "[]"}, parent_commit=old
    )
    assert len(client("api", "list_repo_commits", repo)) == 3


def test_deleted_files_and_folders_are_gone_and_stay_in_the_past(client: Client, repo: str) -> None:
    old = head(client, repo)
    client("commit", repo, {"config.json": None, "a/": None, "new.txt": "new"})
    assert client("api", "list_repo_files", repo) == [
        ".gitattributes",
        "head.safetensors",
        "new.txt",
    ]
    assert client("api", "list_repo_files", repo, revision=old) == [
        ".gitattributes",
        "a/b/notes.txt",
        "config.json",
        "head.safetensors",
    ]
    refused(client, "EntryNotFoundError", "commit", repo, {"config.json": None})


def test_branches_tags_and_pull_requests_have_their_own_heads(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    first = head(client, repo)
    client("api", "create_branch", repo, branch="feature/x")
    client("api", "create_tag", repo, tag="v1")
    on_branch = client("commit", repo, {"config.json": "branch"}, revision="feature/x")["oid"]
    in_request = client("commit", repo, {"config.json": "request"}, create_pr=True)
    again = client("commit", repo, {"config.json": "request, again"}, revision="refs/pr/1")["oid"]
    assert in_request["pr_revision"] == "refs/pr/1"
    assert len({first, on_branch, in_request["oid"], again}) == 4
    refs = client("api", "list_repo_refs", repo, include_pull_requests=True)
    named = {ref["ref"]: ref["target_commit"] for kind in refs.values() for ref in kind}
    assert named == {
        "refs/heads/main": first,
        "refs/heads/feature/x": on_branch,
        "refs/tags/v1": first,
        "refs/pr/1": again,
    }
    for revision, text in (
        ("main", '{"version": 1}'),
        ("v1", '{"version": 1}'),
        ("feature/x", "branch"),
        ("refs/pr/1", "request, again"),
    ):
        assert (
            Path(
                client("download", repo, "config.json", revision=revision, cache_dir=tmp_path)
            ).read_text()
            == text
        )
    assert [
        commit["commit_id"]
        for commit in client("api", "list_repo_commits", repo, revision="refs/pr/1")[:3]
    ] == [again, in_request["oid"], first]
    assert head(client, repo, first[:9]) == first
    client("api", "delete_tag", repo, tag="v1")
    refused(client, "RevisionNotFoundError", "api", "model_info", repo, revision="v1")
    assert "409" in refused(
        client, "HfHubHTTPError", "api", "create_branch", repo, branch="feature/x"
    )
    for name in ("refs/pr/5", "0" * 40):
        assert "Invalid reference" in refused(
            client, "BadRequestError", "api", "create_branch", repo, branch=name
        )


def test_a_long_tree_comes_in_pages_that_the_client_follows(
    hub: Hub, client: Client, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "page_size", 2)
    paths = [entry["path"] for entry in client("api", "list_repo_tree", repo, recursive=True)]
    assert paths == [
        ".gitattributes",
        "a",
        "a/b",
        "a/b/notes.txt",
        "config.json",
        "head.safetensors",
    ]
    assert sum("/tree/" in entry.path for entry in hub.log) == 3
    assert [entry["path"] for entry in client("api", "list_repo_tree", repo)] == [
        ".gitattributes",
        "a",
        "config.json",
        "head.safetensors",
    ]
    assert [entry["path"] for entry in client("api", "list_repo_tree", repo, "a/b")] == [
        "a/b/notes.txt"
    ]
    refused(client, "EntryNotFoundError", "api", "list_repo_tree", repo, "not/there")


def test_datasets_are_other_repositories(client: Client, repo: str, tmp_path: Path) -> None:
    refused(client, "RepositoryNotFoundError", "api", "dataset_info", repo)
    client("api", "create_repo", repo, repo_type="dataset")
    made = client("commit", repo, {"rows.csv": "a,b", "rows.npz": "large"}, repo_type="dataset")
    root = Path(client("snapshot", repo, repo_type="dataset", cache_dir=tmp_path))
    assert (root.name, (root / "rows.csv").read_text(), (root / "rows.npz").read_text()) == (
        made["oid"],
        "a,b",
        "large",
    )
    client("api", "delete_repo", repo, repo_type="dataset")
    refused(client, "RepositoryNotFoundError", "api", "dataset_info", repo)
    assert head(client, repo)


def test_a_hub_that_takes_everything_as_text_needs_no_switch_in_the_client(tmp_path: Path) -> None:
    """With Xet on, as it is by default, a folder goes another way.

    A pull request is opened first, and then filled.
    """
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "head.safetensors").write_bytes(LARGE)
    with (
        Hub(tmp_path / "hub", USERS, all_regular=True) as hub,
        Client(hub.url, tmp_path / "home", HF_TOKEN="writes", HF_HUB_DISABLE_XET="0") as client,
    ):
        client("api", "create_repo", "org/name")
        first = client("api", "upload_folder", repo_id="org/name", folder_path=folder)["oid"]
        assert (
            client("api", "upload_folder", repo_id="org/name", folder_path=folder)["oid"] == first
        )
        (folder / "head.safetensors").write_bytes(LARGE[::-1])
        asked = client(
            "api", "upload_folder", repo_id="org/name", folder_path=folder, create_pr=True
        )
        assert (
            asked["pr_revision"],
            head(client, "org/name", "refs/pr/1"),
            head(client, "org/name"),
        ) == ("refs/pr/1", asked["oid"], first)
        for revision, data in (("main", LARGE), ("refs/pr/1", LARGE[::-1])):
            assert (
                Path(
                    client("download", "org/name", "head.safetensors", revision=revision)
                ).read_bytes()
                == data
            )
    assert {entry.origin for entry in hub.log} == {"hub"}
    assert hub.crashes == []


# --- who may do what
# --------------------------------------------------------------------------------------------------


def test_tokens_have_roles(hub: Hub, client: Client, repo: str) -> None:
    assert [
        client("api", "whoami", token=token)["name"] for token in ("writes", "reads", "stranger")
    ] == ["org", "org", "somebody"]
    assert client("api", "whoami", token="reads")["auth"]["accessToken"]["role"] == "read"
    assert "Invalid user token" in refused(client, "HfHubHTTPError", "api", "whoami", token="wrong")
    for token, reason in (
        ("reads", "write token"),
        ("stranger", "rights"),
        ("wrong", "Invalid credentials"),
    ):
        assert reason in refused(
            client, "HfHubHTTPError", "commit", repo, {"config.json": "[]"}, token=token
        )
        assert reason in refused(
            client, "HfHubHTTPError", "api", "create_repo", f"{repo}-2", token=token
        )
        assert reason in refused(client, "HfHubHTTPError", "api", "delete_repo", repo, token=token)
    assert "Invalid username" in refused(
        client, "HfHubHTTPError", "api", "create_repo", f"{repo}-2", token=False
    )
    assert client("api", "list_repo_files", repo, token=False)
    assert len(client("api", "list_repo_commits", repo)) == 2


def test_a_private_repository_is_not_there_for_others(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    name = f"{repo}-private"
    client("api", "create_repo", name, private=True)
    client("commit", name, {"head.safetensors": "secret"})
    for token in (False, "stranger"):
        refused(client, "RepositoryNotFoundError", "api", "model_info", name, token=token)
        refused(
            client,
            "RepositoryNotFoundError",
            "download",
            name,
            "head.safetensors",
            token=token,
            cache_dir=tmp_path,
        )
        refused(
            client, "RepositoryNotFoundError", "api", "model_info", f"{repo}-not-there", token=token
        )
    assert (
        Path(
            client("download", name, "head.safetensors", token="reads", cache_dir=tmp_path)
        ).read_text()
        == "secret"
    )
    assert client("api", "model_info", name)["private"]
    assert "409" in refused(client, "HfHubHTTPError", "api", "create_repo", name)
    client("api", "create_repo", name, exist_ok=True)
    client("api", "update_repo_settings", name, private=False)
    assert head(client, name, token="stranger")


def test_a_gated_repository_shows_its_tree_and_keeps_its_files(
    client: Client, repo: str, tmp_path: Path
) -> None:
    client("api", "update_repo_settings", repo, gated="auto")
    for token in (False, "stranger"):
        assert "config.json" in client("api", "list_repo_files", repo, token=token)
        refused(
            client,
            "GatedRepoError",
            "download",
            repo,
            "config.json",
            token=token,
            cache_dir=tmp_path,
        )
        refused(client, "GatedRepoError", "api", "auth_check", repo, token=token)
    client("api", "grant_access", repo, "somebody")
    assert client("download", repo, "config.json", token="stranger", cache_dir=tmp_path)
    refused(client, "HfHubHTTPError", "api", "auth_check", repo, token="stranger", write=True)
    client("api", "auth_check", repo, write=True)


def test_what_is_not_there_has_a_name(client: Client, repo: str, tmp_path: Path) -> None:
    refused(client, "RevisionNotFoundError", "api", "model_info", repo, revision="v9")
    refused(
        client, "RevisionNotFoundError", "snapshot", repo, revision="0" * 40, cache_dir=tmp_path
    )
    refused(client, "RevisionNotFoundError", "commit", repo, {"x": "y"}, revision="no-branch")
    refused(client, "RemoteEntryNotFoundError", "download", repo, "none.json", cache_dir=tmp_path)
    assert list(tmp_path.glob("models--*/.no_exist/*/none.json"))  # the answer named the commit
    assert "404" in refused(client, "HfHubHTTPError", "api", "get_discussion_details", repo, 1)


CARD = {
    "license": "apache-2.0",
    "base_model": "org/base",
    "datasets": ["org/data"],
    "tags": ["lora"],
}
RESULT = {
    "task": {"type": "t"},
    "dataset": {"type": "d", "name": "n"},
    "metrics": [{"type": "m", "value": 0.5}],
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"model-index": [{"name": "x", "results": [RESULT]}]}, None),
        ({"license": "my own"}, "license"),
        ({"base_model": "/home/me/base"}, "base_model"),
        ({"base_model": ["org/base", "./base"]}, "base_model"),
        ({"datasets": ["a b"]}, "datasets"),
        ({"tags": [1]}, "tags"),
        ({"model-index": [{"results": [RESULT]}]}, "model-index"),
        (
            {"model-index": [{"name": "x", "results": [{**RESULT, "metrics": [{"type": "m"}]}]}]},
            "model-index",
        ),
        (
            {"model-index": [{"name": "x", "results": [{**RESULT, "dataset": {"type": "d"}}]}]},
            "model-index",
        ),
    ],
)
def test_a_card_is_checked_as_on_the_hub(change: dict[str, Any], reason: str | None) -> None:
    errors = card_errors(f"---\n{json.dumps({**CARD, **change})}\n---\n# Title\n")  # JSON is YAML
    assert (reason is None and not errors) or (len(errors) == 1 and str(reason) in errors[0])


def test_a_card_that_breaks_the_rules_is_not_committed(hub: Hub, client: Client, repo: str) -> None:
    message = refused(
        client, "ValueError", "commit", repo, {"README.md": "---\nlicense: my own\n---\n# Title\n"}
    )
    assert "license" in message
    assert "YAML" in refused(
        client, "ValueError", "commit", repo, {"README.md": "---\nlicense: [\n---\n# Title\n"}
    )
    header, wrong = (
        {"key": "header", "value": {"summary": "s"}},
        {"path": "README.md", "content": "LS0tCmxpY2Vuc2U6IHgKLS0tCg=="},
    )
    for file, status in (
        (wrong, 400),
        ({**wrong, "content": "IyBUaXRsZQo="}, 200),
    ):  # not by that client, which asks before
        lines = [json.dumps(header), json.dumps({"key": "file", "value": file})]
        assert (
            client(
                "request",
                "POST",
                f"{hub.url}/api/models/{repo}/commit/main",
                "\n".join(lines),
                "writes",
            )[0]
            == status
        )
    client("commit", repo, {"README.md": "---\nlicense: mit\n---\n# Title\n"})
    assert "README.md" in client("api", "list_repo_files", repo)


FILE = File("0" * 64, 1, "1" * 40, lfs=False)


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/x",
        "a/../x",
        "./x",
        "a//b",
        ".git/config",
        "a/.git/x",
        "",
        "a/",
        "x\ny",
        "a/b/c",
        "a",
    ],
)
def test_a_path_that_leaves_the_tree_or_collides_in_it_is_refused(path: str) -> None:
    with pytest.raises(StoreError):
        changed({"a/b": FILE}, {path: FILE})
    assert set(changed({"a/b": FILE}, {"a/c": FILE})) == {"a/b", "a/c"}
    assert set(changed({"a/b": FILE}, {"a/": None, "a": FILE})) == {"a"}


def test_large_is_what_the_hub_calls_large() -> None:
    assert is_large("head.safetensors", 5, b"text")
    assert is_large("data.txt", (10 << 20) + 1, b"text")
    assert is_large("data.txt", 5, b"te\0xt")
    assert not is_large("config.json", 10 << 20, b"{}")


# --- what can be made to go wrong
# -------------------------------------------------------------------------------------


def test_a_part_of_a_file_is_given_on_demand(hub: Hub, client: Client, repo: str) -> None:
    url = f"{hub.url}/{repo}/resolve/main/config.json"
    text = '{"version": 1}'
    for wanted, start, end in (
        ("bytes=2-4", 2, 5),
        ("bytes=10-", 10, 14),
        ("bytes=-3", 11, 14),
        ("bytes=5-999", 5, 14),
    ):
        status, headers, got = client("request", "GET", url, Range=wanted)
        assert (status, got, headers["Content-Range"]) == (
            206,
            text[start:end],
            f"bytes {start}-{end - 1}/14",
        )
    assert client("request", "GET", url, Range="bytes=14-")[0] == 416
    assert client("request", "GET", url)[::2] == [200, text]


def test_a_flipped_bit_goes_unnoticed_by_the_client(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    """Which is why loraprobe checks what it downloads."""
    hub.faults.add("flip", "head.safetensors", value=7)
    hub.faults.add("flip", "config.json")
    right = LARGE.decode("latin-1").encode()
    got = Path(client("download", repo, "head.safetensors", cache_dir=tmp_path)).read_bytes()
    assert [place for place, (a, b) in enumerate(zip(got, right, strict=True)) if a != b] == [7]
    assert (
        Path(client("download", repo, "config.json", cache_dir=tmp_path)).read_text()
        != '{"version": 1}'
    )


@pytest.mark.parametrize("kind", ["die", "stall"])
def test_a_transfer_that_breaks_off_is_taken_up_where_it_was(
    hub: Hub, client: Client, repo: str, tmp_path: Path, kind: str
) -> None:
    hub.faults.add(kind, "head.safetensors", value=2500, times=1)
    got = Path(
        client("download", repo, "head.safetensors", cache_dir=tmp_path, chunk=1000)
    ).read_bytes()
    assert got == LARGE.decode("latin-1").encode()
    gets = [(entry.range, entry.status) for entry in hub.log if entry.origin == "storage"]
    assert gets == [(None, 0), ("bytes=2000-", 206)]


@pytest.mark.parametrize("path", ["config.json", "head.safetensors"])
def test_a_file_that_is_longer_than_it_was_announced_is_refused_by_the_client(
    hub: Hub, client: Client, repo: str, tmp_path: Path, path: str
) -> None:
    hub.faults.add("longer", path, value=1000)
    assert "Consistency check failed" in refused(
        client, "OSError", "download", repo, path, cache_dir=tmp_path
    )


def test_other_answers_than_the_right_one(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    hub.faults.add("missing", "config.json", times=1)
    refused(client, "RemoteEntryNotFoundError", "download", repo, "config.json", cache_dir=tmp_path)
    hub.faults.add("commit", "config.json", times=1, value="f" * 40)
    assert Path(client("download", repo, "config.json", cache_dir=tmp_path)).parent.name == "f" * 40
    hub.faults.add("commit", route="info", times=1, value="e" * 40)
    assert head(client, repo) == "e" * 40
    hub.faults.add(
        "redirect",
        "a/b/notes.txt",
        method="HEAD",
        times=1,
        value=f"/{repo}/resolve/main/config.json",
    )
    path = client("download", repo, "a/b/notes.txt", cache_dir=tmp_path)
    assert Path(path).read_text() == '{"version": 1}'
    hub.faults.add("status", route="preupload", times=1, value=503)
    assert client("commit", repo, {"config.json": "{}"})["oid"]  # the client tries again
    assert [entry.status for entry in hub.log if "preupload" in entry.path] == [503, 200]
    hub.faults.add("drop", route="preupload", times=1)
    assert client("commit", repo, {"config.json": "[]"})["oid"]
    assert [entry.status for entry in hub.log if "preupload" in entry.path] == [503, 200, 0, 200]
    hub.faults.add("status", route="info", value=500)
    assert "500" in refused(client, "HfHubHTTPError", "api", "model_info", repo)


def test_an_answer_can_be_late_or_never_come(hub: Hub, client: Client, repo: str) -> None:
    hub.faults.add("hang", route="info", times=1)
    refused(client, "TimeoutException", "api", "model_info", repo, timeout=0.2)
    hub.faults.add("hang", route="info", times=1, value=0.2)
    assert client("api", "model_info", repo, timeout=20)["id"] == repo


def test_main_can_move_and_a_commit_be_rewritten(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    old = head(client, repo)
    new = client("commit", repo, {"config.json": "{}"})["oid"]
    hub.faults.add("move", route="info", value=old, times=1)
    assert (head(client, repo), head(client, repo)) == (new, old)
    hub.swap(repo, old, "config.json", b"swapped")
    assert (
        Path(client("download", repo, "config.json", revision=old, cache_dir=tmp_path)).read_text()
        == "swapped"
    )
    with pytest.raises(KeyError):
        hub.swap(repo, old, "not-there.json", b"")


# --- in a process of its own
# ------------------------------------------------------------------------------------------


@contextmanager
def started(folder: Path) -> Iterator[dict[str, str]]:
    """The server as a newcomer starts and ends it; what it says to export."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("loopback_hub.py")),
        "--folder",
        str(folder),
        "--port",
        "0",
        "--token",
        "t",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            lines = [cast("IO[str]", server.stdout).readline() for _ in range(3)]
            yield dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
        finally:
            server.send_signal(signal.SIGINT)
            assert (server.communicate(timeout=20)[0], server.returncode) == ("stopped\n", 0)


def test_a_newcomer_starts_it_by_hand_and_finds_everything_again_after_a_restart(
    tmp_path: Path,
) -> None:
    with started(tmp_path / "hub") as exports:
        assert set(exports) == {"HF_ENDPOINT", "HF_TOKEN", "HF_HUB_DISABLE_XET"}
        with Client(exports.pop("HF_ENDPOINT"), tmp_path / "home", **exports) as client:
            client("api", "create_repo", "any/name", private=True)
            first = client(
                "commit", "any/name", {"config.json": "{}", "head.safetensors": "large"}
            )["oid"]
    with (
        started(tmp_path / "hub") as exports,
        Client(exports.pop("HF_ENDPOINT"), tmp_path / "home", **exports) as client,
    ):
        root = Path(client("snapshot", "any/name", cache_dir=tmp_path / "cache"))
        assert (root.name, (root / "head.safetensors").read_text()) == (first, "large")
        assert client("api", "model_info", "any/name")["private"]


def test_faults_and_the_log_can_be_had_from_another_process(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    def ask(method: str, route: str, body: Any = None) -> Any:
        status, _, text = client("request", method, f"{hub.url}/{route}", body)
        return json.loads(text) if status == 200 else status

    assert ask("POST", "__faults__", {"kind": "missing", "path": "config.json", "times": 1})
    refused(
        client,
        "RemoteEntryNotFoundError",
        "download",
        repo,
        "config.json",
        cache_dir=tmp_path / "cache",
    )
    assert ask("GET", "__faults__")[0]["times"] == 0
    assert ask("DELETE", "__faults__") == hub.faults.to_json() == []
    assert ask("POST", "__faults__", {"kind": "explode"}) == 400
    assert ask("POST", "__faults__", {"kind": "flip", "wrong": 1}) == 400
    swap = {"repo": repo, "commit": head(client, repo), "path": "config.json", "content": "W10="}
    assert ask("POST", "__swap__", swap) == {}
    assert ask("POST", "__swap__", {**swap, "path": "none"}) == 404
    assert (
        Path(client("download", repo, "config.json", cache_dir=tmp_path / "other")).read_text()
        == "[]"
    )
    paths = {entry["path"] for entry in ask("DELETE", "__log__")}
    assert f"/{repo}/resolve/main/config.json" in paths
    assert not any(path.startswith("/__") for path in paths)
    assert ask("GET", "__log__") == []
