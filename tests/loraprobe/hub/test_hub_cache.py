"""Caches without links, and offline: what is not known for sure is not read."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

from loraprobe import Probe
from loraprobe.errors import HubError
from loraprobe.limits import PROBE_FEATURIZER
from tests.helpers.hub import REPO, Hub, flipped
from tests.helpers.hub_probes import HEAD, NEWER, SHA, filled, head_of


@pytest.fixture
def hub(hub: Hub) -> Hub:
    return filled(hub)


# --- a cache without links


def test_without_links_the_hashes_are_asked_for_each_time(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    for downloads in (3, 0):
        hub.clear()
        assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
        assert (len(hub.asked), len(hub.fetched)) == (1, downloads)
    pointer = hub.pointer(SHA, HEAD)
    assert not pointer.is_symlink()
    good = pointer.read_bytes()
    pointer.write_bytes(flipped(good))
    hub.clear()
    assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
    assert hub.fetched == [HEAD]
    assert pointer.read_bytes() == good


def test_without_links_nothing_can_be_checked_offline_and_nothing_is_read(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    Probe.from_pretrained(REPO, revision=SHA)
    with pytest.raises(HubError, match=r"no links that hold the hashes.*offline.*loraprobe pull"):
        Probe.from_pretrained(REPO, revision=SHA, local_files_only=True)
    assert hub.pointer(SHA, HEAD).exists()


# --- offline


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_a_name_is_the_commit_that_it_last_was_here(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    options = {"local_files_only": True} if how == "argument" else {}
    for revision in (None, "main", "v1", "refs/pr/1"):
        hub.refs["refs/pr/1"] = SHA
        Probe.from_pretrained(REPO, revision=revision)
    hub.refs.update({"main": SHA, "v1": NEWER})  # they have moved
    hub.clear()
    if how == "environment":
        offline(monkeypatch)
    for revision, commit in (
        (None, NEWER),
        ("main", NEWER),
        ("v1", SHA),
        ("refs/pr/1", SHA),
        (SHA, SHA),
    ):
        assert Probe.from_pretrained(REPO, revision=revision, **options).commit == commit
    for revision in ("v2", "e" * 40):
        with pytest.raises(HubError, match=r"not in the local cache.*online"):
            Probe.from_pretrained(REPO, revision=revision, **options)
    with pytest.raises(HubError, match=r"force_download needs the Hub"):
        Probe.from_pretrained(REPO, force_download=True, **options)
    assert hub.asked == hub.fetched == []


def test_a_name_leads_to_a_commit_only_when_all_of_it_is_there(hub: Hub) -> None:
    Probe.from_pretrained(REPO, revision="v1")
    hub.refs["v1"] = NEWER
    hub.listed["head.safetensors"] = (PROBE_FEATURIZER + 1, "a" * 40)
    with pytest.raises(HubError, match="expected at most"):
        Probe.from_pretrained(REPO, revision="v1")
    assert Probe.from_pretrained(REPO, revision="v1", local_files_only=True).commit == SHA


@pytest.mark.parametrize(
    "revision", ["../../../../outside", "a/../../../../../outside", "/tmp/outside", "a//b"]
)
def test_a_revision_cannot_be_written_outside_the_cache(hub: Hub, revision: str) -> None:
    hub.refs[revision] = SHA
    assert Probe.from_pretrained(REPO, revision=revision).commit == SHA
    assert list(hub.root.rglob("*outside*")) == []
    assert not (hub.cache / "models--org--name" / "refs").exists()


def test_a_cache_that_does_not_know_the_commit_is_not_believed(hub: Hub) -> None:
    Probe.from_pretrained(REPO)
    (hub.cache / "models--org--name" / "refs" / "main").write_text("")
    with pytest.raises(HubError, match="which commit that is"):
        Probe.from_pretrained(REPO, local_files_only=True)
