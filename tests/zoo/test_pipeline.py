"""The stages that make a probe of one initial adapter: what they write, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fedloop.client.training import LocalTraining
from loraprobe import Probe
from loraprobe.errors import DataError
from loraprobe.manifest import read_labelled, read_manifest
from tests.helpers.small_zoo import DESIGN, ENTRY, NAME, made, make
from zoo.labelled import deltas
from zoo.labelled.client_design import Design, plan
from zoo.labelled.records import read_record


def test_a_probe_comes_with_card_record_and_adapters_that_nothing_was_fitted_on() -> None:
    record, probe = read_record(made() / "record.json"), Probe.from_pretrained(made() / "probe")
    assert (record["probe"], record["base_model"], probe.base_model) == (NAME, *["tiny/llama"] * 2)
    rows = read_manifest(made() / "adapters/manifest.csv")
    scores = probe(read_labelled(rows, "factor_delta", made() / "adapters/initial"))
    held_out = record["held_out_clients"]
    malicious = scores[[row.label == 1 for row in rows]]
    assert held_out["tpr"]["flagged"] == sum(malicious >= probe.threshold)
    design = Design.from_dict(record["data"]["design"])
    assert held_out["n"] == len(rows) == len(plan(replace(design, per_source=2)))
    card = (made() / "probe/README.md").read_text()
    assert "malicious and benign source unseen, poison share 50%, replicate 1" in card
    assert "clients that no probe was fitted on, sources seen" in card
    assert "### Instruction" not in json.dumps(record["data"])


def test_the_headline_is_the_worst_cell_of_sources_left_out_over_all_replicates() -> None:
    record = read_record(made() / "record.json")
    assert [replicate["replicate"] for replicate in record["replicates"]] == [0, 1]
    assert record["replicates"][0]["cells"] != record["replicates"][1]["cells"]
    cells = [cell for replicate in record["replicates"] for cell in replicate["cells"]]
    assert {(cell["malicious"], cell["benign"]) for cell in cells} == {
        (malicious, benign) for malicious in DESIGN.malicious for benign in DESIGN.benign
    }
    worst = [
        min(cell["auroc"] for cell in cells if cell["share"] == share) for share in DESIGN.shares
    ]
    headline = Probe.from_pretrained(made() / "probe").facts["headline"]
    assert headline == f"{worst[0]:.2f} / {worst[1]:.2f} at 100% / 50% poison, 2 replicates"


def test_the_same_again_trains_nothing_anew_and_comes_out_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {path: path.read_bytes() for path in made().rglob("*") if path.is_file()}
    monkeypatch.setattr(deltas, "train_clients", None)
    make(made())
    assert {path: path.read_bytes() for path in made().rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lr_range": (1e-3, 2e-3)}, "made from other .*clients"),
        ({"entry": replace(ENTRY, threshold="fpr:0.25")}, "was measured of"),
        ({"training": LocalTraining(1e-3, 50, 2, 48)}, "78 examples; a client holds 100"),
    ],
)
def test_what_cannot_work_or_is_of_another_design_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(deltas, "train_clients", None)
    with pytest.raises(DataError, match=reason):
        make(made(), **change)
