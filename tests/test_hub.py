"""Fetching from the Hub: one commit is pinned, little is asked for, every byte is compared with its hash, and every failure has a name.

No network here (`fake_hub`); the same against a server is in test_hub_wire.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import make
import pytest
import torch
from fake_hub import REPO, FakeHub, digest, flipped
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors_of_library
from probes import labelled_adapter, new_data, tiny_probe

from loraprobe import Probe, factor_delta, load_adapter
from loraprobe import hub as hub_module
from loraprobe.errors import HubError, ProbeFormatError
from loraprobe.format import MAX_CONFIG_BYTES, MAX_HEAD_BYTES
from loraprobe.hub import fetch_adapter, fetch_probe, looks_like_repo_id, probe_names, pull_probe, push_probe
from loraprobe.hub_snapshot import Place, Snapshot, has_digest
from loraprobe.peft_io import MAX_CONFIG_BYTES as MAX_ADAPTER_CONFIG_BYTES
from loraprobe.peft_io import MAX_WEIGHT_BYTES

SHA = "0123456789abcdef0123456789abcdef01234567"
NEWER = "f" * 40
HEAD = "head.safetensors"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Two commits, each with a probe at the root and one in the folder a/b: linear and mlp, then xgboost and cosine."""
    hub = FakeHub(tmp_path, monkeypatch)
    for commit, heads in ((SHA, ("linear", "mlp")), (NEWER, ("xgboost", "cosine"))):
        folder = hub.commit(commit)
        tiny_probe(heads[0]).save_pretrained(folder)
        tiny_probe(heads[1]).save_pretrained(folder / "a" / "b")
        (folder / "scores.png").write_bytes(b"a picture")
    hub.refs["v1"] = SHA
    return hub


@pytest.fixture
def adapters(hub: FakeHub) -> FakeHub:
    """The same Hub, with an adapter at the root of the older commit, and beside it the .bin that must not be read."""
    folder = hub.root / SHA
    make.folder(folder, labelled_adapter(1, kind="weights").state_dict(), r=2, lora_alpha=4)
    (folder / "adapter_model.bin").write_bytes(b"not the one that is read")
    return hub


def scores(probe: Probe) -> bytes:
    return probe(new_data().adapters).tobytes()


def head_of(probe: Probe) -> str:
    """Which of the fixture's four probes it is."""
    [head] = [head for head in ("linear", "mlp", "xgboost", "cosine") if scores(tiny_probe(head)) == scores(probe)]
    return head


def norms(adapter: Any) -> list[float]:
    return [pair.norm() for pair in adapter.values()]


# --- one commit, and no more than is needed ---------------------------------------------------------------------------


@pytest.mark.parametrize(("revision", "commit"), [(None, NEWER), ("main", NEWER), ("v1", SHA)])
def test_a_name_that_moves_is_resolved_once_by_one_question(hub: FakeHub, revision: str | None, commit: str) -> None:
    probe = Probe.from_pretrained(REPO, revision=revision, token="t")
    assert hub.asked == [(revision, "t")]
    assert {fetched for fetched, _, _ in hub.fetched} == {commit}
    assert (probe.commit, head_of(probe)) == (commit, "xgboost" if commit == NEWER else "linear")


@pytest.mark.parametrize("revision", [SHA[:12], SHA.upper(), "refs/pr/1", SHA + "0"])
def test_what_is_not_a_full_commit_is_asked_for(hub: FakeHub, revision: str) -> None:
    hub.refs[revision] = SHA
    assert Probe.from_pretrained(REPO, revision=revision).commit == SHA
    assert hub.asked == [(revision, None)]


def test_only_the_config_and_the_head_that_it_names_are_fetched(hub: FakeHub) -> None:
    (hub.root / NEWER / HEAD).write_bytes(b"left by an earlier probe")
    for subfolder, head in ((None, "xgboost"), ("a/b", "cosine"), ("a/b/", "cosine"), ("/a/b", "cosine")):
        hub.clear()
        assert head_of(Probe.from_pretrained(REPO, subfolder)) == head
        prefix = "a/b/" if subfolder else ""
        assert [name for _, name, _ in hub.fetched] in ([prefix + "config.json", prefix + ("head.json" if head == "xgboost" else HEAD)], [])
    folder, commit = fetch_probe(REPO, subfolder="a/b")
    assert (folder.name, commit) == ("b", NEWER)
    assert {path.name for path in folder.iterdir()} == {"config.json", HEAD}


def test_a_pinned_commit_in_the_cache_asks_nothing(hub: FakeHub) -> None:
    for revision, questions in ((SHA, 1), (SHA, 0), ("v1", 1)):
        hub.clear()
        assert head_of(Probe.from_pretrained(REPO, revision=revision)) == "linear"
        assert (len(hub.asked), len(hub.fetched)) == (questions, 2 if revision == SHA and questions else 0)
    hub.clear()
    hub.error = ConnectionError("no network")
    assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
    assert hub.asked == hub.fetched == []


def test_another_cache_and_force_download_fetch_again(hub: FakeHub, tmp_path: Path) -> None:
    Probe.from_pretrained(REPO, revision=SHA)
    for options in ({"cache_dir": tmp_path / "other"}, {"force_download": True}):
        hub.clear()
        assert head_of(Probe.from_pretrained(REPO, revision=SHA, **options)) == "linear"
        assert [(name, forced) for _, name, forced in hub.fetched] == [(name, "force_download" in options) for name in ("config.json", HEAD)]
    assert hub.pointer(SHA, HEAD, tmp_path / "other").is_file()


def test_of_an_adapter_the_safetensors_file_alone_is_fetched(adapters: FakeHub) -> None:
    folder, commit = fetch_adapter(REPO, revision="v1")
    assert [name for _, name, _ in adapters.fetched] == ["adapter_config.json", WEIGHTS]
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", WEIGHTS}
    adapters.clear()
    loaded = load_adapter(REPO, commit)
    assert norms(loaded) == norms(labelled_adapter(1, kind="weights"))
    assert adapters.asked == adapters.fetched == []


def test_an_adapter_with_a_bin_only_is_fetched_and_then_cached(adapters: FakeHub) -> None:
    torch.save(labelled_adapter(1, kind="weights").state_dict(), adapters.root / SHA / "adapter_model.bin")
    (adapters.root / SHA / WEIGHTS).unlink()
    for questions in (1, 0):
        adapters.clear()
        assert norms(load_adapter(REPO, SHA)) == norms(labelled_adapter(1, kind="weights"))
        assert len(adapters.asked) == questions


def test_an_adapter_knows_its_commit_and_a_delta_has_none(adapters: FakeHub, tmp_path: Path) -> None:
    loaded = load_adapter(REPO, "v1")
    assert loaded.commit == loaded.load().commit == SHA
    assert factor_delta(loaded, loaded).commit is None
    assert load_adapter(adapters.root / SHA).commit is None


def test_an_adapter_takes_the_options_of_a_probe(adapters: FakeHub, tmp_path: Path) -> None:
    cache = tmp_path / "other"
    with pytest.raises(HubError, match="not in the local cache"):
        load_adapter(REPO, SHA, cache_dir=cache, local_files_only=True)
    load_adapter(REPO, SHA, cache_dir=cache, token="t")
    assert adapters.asked == [(SHA, "t")]
    adapters.clear()
    load_adapter(REPO, SHA, cache_dir=cache, force_download=True)
    assert [forced for _, _, forced in adapters.fetched] == [True, True]
    adapters.clear()
    assert load_adapter(REPO, SHA, cache_dir=cache, local_files_only=True).commit == SHA
    assert adapters.asked == adapters.fetched == []


def test_an_adapter_is_read_lazily_from_the_cache(adapters: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", None)
    loaded = load_adapter(REPO, "v1")
    first, second = list(loaded)[:2]
    blob = adapters.pointer(SHA, WEIGHTS).resolve()
    loaded[first].A.clone()
    assert list(loaded) == list(labelled_adapter(1, kind="weights"))
    assert blob.stat().st_size > 0
    assert loaded._pairs._made[second] is None  # nothing of the others has been looked at


# --- too large ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit", "load"),
    [
        ("config.json", MAX_CONFIG_BYTES, Probe.from_pretrained),
        (HEAD, MAX_HEAD_BYTES, Probe.from_pretrained),
        ("adapter_config.json", MAX_ADAPTER_CONFIG_BYTES, load_adapter),
        (WEIGHTS, MAX_WEIGHT_BYTES, load_adapter),
    ],
)
def test_a_file_that_is_too_large_is_refused_before_it_is_downloaded(adapters: FakeHub, name: str, limit: int, load: Callable[..., Any]) -> None:
    oid = digest(name, (adapters.root / SHA / name).read_bytes())
    adapters.listed[name] = (limit + 1, oid)
    with pytest.raises(HubError, match=rf"{name} has {limit + 1} bytes; expected at most {limit}"):
        load(REPO, revision=SHA)
    assert name not in [fetched for _, fetched, _ in adapters.fetched]
    adapters.listed[name] = (limit, oid)  # one byte less is downloaded, and is then not what was listed
    with pytest.raises(HubError, match="not what the Hub lists"):
        load(REPO, revision=SHA)


def test_what_is_too_large_in_the_cache_is_not_even_hashed(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot(Place(REPO, SHA))
    snapshot.fetch(HEAD, MAX_HEAD_BYTES)
    monkeypatch.setattr("loraprobe.hub_snapshot.has_digest", None)
    with pytest.raises(HubError, match="expected at most 10"):
        Snapshot(Place(REPO, SHA)).fetch(HEAD, 10)


# --- damage ------------------------------------------------------------------------------------------------------------


def test_digests_are_those_of_sha256_and_of_git(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data, git, sha in (
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a", "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"),
    ):
        path.write_bytes(data)
        assert has_digest(path, git)
        assert has_digest(path, sha)
        assert not has_digest(path, git[:-1] + "0")
        assert not has_digest(path, sha[:-1] + "0")


FILES = [("config.json", Probe.from_pretrained), (HEAD, Probe.from_pretrained), ("adapter_config.json", load_adapter), (WEIGHTS, load_adapter)]


@pytest.mark.parametrize(("name", "load"), FILES)
@pytest.mark.parametrize("revision", ["v1", SHA])
def test_a_flipped_bit_in_the_cache_is_found_and_the_file_fetched_again(
    adapters: FakeHub, name: str, load: Callable[..., Any], revision: str
) -> None:
    load(REPO, revision=SHA)
    blob = adapters.pointer(SHA, name).resolve()
    good = blob.read_bytes()
    for place in (0, len(good) // 2, -1):
        adapters.clear()
        blob.write_bytes(flipped(good, place))
        assert load(REPO, revision=revision).commit == SHA
        assert adapters.fetched == [(SHA, name, True)]
        assert blob.read_bytes() == good
    for size in (len(good) - 1, 0):
        blob.write_bytes(good[:size])
        load(REPO, revision=revision)
        assert blob.read_bytes() == good


@pytest.mark.parametrize(("name", "load"), FILES)
def test_a_flipped_bit_is_found_offline_and_the_file_removed(adapters: FakeHub, name: str, load: Callable[..., Any]) -> None:
    load(REPO, revision=SHA)
    pointer = adapters.pointer(SHA, name)
    blob = pointer.resolve()
    blob.write_bytes(flipped(blob.read_bytes()))
    adapters.clear()
    for state in ("was damaged in the local cache and has been removed", "is not in the local cache"):
        with pytest.raises(HubError, match=rf"{name}.* {state}.*online"):
            load(REPO, revision=SHA, local_files_only=True)
        assert not pointer.is_symlink()
        assert not blob.exists()
    assert adapters.asked == adapters.fetched == []
    load(REPO, revision=SHA)


@pytest.mark.parametrize(("times", "downloads"), [(1, 2), (2, 2), (9, 2)])
@pytest.mark.parametrize(("name", "load"), FILES)
def test_damage_on_the_way_is_tried_once_more_and_never_kept(
    adapters: FakeHub, name: str, load: Callable[..., Any], times: int, downloads: int
) -> None:
    load(REPO, revision=SHA)
    pointer = adapters.pointer(SHA, name)
    blob = pointer.resolve()
    blob.unlink()
    pointer.unlink()
    adapters.clear()
    adapters.damage = times
    if times == 1:
        assert load(REPO, revision=SHA).commit == SHA
    else:
        with pytest.raises(HubError, match=rf"^org/name@{SHA}, {name}: what was downloaded is not what the Hub lists .*twice.*removed"):
            load(REPO, revision=SHA)
        assert not blob.exists()
        assert not pointer.is_symlink()
    assert [fetched for _, fetched, _ in adapters.fetched] == [name] * downloads


def test_content_that_another_commit_shares_is_checked_too(hub: FakeHub) -> None:
    """The library links what it has already, without a download: here after it was damaged."""
    third = "e" * 40
    tiny_probe("linear").save_pretrained(hub.commit(third))
    Probe.from_pretrained(REPO, revision=SHA)
    blob = hub.pointer(SHA, HEAD).resolve()
    blob.write_bytes(flipped(blob.read_bytes()))
    hub.clear()
    assert head_of(Probe.from_pretrained(REPO, revision=third)) == "linear"
    assert (third, HEAD, True) in hub.fetched
    assert hub.pointer(SHA, HEAD).resolve() == hub.pointer(third, HEAD).resolve() == blob  # and the older commit has it back


def test_a_forced_download_replaces_a_link_that_leads_elsewhere(hub: FakeHub) -> None:
    Probe.from_pretrained(REPO, revision=SHA)
    tiny_probe("cosine").save_pretrained(hub.root / SHA)  # the Hub exchanged the files of a commit
    assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
    assert head_of(Probe.from_pretrained(REPO, revision=SHA, force_download=True)) == "cosine"


def test_what_the_hub_delivers_under_another_hash_than_it_lists_is_refused(hub: FakeHub) -> None:
    hub.listed[HEAD] = ((hub.root / SHA / HEAD).stat().st_size, "a" * 64)
    with pytest.raises(HubError, match=rf"{HEAD}: the Hub delivers [0-9a-f]{{64}} and lists a{{64}}\. Do not use it"):
        Probe.from_pretrained(REPO, revision=SHA)
    assert not hub.pointer(SHA, HEAD).exists()


def test_content_that_is_right_under_a_hash_that_is_not_is_refused(hub: FakeHub) -> None:
    """Offline the name in the cache would be all there is to check it by."""
    hub.etags[HEAD] = "b" * 64
    with pytest.raises(HubError, match=rf"delivers b{{64}} and lists {digest(HEAD, (hub.root / SHA / HEAD).read_bytes())}"):
        Probe.from_pretrained(REPO, revision=SHA)
    hub.etags[HEAD] = "no-hash-at-all"  # then it is asked for each time, as without links
    for questions in (1, 1):
        hub.clear()
        assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
        assert len(hub.asked) == questions
    with pytest.raises(HubError, match="cannot be checked offline"):
        Probe.from_pretrained(REPO, revision=SHA, local_files_only=True)


@pytest.mark.parametrize("listed", [(None, "a" * 64), (10, None), (10, "abc"), ("10", "a" * 64), (10, "A" * 64), (True, "a" * 64)])
def test_a_file_whose_hash_the_hub_does_not_say_is_not_downloaded(hub: FakeHub, listed: tuple[Any, Any]) -> None:
    hub.listed[HEAD] = listed
    with pytest.raises(HubError, match=f"does not say size and hash of {HEAD}"):
        Probe.from_pretrained(REPO, revision=SHA)
    assert [name for _, name, _ in hub.fetched] == ["config.json"]


@pytest.mark.parametrize("damaged", [False, True])
def test_nothing_outside_the_cache_is_deleted(hub: FakeHub, tmp_path: Path, damaged: bool) -> None:
    Probe.from_pretrained(REPO, revision=SHA)
    pointer, data = hub.pointer(SHA, HEAD), (hub.root / SHA / HEAD).read_bytes()
    mine = tmp_path / "blobs" / digest(HEAD, data)
    mine.parent.mkdir()
    mine.write_bytes(flipped(data) if damaged else data)
    pointer.unlink()
    pointer.symlink_to(mine)
    hub.clear()
    assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
    assert len(hub.fetched) == damaged
    assert mine.exists()


def test_a_cache_that_cannot_be_repaired_says_so(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    Probe.from_pretrained(REPO, revision=SHA)
    blob = hub.pointer(SHA, HEAD).resolve()
    blob.write_bytes(flipped(blob.read_bytes()))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(HubError, match=r"cannot be removed.*read-only.*another cache_dir"):
        Probe.from_pretrained(REPO, revision=SHA)


# --- a cache without links ---------------------------------------------------------------------------------------------


def test_without_links_the_hashes_are_asked_for_each_time(hub: FakeHub) -> None:
    hub.links = False
    for downloads in (2, 0):
        hub.clear()
        assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
        assert (len(hub.asked), len(hub.fetched)) == (1, downloads)
    pointer = hub.pointer(SHA, HEAD)
    assert not pointer.is_symlink()
    good = pointer.read_bytes()
    pointer.write_bytes(flipped(good))
    hub.clear()
    assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
    assert hub.fetched == [(SHA, HEAD, True)]
    assert pointer.read_bytes() == good


def test_without_links_nothing_can_be_checked_offline_and_nothing_is_read(hub: FakeHub) -> None:
    hub.links = False
    Probe.from_pretrained(REPO, revision=SHA)
    with pytest.raises(HubError, match=r"no links that hold the hashes.*offline.*loraprobe pull"):
        Probe.from_pretrained(REPO, revision=SHA, local_files_only=True)
    assert hub.pointer(SHA, HEAD).exists()


# --- offline -----------------------------------------------------------------------------------------------------------


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_a_name_is_the_commit_that_it_last_was_here(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    options = {"local_files_only": True} if how == "argument" else {}
    for revision in (None, "main", "v1", "refs/pr/1"):
        hub.refs["refs/pr/1"] = SHA
        Probe.from_pretrained(REPO, revision=revision)
    hub.refs |= {"main": SHA, "v1": NEWER}  # they have moved
    hub.clear()
    if how == "environment":
        offline(monkeypatch)
    for revision, commit in ((None, NEWER), ("main", NEWER), ("v1", SHA), ("refs/pr/1", SHA), (SHA, SHA)):
        assert Probe.from_pretrained(REPO, revision=revision, **options).commit == commit
    for revision in ("v2", "e" * 40):
        with pytest.raises(HubError, match=r"not in the local cache.*online"):
            Probe.from_pretrained(REPO, revision=revision, **options)
    with pytest.raises(HubError, match=r"force_download needs the Hub"):
        Probe.from_pretrained(REPO, force_download=True, **options)
    assert hub.asked == hub.fetched == []


def test_a_name_leads_to_a_commit_only_when_all_of_it_is_there(hub: FakeHub) -> None:
    Probe.from_pretrained(REPO, revision="v1")
    hub.refs["v1"] = NEWER
    hub.listed["head.json"] = (MAX_HEAD_BYTES + 1, "a" * 40)
    with pytest.raises(HubError, match="expected at most"):
        Probe.from_pretrained(REPO, revision="v1")
    assert Probe.from_pretrained(REPO, revision="v1", local_files_only=True).commit == SHA


@pytest.mark.parametrize("revision", ["../../../../outside", "a/../../../../../outside", "/tmp/outside", "a//b", ".."])
def test_a_revision_cannot_be_written_outside_the_cache(hub: FakeHub, revision: str) -> None:
    hub.refs[revision] = SHA
    assert Probe.from_pretrained(REPO, revision=revision).commit == SHA
    assert list(hub.root.rglob("*outside*")) == []
    assert not (hub.cache / "models--org--name" / "refs").exists()


def test_a_cache_that_does_not_know_the_commit_is_not_believed(hub: FakeHub) -> None:
    Probe.from_pretrained(REPO)
    (hub.cache / "models--org--name" / "refs" / "main").write_text("")
    with pytest.raises(HubError, match="which commit that is"):
        Probe.from_pretrained(REPO, local_files_only=True)


# --- what cannot be had ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "subfolder", ["..", "../x", "a/../..", "a//b", ".", "./a", "a/.", "/", "*", "a*", "a?", "[a]", "a\\b", "a\nb", "a b", "a\0", "C:/x", "~"]
)
def test_folders_that_leave_the_repository_or_match_others_are_refused_unasked(hub: FakeHub, subfolder: str) -> None:
    for fetch in (fetch_probe, fetch_adapter, lambda repo, subfolder: push_probe(tiny_probe(), repo, subfolder=subfolder)):
        with pytest.raises(HubError, match="plain folder names"):
            fetch(REPO, subfolder=subfolder)
    assert hub.asked == hub.fetched == []


@pytest.mark.parametrize("sha", [None, "main", "abc", "../../etc", SHA.upper()])
def test_an_answer_that_is_no_commit_is_refused(hub: FakeHub, sha: str | None) -> None:
    hub.sha = sha
    with pytest.raises(HubError, match="40 hexadecimal digits"):
        Probe.from_pretrained(REPO)
    assert hub.fetched == []


def test_an_answer_about_another_commit_is_refused(hub: FakeHub) -> None:
    hub.sha = NEWER
    with pytest.raises(HubError, match=f"answered for the commit {NEWER}"):
        Probe.from_pretrained(REPO, revision=SHA)
    assert hub.fetched == []


def test_a_repository_without_what_is_asked_for_says_where_there_is_some(hub: FakeHub) -> None:
    with pytest.raises(HubError, match=r"has none of c/config\.json\. There is one in a/b: pass it as subfolder"):
        Probe.from_pretrained(REPO, subfolder="c")
    with pytest.raises(HubError, match=r"has none of adapter_config\.json\.$"):
        fetch_adapter(REPO)
    (hub.root / NEWER / "adapter_config.json").write_text("{}")
    with pytest.raises(HubError, match=r"has none of adapter_model\.safetensors or adapter_model\.bin\.$"):
        fetch_adapter(REPO)
    (hub.root / NEWER / "head.json").unlink()
    with pytest.raises(HubError, match=r"has none of head\.json"):
        Probe.from_pretrained(REPO)


@pytest.mark.parametrize(
    "config", ["[]", "{}", '{"head": 3}', '{"head": {"kind": []}}', '{"head": {"kind": "pickle"}}', '{"model_type": "llama"}', "x"]
)
def test_a_config_of_something_else_is_no_probe(hub: FakeHub, config: str) -> None:
    (hub.root / NEWER / "config.json").write_text(config)
    with pytest.raises(ProbeFormatError):
        Probe.from_pretrained(REPO)
    assert [name for _, name, _ in hub.fetched] == ["config.json"]


def test_what_comes_from_the_hub_is_checked_as_any_folder(hub: FakeHub) -> None:
    head = hub.root / SHA / HEAD
    head.write_bytes(flipped(head.read_bytes(), -1))  # published like that: the Hub's hashes are right
    with pytest.raises(ProbeFormatError, match="sha256"):
        Probe.from_pretrained(REPO, revision=SHA)


def test_that_no_local_folder_has_the_name_is_said_too(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hub.error = ConnectionError("no network")
    with pytest.raises(HubError, match=r"no network.*no local folder 'org/name' either"):
        Probe.from_pretrained(REPO)
    with pytest.raises(HubError, match=r"no network.*no local file or folder 'org/name' either"):
        load_adapter(REPO)


@pytest.mark.parametrize("text", ["org/name", "o/n", "Org-1/na.me_2", "1/2"])
def test_repository_ids(text: str) -> None:
    assert looks_like_repo_id(text)


BAD_IDS = ["name", "a/b/c", "/a/b", "./a/b", "../a", "a/..", "a/b..c", "a/", "/a", "a\\b", "a /b", "a/b\n", "", "~/a", "-a/b", "a/.b", "a/\u00e9"]


@pytest.mark.parametrize("text", [*BAD_IDS, "a/" + "b" * 97])
def test_other_texts_are_paths_and_nothing_is_pushed_there(hub: FakeHub, text: str) -> None:
    assert not looks_like_repo_id(text)
    with pytest.raises(ProbeFormatError):
        Probe.from_pretrained(text)
    with pytest.raises(HubError, match="expected org/name"):
        tiny_probe().push_to_hub(text)
    assert hub.asked == hub.fetched == []


def test_a_local_folder_wins_over_a_repository_of_that_name(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_probe("linear").save_pretrained(tmp_path / "org" / "name")
    assert Probe.from_pretrained(REPO).commit is None
    assert hub.asked == hub.fetched == []
    with pytest.raises(ProbeFormatError, match="revision"):  # rather than an unpinned folder for a pinned repository
        Probe.from_pretrained(REPO, revision=SHA)


# --- the library's errors ----------------------------------------------------------------------------------------------


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
def test_every_error_of_the_library_becomes_a_hub_error_with_advice(hub: FakeHub, error: str, advice: str, revision: str) -> None:
    kind = getattr(hub_errors_of_library, error)
    hub.error = kind.__new__(kind)  # some cannot be made without a response; all of them can be without a message
    hub.error.response = SimpleNamespace(status_code=0)  # type: ignore[attr-defined]
    for message in ((), ("the reason\nand a page of HTML",)):
        hub.error.args = message
        with pytest.raises(HubError, match=rf"^org/name@{revision}: .*{advice}") as caught:
            fetch_probe(REPO, revision=revision)
        assert "HTML" not in str(caught.value)
        assert caught.value.__cause__ is hub.error


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (400, "refused the request.*the server's words"), (401, "HF_TOKEN.*hf auth login"), (403, "role 'write'"), (409, "conflicts"),
        (412, "somebody else.*Push again"), (413, "too large"), (429, "too often.*Wait"), (500, "fault of its own.*later"), (503, "503.*later"),
    ],
)  # fmt: skip
def test_every_status_has_its_advice_and_the_servers_words(hub: FakeHub, status: int, advice: str) -> None:
    kind = hub_errors_of_library.HfHubHTTPError
    hub.error = kind.__new__(kind, f"{status} Error\n<html>")
    hub.error.response, hub.error.server_message = SimpleNamespace(status_code=status), "the server's words"  # type: ignore[attr-defined]
    with pytest.raises(HubError, match=advice) as caught:
        fetch_probe(REPO)
    assert f"HTTP {status}" in str(caught.value)
    assert "the server's words" in str(caught.value)
    assert "html" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [TimeoutError("slow"), ConnectionResetError(), PermissionError(13, "denied"), ValueError("no JSON"), KeyError("sha")]
)
def test_errors_of_the_system_and_answers_of_another_form_too(hub: FakeHub, error: Exception) -> None:
    hub.error = error
    with pytest.raises(HubError, match=re.escape(type(error).__name__)):
        Probe.from_pretrained(REPO)


def test_what_the_library_wraps_is_named_for_what_it_is(hub: FakeHub) -> None:
    gated = hub_errors_of_library.GatedRepoError
    hub.error = ValueError("Force download failed due to the above error.")
    hub.error.__cause__ = gated.__new__(gated)
    with pytest.raises(HubError, match="gated"):
        fetch_probe(REPO)
    hub.error = RuntimeError("Error while uploading 'head.safetensors' to the Hub.")
    hub.error.__cause__ = TimeoutError("the storage is silent")
    with pytest.raises(HubError, match=r"large file.*head\.safetensors.*the storage is silent.*Push again"):
        fetch_probe(REPO)
    hub.error = ConnectionError("404 at http://x/api/models/org/name/xet-write-token/main")
    with pytest.raises(HubError, match="HF_HUB_DISABLE_XET=1"):
        fetch_probe(REPO)


# --- several probes, and copies ----------------------------------------------------------------------------------------


def test_the_probes_of_a_repository_are_its_folders_with_a_config(hub: FakeHub) -> None:
    for name in ("mlp", "linear"):
        tiny_probe(name).save_pretrained(hub.root / NEWER / name)
    (hub.root / NEWER / "adapters").mkdir()
    assert probe_names(REPO) == (NEWER, ["linear", "mlp"])  # neither the root nor a/b
    assert probe_names(REPO, revision="v1") == (SHA, [])
    Probe.from_pretrained(REPO, "mlp")
    hub.clear()
    assert probe_names(REPO, local_files_only=True) == (NEWER, ["mlp"])  # what is there
    assert hub.asked == hub.fetched == []


def test_a_copy_is_the_files_of_the_commit_and_nothing_of_what_was_there(hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pull_probe(REPO, out) == NEWER
    assert {path.name for path in out.iterdir()} == {"config.json", "head.json", "README.md", "scores.png"}
    assert pull_probe(REPO, out, subfolder="a/b", revision="v1") == SHA
    assert {path.name for path in out.iterdir()} == {"config.json", HEAD, "README.md"}
    for path in out.iterdir():
        assert path.read_bytes() == (hub.root / SHA / "a" / "b" / path.name).read_bytes()
        assert not path.is_symlink()
    assert head_of(Probe.from_pretrained(out)) == "mlp"


def test_nothing_is_copied_of_what_is_no_probe(hub: FakeHub, tmp_path: Path) -> None:
    out = tiny_probe("mlp").save_pretrained(tmp_path / "out")
    head = hub.root / NEWER / "head.json"
    head.write_bytes(flipped(head.read_bytes()))
    with pytest.raises(ProbeFormatError, match="sha256"):
        pull_probe(REPO, out)
    card = hub.root / SHA / "README.md"
    hub.listed["README.md"] = (len(card.read_bytes()), "a" * 40)
    with pytest.raises(HubError, match=r"README\.md"):
        pull_probe(REPO, out, revision=SHA)
    assert head_of(Probe.from_pretrained(out)) == "mlp"
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="is a file"):
        pull_probe(REPO, tmp_path / "file")


# --- publishing: what a server cannot show; the rest is in test_hub_wire.py --------------------------------------------


def test_a_probe_that_does_not_read_back_as_it_was_is_not_sent(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was sent")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", forbidden)
    probe = tiny_probe("linear", calibration="platt")
    others = [tiny_probe("linear", calibration="platt", signal=0.2), tiny_probe("linear", calibration="isotonic"), tiny_probe("linear")]
    for other in others:
        monkeypatch.setattr(hub_module, "load_probe", lambda folder, other=other: other)
        with pytest.raises(HubError, match="does not read back"):
            push_probe(probe, REPO)
    monkeypatch.setattr(hub_module, "load_probe", lambda folder: probe)
    with pytest.raises(HubError, match="something was sent"):  # the control: what is alike goes on
        push_probe(probe, REPO)


def test_a_branch_and_a_pull_request_exclude_each_other_before_anything_is_sent(hub: FakeHub) -> None:
    with pytest.raises(HubError, match="against main"):
        push_probe(tiny_probe(), REPO, branch="dev", create_pr=True)
    assert hub.asked == []
