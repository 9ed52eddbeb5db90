"""Fetching from the Hub.

Every byte is compared with its hash, and what is damaged is fetched again or refused.

"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraprobe import Probe, load_adapter
from loraprobe.errors import HubError
from tests.helpers.hub import REPO, Hub, digest, flipped
from tests.helpers.hub_probes import HEAD, SHA, WEIGHTS, filled, head_of, with_adapter
from tests.helpers.probes import tiny_probe


@pytest.fixture
def hub(hub: Hub) -> Hub:
    return filled(hub)


@pytest.fixture
def adapters(hub: Hub) -> Hub:
    return with_adapter(hub)


# --- damage


FILES = [
    ("config.json", Probe.from_pretrained),
    (HEAD, Probe.from_pretrained),
    ("adapter_config.json", load_adapter),
    (WEIGHTS, load_adapter),
]


@pytest.mark.parametrize(("name", "load"), FILES)
@pytest.mark.parametrize("revision", ["v1", SHA])
def test_a_flipped_bit_in_the_cache_is_found_and_the_file_fetched_again(
    adapters: Hub, name: str, load: Callable[..., Any], revision: str
) -> None:
    load(REPO, revision=SHA)
    blob = adapters.pointer(SHA, name).resolve()
    good = blob.read_bytes()
    for place in (0, len(good) // 2, -1):
        adapters.clear()
        blob.write_bytes(flipped(good, place))
        assert load(REPO, revision=revision).commit == SHA
        assert adapters.fetched == [name]
        assert blob.read_bytes() == good
    for size in (len(good) - 1, 0):
        blob.write_bytes(good[:size])
        load(REPO, revision=revision)
        assert blob.read_bytes() == good


@pytest.mark.parametrize(("name", "load"), FILES)
def test_a_flipped_bit_is_found_offline_and_the_file_removed(
    adapters: Hub, name: str, load: Callable[..., Any]
) -> None:
    load(REPO, revision=SHA)
    pointer = adapters.pointer(SHA, name)
    blob = pointer.resolve()
    blob.write_bytes(flipped(blob.read_bytes()))
    adapters.clear()
    for state in (
        "was damaged in the local cache and has been removed",
        "is not in the local cache",
    ):
        with pytest.raises(HubError, match=rf"{name}.* {state}.*online"):
            load(REPO, revision=SHA, local_files_only=True)
        assert not pointer.is_symlink()
        assert not blob.exists()
    assert adapters.asked == adapters.fetched == []
    load(REPO, revision=SHA)


@pytest.mark.parametrize(("times", "downloads"), [(1, 2), (2, 2), (9, 2)])
@pytest.mark.parametrize(("name", "load"), FILES)
def test_damage_on_the_way_is_tried_once_more_and_never_kept(
    adapters: Hub, name: str, load: Callable[..., Any], times: int, downloads: int
) -> None:
    load(REPO, revision=SHA)
    pointer = adapters.pointer(SHA, name)
    blob = pointer.resolve()
    blob.unlink()
    pointer.unlink()
    adapters.clear()
    adapters.faults.add("flip", times=times)
    if times == 1:
        assert load(REPO, revision=SHA).commit == SHA
    else:
        with pytest.raises(
            HubError,
            match=(
                rf"^org/name@{SHA}, {name}: what was downloaded is not what the Hub lists"
                r" .*twice.*removed"
            ),
        ):
            load(REPO, revision=SHA)
        assert not blob.exists()
        assert not pointer.is_symlink()
    assert adapters.fetched == [name] * downloads


def test_content_that_another_commit_shares_is_checked_too(hub: Hub) -> None:
    """The library links what it has already, without a download: here after it was damaged."""
    third = "e" * 40
    tiny_probe("linear").save_pretrained(hub.commit(third))
    Probe.from_pretrained(REPO, revision=SHA)
    blob = hub.pointer(SHA, HEAD).resolve()
    blob.write_bytes(flipped(blob.read_bytes()))
    hub.clear()
    assert head_of(Probe.from_pretrained(REPO, revision=third)) == "linear"
    assert HEAD in hub.fetched
    # and the older commit has it back
    assert hub.pointer(SHA, HEAD).resolve() == hub.pointer(third, HEAD).resolve() == blob


def test_a_forced_download_replaces_a_link_that_leads_elsewhere(hub: Hub) -> None:
    Probe.from_pretrained(REPO, revision=SHA)
    tiny_probe("cosine").save_pretrained(hub.at(SHA))  # the Hub exchanged the files of a commit
    assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
    assert head_of(Probe.from_pretrained(REPO, revision=SHA, force_download=True)) == "cosine"


def test_what_the_hub_delivers_under_another_hash_than_it_lists_is_refused(hub: Hub) -> None:
    hub.listed[HEAD] = ((hub.at(SHA) / HEAD).stat().st_size, "a" * 64)
    with pytest.raises(
        HubError,
        match=rf"{HEAD}: the Hub delivers [0-9a-f]{{64}} and lists a{{64}}\. Do not use it",
    ):
        Probe.from_pretrained(REPO, revision=SHA)
    assert not hub.pointer(SHA, HEAD).exists()


def test_content_that_is_right_under_a_hash_that_is_not_is_refused(hub: Hub) -> None:
    """Offline the name in the cache would be all there is to check it by."""
    hub.etags[HEAD] = "b" * 64
    with pytest.raises(
        HubError,
        match=rf"delivers b{{64}} and lists {digest(HEAD, (hub.at(SHA) / HEAD).read_bytes())}",
    ):
        Probe.from_pretrained(REPO, revision=SHA)
    hub.etags[HEAD] = "no-hash-at-all"  # then it is asked for each time, as without links
    for questions in (1, 1):
        hub.clear()
        assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
        assert len(hub.asked) == questions
    with pytest.raises(HubError, match="cannot be checked offline"):
        Probe.from_pretrained(REPO, revision=SHA, local_files_only=True)


@pytest.mark.parametrize(
    "listed",
    [(None, "a" * 64), (10, None), (10, "abc"), ("10", "a" * 64), (10, "A" * 64), (True, "a" * 64)],
)
def test_a_file_whose_hash_the_hub_does_not_say_is_not_downloaded(
    hub: Hub, listed: tuple[Any, Any]
) -> None:
    hub.listed[HEAD] = listed
    with pytest.raises(HubError, match=f"does not say size and hash of {HEAD}"):
        Probe.from_pretrained(REPO, revision=SHA)
    assert hub.fetched == ["config.json"]


@pytest.mark.parametrize("damaged", [False, True])
def test_nothing_outside_the_cache_is_deleted(hub: Hub, tmp_path: Path, damaged: bool) -> None:
    Probe.from_pretrained(REPO, revision=SHA)
    pointer, data = hub.pointer(SHA, HEAD), (hub.at(SHA) / HEAD).read_bytes()
    mine = tmp_path / "blobs" / digest(HEAD, data)
    mine.parent.mkdir()
    mine.write_bytes(flipped(data) if damaged else data)
    pointer.unlink()
    pointer.symlink_to(mine)
    hub.clear()
    assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
    assert len(hub.fetched) == damaged
    assert mine.exists()


def test_a_cache_that_cannot_be_repaired_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    Probe.from_pretrained(REPO, revision=SHA)
    blob = hub.pointer(SHA, HEAD).resolve()
    blob.write_bytes(flipped(blob.read_bytes()))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(HubError, match=r"cannot be removed.*read-only.*another cache_dir"):
        Probe.from_pretrained(REPO, revision=SHA)
