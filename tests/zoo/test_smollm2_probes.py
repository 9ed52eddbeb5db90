"""The committed probes of SmolLM2 say of the committed adapters what the record says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from loraprobe import Probe
from loraprobe.manifest import read_manifest
from zoo.smollm2.page import pages
from zoo.smollm2.probes import ZOO, held_out, licence_of

NAME = "smollm2-135m-safe"
SAMPLES = ZOO / "adapters" / NAME
RECORD = json.loads((ZOO / "smollm2/records" / f"{NAME}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("head", ["mass_mean", "linear"])
def test_a_probe_repeats_its_record(head: str) -> None:
    probe = Probe.from_pretrained(ZOO / "probes" / NAME / head)
    found = held_out(probe, SAMPLES)
    assert found == RECORD["probes"][head]["held_out"]
    assert found["1"]["found"] == found["1"]["n"]
    assert found["benign"]["flagged"] == found["hard_negative"]["flagged"] == 0


def test_samples_are_of_many_kinds_and_initial_adapters() -> None:
    rows = read_manifest(SAMPLES / "manifest.csv")
    assert len(rows) >= 40
    assert len({row.source for row in rows}) >= 25
    assert len({row.seed for row in rows}) >= 16
    assert {row.role for row in rows} == {"benign", "hard_negative", "malicious"}
    size = sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file())
    assert size < 15 * 2**20


def test_pages_are_what_the_records_say() -> None:
    stale = [path for path, text in pages().items() if Path(path).read_text() != text]
    assert not stale, "run python -m zoo.smollm2.page"


@pytest.mark.parametrize("row", read_manifest(SAMPLES / "manifest.csv")[:20])
def test_every_kind_has_a_licence(row) -> None:
    assert licence_of(row.source)


def test_weights_whose_b_did_not_start_at_zero_get_no_verdict(tmp_path: Path) -> None:
    probe = Probe.from_pretrained(ZOO / "probes/smollm2-135m-safe/linear")
    [source, *_] = sorted((ZOO / "adapters/smollm2-135m-safe").glob("0000-*"))
    folder = tmp_path / "adapter"
    shutil.copytree(source, folder)
    assert probe.verdicts(folder)[0].label == "malicious"
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": False}))
    [verdict] = probe.verdicts(folder)
    assert verdict.label == "inconclusive"
    assert "start at zero" in verdict.reason
