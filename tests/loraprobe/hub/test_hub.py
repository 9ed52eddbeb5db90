"""Fetching from the Hub.

One commit is pinned, little is asked for, and what is there is listed, copied and pushed.

"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from loraprobe import Probe, factor_delta, load_adapter
from loraprobe.errors import AdapterFormatError, HubError, ProbeFormatError
from loraprobe.hub import hub as hub_module
from loraprobe.hub.hub import fetch_adapter, fetch_probe, probe_names, pull_probe, push_probe
from loraprobe.limits import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROBE_CONFIG, PROBE_FEATURIZER
from tests.helpers.hub import REPO, Hub, digest, flipped
from tests.helpers.hub_probes import (
    HEAD,
    LEARNT,
    NEWER,
    SHA,
    WEIGHTS,
    filled,
    head_of,
    norms,
    with_adapter,
)
from tests.helpers.probes import labelled_adapter, tiny_probe


@pytest.fixture
def hub(hub: Hub) -> Hub:
    return filled(hub)


@pytest.fixture
def adapters(hub: Hub) -> Hub:
    return with_adapter(hub)


# --- one commit, and no more than is needed


@pytest.mark.parametrize(("revision", "commit"), [(None, NEWER), ("main", NEWER), ("v1", SHA)])
def test_a_name_that_moves_is_resolved_once_by_one_question(
    hub: Hub, revision: str | None, commit: str
) -> None:
    probe = Probe.from_pretrained(REPO, revision=revision, token="reads")
    assert hub.asked == [(revision, "reads")]
    assert (probe.commit, head_of(probe)) == (commit, "xgboost" if commit == NEWER else "linear")


@pytest.mark.parametrize("revision", [SHA[:12], SHA.upper(), "refs/pr/1", SHA + "0"])
def test_what_is_not_a_full_commit_is_asked_for(hub: Hub, revision: str) -> None:
    hub.refs[revision] = SHA
    assert Probe.from_pretrained(REPO, revision=revision).commit == SHA
    assert hub.asked == [(revision, None)]


def test_only_the_config_and_the_head_that_it_names_are_fetched(hub: Hub) -> None:
    (hub.at(NEWER) / "head.json").write_bytes(b"left by an earlier probe")
    for subfolder, head in (
        (None, "xgboost"),
        ("a/b", "cosine"),
        ("a/b/", "cosine"),
        ("/a/b", "cosine"),
    ):
        hub.clear()
        assert head_of(Probe.from_pretrained(REPO, subfolder)) == head
        prefix = "a/b/" if subfolder else ""
        # what a learnt basis shares with the one before is there already
        known = [prefix + "config.json", prefix + HEAD, prefix + LEARNT]
        assert hub.fetched in (known, known[:2], [])
    folder, commit = fetch_probe(REPO, subfolder="a/b")
    assert (folder.name, commit) == ("b", NEWER)
    assert {path.name for path in folder.iterdir()} == {"config.json", HEAD, LEARNT}


def test_a_pinned_commit_in_the_cache_asks_nothing(hub: Hub) -> None:
    for revision, questions in ((SHA, 1), (SHA, 0), ("v1", 1)):
        hub.clear()
        assert head_of(Probe.from_pretrained(REPO, revision=revision)) == "linear"
        assert (len(hub.asked), len(hub.fetched)) == (
            questions,
            3 if revision == SHA and questions else 0,
        )
    hub.clear()
    hub.error = ConnectionError("no network")
    assert head_of(Probe.from_pretrained(REPO, revision=SHA)) == "linear"
    assert hub.asked == hub.fetched == []


def test_another_cache_and_force_download_fetch_again(hub: Hub, tmp_path: Path) -> None:
    Probe.from_pretrained(REPO, revision=SHA)
    for options in ({"cache_dir": tmp_path / "other"}, {"force_download": True}):
        hub.clear()
        assert head_of(Probe.from_pretrained(REPO, revision=SHA, **options)) == "linear"
        assert hub.fetched == ["config.json", HEAD, LEARNT]
    assert hub.pointer(SHA, HEAD, tmp_path / "other").is_file()


def test_of_an_adapter_the_safetensors_file_alone_is_fetched(adapters: Hub) -> None:
    folder, commit = fetch_adapter(REPO, revision="v1")
    assert adapters.fetched == ["adapter_config.json", WEIGHTS]
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", WEIGHTS}
    adapters.clear()
    loaded = load_adapter(REPO, commit)
    assert norms(loaded) == norms(labelled_adapter(1, kind="weights"))
    assert adapters.asked == adapters.fetched == []


def test_a_pickle_in_a_repository_is_refused_before_anything_is_fetched(adapters: Hub) -> None:
    (adapters.at(SHA) / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(
        AdapterFormatError, match=r"adapter_model\.safetensors and adapter_model\.bin"
    ):
        load_adapter(REPO, SHA)
    (adapters.at(SHA) / WEIGHTS).unlink()
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.bin is a pickle"):
        load_adapter(REPO, SHA)
    assert WEIGHTS not in adapters.fetched


def test_an_adapter_knows_its_commit_and_a_delta_has_none(adapters: Hub, tmp_path: Path) -> None:
    loaded = load_adapter(REPO, "v1")
    assert loaded.commit == loaded.load().commit == SHA
    assert factor_delta(loaded, loaded).commit is None
    assert load_adapter(adapters.at(SHA)).commit is None


def test_an_adapter_takes_the_options_of_a_probe(adapters: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "other"
    with pytest.raises(HubError, match="not in the local cache"):
        load_adapter(REPO, SHA, cache_dir=cache, local_files_only=True)
    load_adapter(REPO, SHA, cache_dir=cache, token="reads")
    assert adapters.asked == [(SHA, "reads")]
    adapters.clear()
    load_adapter(REPO, SHA, cache_dir=cache, force_download=True)
    assert adapters.fetched == ["adapter_config.json", WEIGHTS]
    adapters.clear()
    assert load_adapter(REPO, SHA, cache_dir=cache, local_files_only=True).commit == SHA
    assert adapters.asked == adapters.fetched == []


# --- too large


@pytest.mark.parametrize(
    ("name", "limit", "load"),
    [
        ("config.json", PROBE_CONFIG, Probe.from_pretrained),
        (HEAD, PROBE_FEATURIZER, Probe.from_pretrained),
        ("adapter_config.json", ADAPTER_CONFIG, load_adapter),
        (WEIGHTS, ADAPTER_WEIGHTS, load_adapter),
    ],
)
def test_a_file_that_is_too_large_is_refused_before_it_is_downloaded(
    adapters: Hub, name: str, limit: int, load: Callable[..., Any]
) -> None:
    oid = digest(name, (adapters.at(SHA) / name).read_bytes())
    adapters.listed[name] = (limit + 1, oid)
    with pytest.raises(HubError, match=rf"{name} has {limit + 1} bytes; expected at most {limit}"):
        load(REPO, revision=SHA)
    assert name not in adapters.fetched
    # one byte less is downloaded, and is then not what was listed
    adapters.listed[name] = (limit, oid)
    with pytest.raises(HubError, match="not what the Hub lists"):
        load(REPO, revision=SHA)


# --- several probes, and copies


def test_the_probes_of_a_repository_are_its_folders_with_a_config(hub: Hub) -> None:
    for name in ("mlp", "linear"):
        tiny_probe(name).save_pretrained(hub.at(NEWER) / name)
    (hub.at(NEWER) / "adapters").mkdir()
    assert probe_names(REPO) == (NEWER, ["linear", "mlp"])  # neither the root nor a/b
    assert probe_names(REPO, revision="v1") == (SHA, [])
    Probe.from_pretrained(REPO, "mlp")
    hub.clear()
    assert probe_names(REPO, local_files_only=True) == (NEWER, ["mlp"])  # what is there
    assert hub.asked == hub.fetched == []


def test_a_copy_is_the_files_of_the_commit_and_nothing_of_what_was_there(
    hub: Hub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert pull_probe(REPO, out) == NEWER
    assert {path.name for path in out.iterdir()} == {
        *"config.json head.safetensors featurizer.safetensors README.md scores.png".split()
    }
    assert pull_probe(REPO, out, subfolder="a/b", revision="v1") == SHA
    assert {path.name for path in out.iterdir()} == {"config.json", HEAD, LEARNT, "README.md"}
    for path in out.iterdir():
        assert path.read_bytes() == (hub.at(SHA) / "a" / "b" / path.name).read_bytes()
        assert not path.is_symlink()
    assert head_of(Probe.from_pretrained(out)) == "mlp"


def test_nothing_is_copied_of_what_is_no_probe(hub: Hub, tmp_path: Path) -> None:
    out = tiny_probe("mlp").save_pretrained(tmp_path / "out")
    head = hub.at(NEWER) / "head.safetensors"
    head.write_bytes(flipped(head.read_bytes()))
    with pytest.raises(ProbeFormatError, match="sha256"):
        pull_probe(REPO, out)
    card = hub.at(SHA) / "README.md"
    hub.listed["README.md"] = (len(card.read_bytes()), "a" * 40)
    with pytest.raises(HubError, match=r"README\.md"):
        pull_probe(REPO, out, revision=SHA)
    assert head_of(Probe.from_pretrained(out)) == "mlp"
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="is a file"):
        pull_probe(REPO, tmp_path / "file")


# --- publishing: what a server cannot show; the rest is in test_push.py ---


def test_a_probe_that_does_not_read_back_as_it_was_is_not_sent(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was sent")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", forbidden)
    probe = tiny_probe("linear", calibration="platt")
    others = [
        tiny_probe("linear", calibration="platt", signal=0.2),
        tiny_probe("linear", calibration="isotonic"),
        tiny_probe("linear"),
    ]
    for other in others:
        monkeypatch.setattr(hub_module, "load_probe", lambda folder, other=other: other)
        with pytest.raises(HubError, match="does not read back"):
            push_probe(probe, REPO)
    monkeypatch.setattr(hub_module, "load_probe", lambda folder: probe)
    with pytest.raises(HubError, match="something was sent"):  # the control: what is alike goes on
        push_probe(probe, REPO)
