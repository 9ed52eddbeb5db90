"""A checkpoint is whole or not there: what goes in comes out, and what was damaged is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloop.errors import StateError
from fedloop.run.checkpoint import FORMAT_VERSION, load_checkpoint, save_checkpoint
from tests.helpers.federated import same_tree

GENERATOR = np.random.default_rng(0)
SHARED = torch.arange(12.0)
TREE: dict[str, Any] = {
    "none": None,
    "numbers": [0, -7, 2**60, 0.1, 1e-300, -0.0, True, False],
    "text": 'ü ☃ \x00 "quoted" \ud800',
    "empty": {
        "dict": {},
        "list": [],
        "text": "",
        "array": np.zeros((0, 3)),
        "tensor": torch.zeros(0),
    },
    "nested": [{"a": [torch.randn(2, 3, dtype=torch.float64), {"b": np.array([1, 2, 3])}]}, (1, 2)],
    "types": [
        torch.tensor([1.5, math.nan, math.inf, -0.0]),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor(3),
        torch.tensor([True]),
        np.float32([1e-45, 3e38]),
        np.array(2.5),
        np.array([[True, False]]),
        np.arange(4, dtype=np.int64),
    ],
    "views": [
        SHARED[:6],
        SHARED[3:],
        SHARED.view(3, 4).T,
        np.asfortranarray(GENERATOR.normal(size=(3, 4))),
        np.arange(10.0)[::-2],
    ],
    "clients": {
        "a/b": {"c": torch.tensor([1.0])},
        "a": {"b/c": torch.tensor([2.0])},
        "__array__": torch.tensor([3.0]),
        "": {"__array__": "0"},
    },
}


def saved(folder: Path, tree: dict[str, Any] | None = None, round: int = 3) -> Path:
    save_checkpoint(folder, round, TREE if tree is None else tree)
    return folder / f"round-{round:06d}"


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "absent") is None
    assert load_checkpoint(tmp_path) is None
    saved(tmp_path / "some" / "where")
    found = load_checkpoint(tmp_path / "some" / "where")
    assert found is not None
    number, tree = found
    assert number == 3
    nans = {"types": [TREE["types"][0].nan_to_num(nan=7.0), *TREE["types"][1:]]}
    tree["types"][0] = tree["types"][0].nan_to_num(nan=7.0)
    assert same_tree(tree, TREE | nans)
    assert not same_tree(tree, TREE | nans | {"none": 0})  # negative control of the comparison
    assert math.copysign(1, tree["numbers"][5]) == -1
    assert tree["views"][4].tolist() == [9.0, 7.0, 5.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": [object()]}}, "got a object at /a/b/0"),
        ({"a": {1: 2}}, "keys other than strings at /a"),
        ({1: 2}, "keys other than strings at the top"),
        ({"a": np.int64(3)}, "got a int64 at /a"),
        ({"a": math.nan}, "got nan at /a"),
        ({"a": [-math.inf]}, "got -inf at /a/0"),
        ({"a": np.array(["x"])}, "array of <U1 at /a"),
        ({"a": np.array([None])}, "array of object at /a"),
        ({"a": {3}}, "got a set at /a"),
    ],
)
def test_what_is_not_plain_is_refused_and_the_former_state_stays(
    tmp_path: Path, tree: dict[str, Any], message: str
) -> None:
    saved(tmp_path, {"former": 1}, 1)
    with pytest.raises(StateError, match=message):
        save_checkpoint(tmp_path, 2, tree)
    assert load_checkpoint(tmp_path) == (1, {"former": 1})


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    record = {"record": '{"f": 0.25}', "trust": {"c1": [0.1, 3, True, None]}, "é": "ü"}
    folder = saved(tmp_path, {**record, "lora": torch.arange(5.0)})
    whole = load_checkpoint(tmp_path)
    for name in ("state.json", "arrays.safetensors"):
        content = (folder / name).read_bytes()
        for at, byte in enumerate(content):
            flipped = bytes([byte ^ (1 if at % 2 else 32)])  # 32 turns letters into capitals
            (folder / name).write_bytes(content[:at] + flipped + content[at + 1 :])
            try:
                found = load_checkpoint(tmp_path)
            except StateError:
                continue
            # JSON can be written in two ways: \u00FC for \u00fc
            assert same_tree(found, whole), (name, at)
            assert name == "state.json"
        (folder / name).write_bytes(content)
    assert same_tree(load_checkpoint(tmp_path), whole)


def test_cut_swapped_and_missing_files_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "3"
    folder, same, other = (
        saved(tmp_path / name, tree, 3)
        for name, tree in (("3", TREE), ("4", {**TREE, "none": 1}), ("5", {**TREE, "views": []}))
    )
    arrays = "arrays.safetensors"

    def refused(match: str) -> None:
        with pytest.raises(StateError, match=match):
            load_checkpoint(place)

    for name in ("state.json", arrays):
        content = (folder / name).read_bytes()
        for cut in (0, 1, 7, len(content) // 2, len(content) - 1):
            (folder / name).write_bytes(content[:cut])
            refused("round-000003")
        (folder / name).unlink()
        refused("not a whole checkpoint")
        (folder / name).write_bytes(content)
    for text in (b"[]", b"null", b"{}", b'"state"', b"\xff\xfe"):
        (folder / "state.json").write_bytes(text)
        refused("round-000003")
    shutil.copy(same / "state.json", folder)
    assert (same / arrays).read_bytes() == (folder / arrays).read_bytes()
    # arrays that are the same may come from anywhere
    assert load_checkpoint(place) is not None
    shutil.copy(other / arrays, folder)
    refused("not those that were written")


def test_another_version_is_refused_by_its_number(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    values = json.loads((folder / "state.json").read_text())
    for version in (FORMAT_VERSION + 1, "1", None):
        (folder / "state.json").write_text(json.dumps({**values, "version": version}))
        said = f"format version {version!r}; expected {FORMAT_VERSION}"
        with pytest.raises(StateError, match=said):
            load_checkpoint(tmp_path)


def test_a_half_written_round_is_not_seen_and_an_old_one_neither(tmp_path: Path) -> None:
    old = saved(tmp_path, {"n": 2}, 2)
    shutil.copytree(old, tmp_path / "kept")
    saved(tmp_path, {"n": 3}, 3)
    assert not old.exists()
    # as a kill leaves it between the rename and the removal
    shutil.copytree(tmp_path / "kept", old)
    (old / "state.json").unlink()
    for name in ("round-000004.part", "round-mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "round-000004.part" / "arrays.safetensors").write_bytes(b"half")
    (tmp_path / "round-notes.txt").write_text("not ours")
    assert load_checkpoint(tmp_path) == (3, {"n": 3})
    saved(tmp_path, {"n": 4}, 4)
    assert load_checkpoint(tmp_path) == (4, {"n": 4})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"kept", "round-000004", "round-mine", "round-notes.txt"}


def test_a_failed_write_leaves_the_former_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, {"n": 1}, 1)

    def full(*_: object) -> None:
        raise OSError("no space left")

    for step in ("os.fsync", "pathlib.Path.rename"):
        with monkeypatch.context() as patched:
            patched.setattr(step, full)
            with pytest.raises(OSError, match="no space left"):
                saved(tmp_path, {"n": 2}, 2)
        assert load_checkpoint(tmp_path) == (1, {"n": 1})
    saved(tmp_path, {"n": 2}, 2)
    assert load_checkpoint(tmp_path) == (2, {"n": 2})
