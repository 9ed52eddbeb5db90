"""A probe on disk: what is saved scores bit for bit alike, and every version of the format is read
as it was written.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraprobe import Adapter, LoRAPair, Probe
from loraprobe.errors import HubError, ProbeFormatError
from tests.helpers.probes import (
    BASE,
    HEAD_OPTIONS,
    RECIPES,
    labelled_adapter,
    new_data,
    scores_of,
    tiny_probe,
)

DATA = Path(__file__).resolve().parents[2] / "data"
PROBES = [
    *((head, "paper", calibration) for head in HEAD_OPTIONS for calibration in (None, "platt")),
    *(("linear", recipe, None) for recipe in RECIPES),
    ("linear", "paper", "isotonic"),
]


# ---- saving ----


@pytest.mark.parametrize(("head", "recipe", "calibration"), PROBES)
def test_a_saved_probe_is_the_same_probe(
    tmp_path: Path, head: str, recipe: str, calibration: str | None
) -> None:
    probe = tiny_probe(head, recipe, calibration, "fpr:0.2" if calibration else 0.8).with_facts(
        data=[{"name": "Ärger", "role": "train"}]
    )
    if calibration is None:
        probe = replace(probe, benign_below=probe.threshold / 2)
    folder = probe.save_pretrained(tmp_path / "deep" / "probe")
    again = Probe.from_pretrained(folder)
    scores = probe(new_data().adapters)
    assert len(set(scores.tolist())) > 1
    assert again(new_data().adapters).tobytes() == scores.tobytes()
    for name in ("threshold", "benign_below", "calibration", "base_model", "featurizer", "commit"):
        assert getattr(again, name) == getattr(probe, name)
    assert again.facts["data"] == [{"name": "Ärger", "role": "train"}]
    assert again.facts["training"]["head"] == head
    twice = Probe.from_pretrained(again.save_pretrained(tmp_path / "twice"))
    for path in folder.iterdir():
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes()
    assert twice.facts == again.facts


@pytest.mark.parametrize("head", HEAD_OPTIONS)
def test_the_folder_holds_no_pickle_and_loading_reads_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    folder = tiny_probe(head).save_pretrained(tmp_path)
    names = {"config.json", "head.safetensors", "featurizer.safetensors", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    scores_of(folder)
    for path in folder.iterdir():
        if path.name == "featurizer.safetensors":
            kinds = {array.dtype.str for array in safetensors.numpy.load_file(path).values()}
            assert kinds == {"<f2"}
        elif path.suffix == ".safetensors":
            kinds = {array.dtype.str for array in safetensors.numpy.load_file(path).values()}
            assert kinds == ({"<f4", "<i4"} if head == "xgboost" else {"<f4"})
        else:  # text: a pickle since protocol 2, or a zip of them, is none
            path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("first", "second"), [("linear", "xgboost"), ("xgboost", "linear"), ("mlp", "linear")]
)
def test_saving_over_another_probe_leaves_nothing_of_it(
    tmp_path: Path, first: str, second: str
) -> None:
    tiny_probe(first).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "head.json").write_text("of version 2")
    tiny_probe(second).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *"config.json head.safetensors featurizer.safetensors README.md notes.txt".split()
    }
    assert scores_of(tmp_path) == tiny_probe(second)(new_data().adapters).tobytes()


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    "facts",
    [
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": {1, 2}},
        {"x": np.arange(3)},
        {"x": {1: "a", "1": "b"}},
        {"metrics": [{"metric": "auroc"}]},
        {"x": ENDLESS},
        {"x": "\ud800"},
        {"x": {"\udfff": 1}},
        {"x": 10**5000},
        {"x": json.loads("[" * 40 + "]" * 40)},
        {"x": "x" * (17 << 20)},
    ],
    ids=range(12),
)
def test_facts_that_json_or_the_card_cannot_hold_leave_the_earlier_probe_alone(
    tmp_path: Path, facts: dict[str, Any]
) -> None:
    folder = tiny_probe("xgboost").save_pretrained(tmp_path / "probe")
    with pytest.raises(ProbeFormatError, match="facts"):
        tiny_probe("linear").with_facts(**facts).save_pretrained(folder)
    assert scores_of(folder) == tiny_probe("xgboost")(new_data().adapters).tobytes()
    tiny_probe("linear").with_facts(x=[1, 2.5, "a", None, {"b": True}]).save_pretrained(folder)
    assert Probe.from_pretrained(folder).facts["x"] == [1, 2.5, "a", None, {"b": True}]


def test_a_file_is_no_folder_and_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProbeFormatError, match="is a file"):
        tiny_probe().save_pretrained(tmp_path / "file")
    folder = tiny_probe().save_pretrained(tmp_path / "a" / "b")
    assert Probe.from_pretrained(tmp_path / "a", subfolder="b").commit is None
    with pytest.raises(HubError, match="revision"):
        Probe.from_pretrained(folder, revision="main")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProbeFormatError, match="nowhere"):
        Probe.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ProbeFormatError, match=r"no config\.json"):
        Probe.from_pretrained(tmp_path)


# ---- old formats ----


def wave(number: int) -> Adapter:
    """An adapter whose numbers depend on no generator."""
    pairs = {}
    for index, (name, pair) in enumerate(sorted(labelled_adapter(0).items())):
        a, b = (
            torch.sin(torch.arange(t.size, dtype=torch.float64) * (1.3 + number + index))
            .reshape(t.shape)
            .float()
            for t in (pair.A, pair.B)
        )
        pairs[name] = LoRAPair(a, b, 2.0)
    return Adapter(pairs, kind="factor_delta", base_model=BASE)


@pytest.mark.parametrize("name", ["linear", "xgboost"])
def test_version_1_folders_load_and_score_as_they_did(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders under data/probe-v1 were written by the first release and are never written
    again.
    """
    recorded = json.loads((DATA / "probe-v1" / "scores.json").read_text())[name]
    monkeypatch.setitem(sys.modules, "xgboost", None)  # trees of every version score without it
    probe = Probe.from_pretrained(DATA / "probe-v1" / name)
    assert probe([wave(number) for number in range(6)]) == pytest.approx(
        recorded["scores"], abs=1e-6
    )
    assert (probe.threshold, probe.lower_cut, probe.base_model) == (
        recorded["threshold"],
        recorded["lower_cut"],
        BASE,
    )
    waves = [wave(number) for number in range(6)]
    assert [verdict.label for verdict in probe.verdicts(waves, check_start=False)] == recorded[
        "labels"
    ]
    # Folders of that time know no initial adapter: by themselves they call nothing benign.
    assert "benign" not in {verdict.label for verdict in probe.verdicts(waves)}
    assert len(set(recorded["labels"])) > 1
    assert np.std(recorded["scores"]) > 0.01


def test_trees_of_version_2_become_arrays_of_version_3(tmp_path: Path) -> None:
    """The zoo's were written as XGBoost's JSON."""
    old = Probe.from_pretrained(DATA / "probe-v1" / "xgboost")
    again = Probe.from_pretrained(old.save_pretrained(tmp_path))
    adapters = [wave(number) for number in range(6)]
    assert again(adapters).tobytes() == old(adapters).tobytes()
    assert not (tmp_path / "head.json").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format_version"], config["head"]["file"]) == (3, "head.safetensors")


# ---- the digest ----


def test_a_changed_digit_is_refused_and_the_message_says_how_to_change_a_value(
    tmp_path: Path,
) -> None:
    path = tiny_probe().save_pretrained(tmp_path) / "config.json"
    text = path.read_text()
    assert '"threshold": 0.8' in text
    path.write_text(text.replace('"threshold": 0.8', '"threshold": 0.9'))
    with pytest.raises(
        ProbeFormatError,
        match=(
            r"damaged, or edited by hand\. .*dataclasses\.replace\(probe, threshold=\.\.\.\) and"
            r" save_pretrained"
        ),
    ) as caught:
        Probe.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)
    path.write_text(text)
    # what the message says
    replace(Probe.from_pretrained(tmp_path), threshold=0.9).save_pretrained(tmp_path)
    assert Probe.from_pretrained(tmp_path).threshold == 0.9


def test_the_digest_is_that_of_the_fields_however_they_are_laid_out(tmp_path: Path) -> None:
    path = tiny_probe().save_pretrained(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    rest = {name: value for name, value in config.items() if name != "digest"}
    assert (
        config["digest"]
        == hashlib.sha256(
            json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()
    )
    expected = scores_of(tmp_path)
    for text in (
        json.dumps(config),
        json.dumps(dict(reversed(config.items())), indent=7),
        json.dumps(config, ensure_ascii=False),
    ):
        path.write_text(text)
        assert scores_of(tmp_path) == expected


TEXT = st.text(st.characters(codec="utf-8"))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(values=VALUES)
@settings(max_examples=60, deadline=None)
def test_whatever_json_can_hold_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, values: Any
) -> None:
    folder = tmp_path_factory.mktemp("facts")
    found = Probe.from_pretrained(tiny_probe().with_facts(x=values).save_pretrained(folder)).facts[
        "x"
    ]
    assert found == values
    # 1, 1.0 and True are equal and not the same
    assert json.dumps(found, sort_keys=True) == json.dumps(values, sort_keys=True)
