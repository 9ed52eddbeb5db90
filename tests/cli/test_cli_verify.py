"""`verify` measures what a card claims; commands name their commit and never write over a file."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from fedloop.example import write_adapters
from loraprobe import Probe
from tests.helpers.boxed import invoke

ROOT = Path(__file__).resolve().parents[2]
CLAIM = {"protocol": "mine", "metric": "AUROC", "value": 0.95, "low": 0.9, "high": 1.0, "n": 9}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's adapters below benign/ and malicious/, and the other way round; a probe."""
    place = tmp_path_factory.mktemp("place")
    write_adapters(place / "adapters")
    for name in ("train.csv", "held-out.csv"):
        with (place / "adapters" / name).open(newline="") as file:
            for row in csv.DictReader(file):
                other = {"benign": "malicious", "malicious": "benign"}[row["label"]]
                for folder, label in (("right", row["label"]), ("swapped", other)):
                    copy = place / folder / label / row["path"]
                    shutil.copytree(place / "adapters" / row["path"], copy)
    probe = Probe.from_pretrained(ROOT / "zoo/probes/chat-1m/invariant")
    probe.with_facts(metrics=[CLAIM]).save_pretrained(place / "probe")
    return place


@pytest.mark.parametrize(
    ("on", "code", "finding"), [("right", 0, "holds"), ("swapped", 3, "contradicted")]
)
def test_a_claim_holds_or_is_contradicted_by_labelled_adapters(
    place: Path, on: str, code: int, finding: str
) -> None:
    shown = invoke("verify", place / "probe", "--on", place / on, code=code).stdout
    assert "claimed by the publisher" in shown
    assert finding in shown
    asked = ("verify", place / "probe", "--on", place / on, "--json")
    found = json.loads(invoke(*asked, code=code).stdout)
    assert [claim["finding"] for claim in found["claims"]] == [finding]
    assert found["report"]["n"] == 51
    assert found["digest"] == Probe.from_pretrained(place / "probe").digest


def test_verify_wants_something_to_verify_by(place: Path) -> None:
    assert "neither --on nor --key" in invoke("verify", place / "probe", code=2).stderr


@pytest.mark.parametrize(
    "command",
    [
        "train {place}/adapters/train.csv --out {taken}",
        "card {place}/probe --out {file}",
        "leave-out {place}/adapters/train.csv source --out {file}",
        "scan {place}/adapters --out {file}",
        "scan {place}/adapters --save-reference {file}",
        "report {place}/adapters --out {file}",
        "pull org/name --out {taken}",
        "zoo pull name --out {taken}",
        "train {place}/adapters/train.csv --out {file}/below",
        "scan {place}/adapters --cache {file}/below",
        "report {place}/adapters --out {taken} --force",
    ],
)
def test_no_command_writes_where_something_is(place: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("mine")
    words = command.format(place=place, taken=tmp_path, file=tmp_path / "file").split()
    assert "OutputError" in invoke(*words, code=2).stderr
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_force_writes_over_it(place: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    invoke("card", place / "probe", "--out", tmp_path / "README.md", "--force")
    assert (tmp_path / "README.md").read_text() != "mine"
