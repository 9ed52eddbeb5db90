"""`loraprobe leave-out`.

What it prints and writes is what the library finds, and what it refuses.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from loraprobe.featurizer import FeatureRecipe
from loraprobe.manifest import read_labelled, read_manifest
from loraprobe.study.leave_out import detectors_of, leave_one_out
from tests.helpers import make, probes
from tests.helpers.boxed import invoke

PEFT = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": probes.BASE}
SOURCES = ("code", "[/]", "theft_safe"), ("theft", "fraud")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty adapters on disk.

    Three benign sources, of which one is of hard negatives, and two malicious ones; every row names
    its start.
    """
    folder = tmp_path_factory.mktemp("labelled")
    start = probes.labelled_adapter(999, signal=0.0, kind="weights", layers=1)
    make.folder(folder / "initial", make.tensors(start), **PEFT)
    rows = []
    for number in range(40):
        label = number % 2
        source = SOURCES[label][number // 2 % len(SOURCES[label])]
        role = "hard_negative" if source.endswith("_safe") else ("benign", "malicious")[label]
        make.folder(
            folder / f"a{number}",
            make.tensors(probes.labelled_adapter(number, bool(label), kind="weights", layers=1)),
            **PEFT,
        )
        row = {
            "path": f"a{number}",
            "label": label,
            "group": f"c{number}",
            "source": source,
            "role": role,
            "lr": 0.001 * (1 + number // 2 % 5),
        }
        rows.append({**row, "initial": "initial"})
    with (folder / "m.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "m.csv"


def test_what_is_printed_and_written_is_what_the_library_finds(
    manifest: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "results.json"
    options = [
        *"--head linear --recipe all_b --cut fpr:0.2 --cut 0.6 --folds".split(),
        3,
        "--seed",
        2,
    ]
    printed = json.loads(
        invoke("leave-out", manifest, "source", *options, "--out", out, "--json").stdout
    )
    rows = read_manifest(manifest)
    expected = leave_one_out(
        read_labelled(rows, "factor_delta", None),
        rows,
        "source",
        detectors_of(["linear"], {"all_b": FeatureRecipe.all_b()}),
        cuts=("fpr:0.2", 0.6),
        folds=3,
        seed=2,
    ).to_dict()
    assert printed == expected
    assert json.loads(out.read_text()) == expected
    assert len(expected["outcomes"]) == 4 * 5
    assert (
        expected["protocol"] | {"n": 40, "n_malicious": 20, "n_hard_negative": 6, "seed": 2}
        == expected["protocol"]
    )
    # a line each
    assert len(out.read_text().splitlines()) == 1 + 2 + 2 + len(expected["summary"]) + 20


def test_the_table_names_detectors_sources_and_what_could_not_be_measured(manifest: Path) -> None:
    shown = invoke(
        "leave-out",
        manifest,
        *"source --head linear --recipe all_b --cut fpr:0.01 --folds".split(),
        2,
    ).stdout
    assert (
        "one source at a time left out; 40 adapters (20 malicious, 6 hard negatives), seed 0"
        in shown
    )
    assert all(
        name in shown
        for name in (
            "linear",
            "norm_only (baseline)",
            "a_only (baseline)",
            "cosine (baseline)",
            "[/]",
            "no such cut",
        )
    )
    assert re.search(
        r"not measured in \d+ of 20 fits: fpr:0\.01: FitError: fpr:0\.01 needs at least 99 benign"
        r" groups",
        shown,
    )
    assert re.search(r"[01]\.\d{3} \[[01]\.\d{3}, [01]\.\d{3}\]", shown)


def test_pairs_recipes_in_json_and_a_start_for_rows_without_one(
    manifest: Path, tmp_path: Path
) -> None:
    without = manifest.parent / "without.csv"
    lines = [line.rpartition(",")[0] for line in manifest.read_text().splitlines()]
    without.write_text("\n".join(lines) + "\n")
    recipe = '{"layers": [0], "factors": ["B"], "modules": ["q_proj"]}'
    options = [*"source --pairs --head linear --recipe".split(), recipe, "--cut", "0.5", "--json"]
    found = json.loads(
        invoke("leave-out", without, *options, "--base", manifest.parent / "initial").stdout
    )
    assert found == json.loads(invoke("leave-out", manifest, *options).stdout)
    assert {row["recipe"] for row in found["outcomes"]} == {recipe}
    pairs = {f"{bad} | {good}" for bad in SOURCES[1] for good in SOURCES[0]}
    assert {row["left_out"] for row in found["outcomes"]} == pairs
    assert "pass --base" in invoke("leave-out", without, *options, code=2).stderr
    fresh = json.loads(invoke("leave-out", without, *options, "--base", "fresh").stdout)
    assert {
        row["error"].split(":")[0] for row in fresh["outcomes"] if row["detector"] == "a_only"
    } == {"KindMismatch"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("[/]",), r"FitError: got '\[/\]' to leave out; expected one of source"),
        (("attack",), "DataError: 20 of 40 rows have no attack, first .*a1;"),
        (("rank",), "FitError: got 1 values of rank"),
        (("source", "--head", "[/]"), r"FitError: got the heads \['\[/\]'\]"),
        (("source", "--recipe", "[/]"), r"RecipeError: got recipe \[/\]"),
        (("source", "--cut", "[/]"), r"FitError: got \[/\]"),
        (("lr", "--edges", "[/]"), r"DataError: got --edges '\[/\]'"),
        (("source", "--calibration", "[/]"), r"FitError: .*\[/\]"),
        (("source", "--kind", "[/]"), r"DataError: .*got kind '\[/\]'"),
    ],
)
def test_what_is_wrong_is_one_line_on_stderr(
    manifest: Path, arguments: tuple[str, ...], says: str
) -> None:
    result = invoke("leave-out", manifest, *arguments, code=2)
    assert result.stdout == ""
    assert re.match(says, result.stderr.replace("\n", " ")), result.stderr
