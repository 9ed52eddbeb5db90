"""The zoo's leave-one-out results.

Their manifest is the design's, and a committed number comes out again.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from loraprobe.errors import DataError
from loraprobe.manifest import read_labelled, read_manifest
from loraprobe.study.leave_out import RECIPES, detectors_of, leave_one_out
from zoo.build import ADAPTERS, SAMPLE, SAMPLE_SEED, ZOO
from zoo.labelled.client_design import plan
from zoo.labelled.held_out import DESIGNED, write_designed
from zoo.leave_out import OUT, RUNS, page

RESULTS = sorted(path.stem for path in OUT.glob("*.json"))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_manifest_is_what_the_design_says(tmp_path: Path) -> None:
    made = table(write_designed(plan(SAMPLE, SAMPLE_SEED), ZOO / ADAPTERS, tmp_path / "made"))
    kept = table(OUT / DESIGNED)
    assert [{**row, "path": Path(row["path"]).name, "initial": ""} for row in made] == [
        {**row, "path": Path(row["path"]).name, "initial": ""} for row in kept
    ]
    assert all(
        row.path.is_dir() and row.initial == OUT / ".." / ADAPTERS / "initial"
        for row in read_manifest(OUT / DESIGNED)
    )
    assert len(kept) == 212
    with pytest.raises(
        DataError, match="has other clients than the design; expected the 211 that it plans"
    ):
        write_designed(plan(SAMPLE, SAMPLE_SEED)[1:], ZOO / ADAPTERS, tmp_path / "other")


def test_the_linear_probe_on_unseen_learning_rates_comes_out_again() -> None:
    rows = read_manifest(OUT / DESIGNED)
    adapters = read_labelled(rows, "factor_delta", None)
    [linear] = [
        one for one in detectors_of(["linear"], {"all_b": RECIPES["all_b"]}) if not one.is_baseline
    ]
    report = leave_one_out(adapters, rows, "lr", [linear], cuts=("fpr:0.05", 0.8)).to_dict()
    kept = json.loads((OUT / "lr.json").read_text())["outcomes"]
    expected = [
        row
        for row in kept
        if (row["detector"], row["recipe"], row["baseline"]) == ("linear", "all_b", False)
    ]
    assert [row["left_out"] for row in report["outcomes"]] == [row["left_out"] for row in expected]
    for mine, theirs in zip(report["outcomes"], expected, strict=True):
        assert mine["auroc"] == pytest.approx(theirs["auroc"], abs=1e-3)
        assert (mine["n"], mine["n_malicious"], mine["n_hard_negative"]) == (
            theirs["n"],
            theirs["n_malicious"],
            theirs["n_hard_negative"],
        )


def test_the_page_is_that_of_the_results() -> None:
    assert (OUT / "README.md").read_text(encoding="utf-8") == page()
    assert set(RESULTS) <= set(RUNS)
