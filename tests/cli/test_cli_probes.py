"""The commands that make and look at probes and adapters.

Train, evaluate, inspect, zoo list.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from loraprobe import evaluate, fit_probe
from loraprobe.adapters.load import load_adapter, save_adapter
from loraprobe.featurizer import FeatureRecipe
from loraprobe.manifest import read_labelled, read_manifest
from loraprobe.probe import Probe
from tests.helpers import make, probes
from tests.helpers.boxed import invoke, scores

MEASURED = re.compile(r"[01]\.\d{3} \[[01]\.\d{3}, [01]\.\d{3}\]")


def compared(shown: str) -> dict[str, str]:
    """Detector -> AUROC with its interval, from what `train` prints."""
    lines = [line.split("\u2502") for line in shown.splitlines() if line.startswith("\u2502")]
    return {cells[1].strip(): cells[2].strip() for cells in lines}


def test_a_trained_probe_is_saved_and_scores(box: Path, tmp_path: Path) -> None:
    out = tmp_path / "[red]p[/red]"
    shown = invoke(
        *("train", box / "m.csv", "--out", out, "--base", "fresh", "--recipe", "all_b"),
        *("--threshold", "0.6", "--seed", 3),
    ).stdout
    assert f"saved to {out}\n" in shown
    rows = compared(shown)
    assert [name for name, measure in rows.items() if MEASURED.fullmatch(measure)] == [
        "this probe (linear)",
        "norm_only",
        "cosine",
    ]
    assert rows["a_only"] == "needs --base with an adapter, not fresh"
    assert rows["this probe (linear)"].startswith("1.000 ")
    probe, own = Probe.from_pretrained(out), read_manifest(box / "m.csv")
    assert (probe.threshold, probe.base_model, probe.featurizer.layout.kind) == (
        0.6,
        probes.BASE,
        "factor_delta",
    )
    assert (
        probe.facts["training"]
        | {"n": 20, "n_malicious": 10, "n_groups": 20, "seed": 3, "head": "linear"}
        == probe.facts["training"]
    )
    deltas = read_labelled(own, "factor_delta", "fresh")
    fitted = fit_probe(
        deltas,
        [row.label for row in own],
        recipe="all_b",
        groups=[row.group for row in own],
        threshold=0.6,
        seed=3,
    )
    np.testing.assert_array_equal(probe(deltas), fitted(deltas))
    assert [
        row["verdict"]
        for row in scores(out, box / "benign0", box / "malicious0", code=3, options=["-b", "fresh"])
    ] == ["benign", "malicious"]


def test_train_takes_a_recipe_in_json_and_a_budget(box: Path, tmp_path: Path) -> None:
    recipe = '{"layers": [1], "factors": ["B"], "modules": ["q_proj"]}'
    options = (
        "--kind",
        "weights",
        "--recipe",
        recipe,
        *"--threshold fpr:0.2 --calibration platt".split(),
    )
    rows = compared(invoke("train", box / "m.csv", "-o", tmp_path, *options).stdout)
    assert list(rows) == ["this probe (linear)", "norm_only", "a_only", "cosine"]
    assert all(MEASURED.fullmatch(measure) for measure in rows.values())
    probe = Probe.from_pretrained(tmp_path)
    assert probe.featurizer.recipe == FeatureRecipe(
        layers=(1,), factors=("B",), modules=("q_proj",)
    )
    assert probe.calibration is not None
    assert probe.facts["training"]["threshold_rule"] == "fpr:0.2"


def test_train_by_kind_leaves_kinds_of_data_out(box: Path, tmp_path: Path) -> None:
    rows = (box / "m.csv").read_text().splitlines()
    places = [row.split(",")[0] for row in rows[1:]]
    labels = ["malicious" if "malicious" in place else "benign" for place in places]
    kinds = [f"{label[0]}{number % 3}" for number, label in enumerate(labels)]
    manifest = box / "kinds.csv"
    manifest.write_text(
        "path,label,source\n"
        + "".join(",".join(row) + "\n" for row in zip(places, labels, kinds, strict=True))
    )
    options = (
        "--base",
        "fresh",
        "--head",
        "mass_mean",
        "--by-kind",
        "--threshold",
        "fpr:0.2",
        "--calibration",
        "platt",
    )
    shown = invoke("train", manifest, "-o", tmp_path / "p", *options).stdout
    assert "out of kind" in " ".join(shown.split())
    training = Probe.from_pretrained(tmp_path / "p").facts["training"]
    assert training["kinds"] == len(set(kinds))
    assert training["head"] == "mass_mean"
    manifest.write_text(
        "path,label\n" + "".join(",".join(row) + "\n" for row in zip(places, labels, strict=True))
    )
    refused = invoke("train", manifest, "-o", tmp_path / "q", *options, code=2)
    assert "kinds of data need a column source" in " ".join(refused.stderr.split())


def test_evaluate_reports_what_the_library_does(box: Path, tmp_path: Path) -> None:
    printed = json.loads(
        invoke(
            "evaluate",
            box / "m.csv",
            "-p",
            box / "of factor_delta",
            "--base",
            "fresh",
            "--seed",
            2,
            "--json",
        ).stdout
    )
    rows = read_manifest(box / "m.csv")
    expected = evaluate(
        Probe.from_pretrained(box / "of factor_delta"),
        read_labelled(rows, "factor_delta", "fresh"),
        [row.label for row in rows],
        [row.group for row in rows],
        by=[row.source for row in rows],
        seed=2,
    )
    assert printed == json.loads(json.dumps(expected.to_dict()))
    assert (printed["n"], printed["auroc"]) == (20, 1.0)
    assert "auroc" in invoke("evaluate", box / "m.csv", "-p", box / "of weights").stdout.lower()
    with_other = tmp_path / "m.csv"
    with_other.write_text(f"path,label\n{box / 'other base'},0\n{box / 'malicious0'},1\n")
    assert "--any-base" in invoke("evaluate", with_other, "-p", box / "of weights", code=2).stderr
    assert (
        json.loads(
            invoke("evaluate", with_other, "-p", box / "of weights", "--any-base", "--json").stdout
        )["n"]
        == 2
    )


@pytest.mark.parametrize("base", [None, "later"])
def test_inspect_prints_the_norms_of_the_dense_matrix(box: Path, base: str | None) -> None:
    options = ["--base", box / base] if base else []
    shown = invoke("inspect", box / "malicious0", *options).stdout
    rows = [
        [cell.strip() for cell in line.strip("\u2502\n").split("\u2502")]
        for line in shown.splitlines()
        if line.startswith("\u2502")
    ]
    after, before = load_adapter(box / "malicious0"), load_adapter(box / "later")
    assert [row[0] for row in rows] == list(after)
    for module, shape, rank, *measures, spectrum in rows:
        dense = after[module].dense().astype(float)
        if base:
            dense = dense - before[module].dense().astype(float)
        values = np.linalg.svd(dense, compute_uv=False)
        share = values[values > 1e-5] / values.sum()
        length = np.linalg.norm(dense)
        expected = [
            length,
            values[0],
            (length / values[0]) ** 2,
            math.exp(-(share * np.log(share)).sum()),
        ]
        assert (shape, rank) == (f"{dense.shape[0]}x{dense.shape[1]}", "4" if base else "2")
        assert [float(measure) for measure in measures] == pytest.approx(expected, rel=5e-3)
        assert [float(value) for value in spectrum.split()] == pytest.approx(
            values[: int(rank)].tolist(), rel=0.06
        )


def test_inspect_shows_a_line_a_layer_of_many_modules_in_their_order(tmp_path: Path) -> None:
    one = make.adapter(layers=17)
    save_adapter(one, tmp_path / "a")
    short = invoke("inspect", tmp_path / "a").stdout
    rows = [re.findall(r"[^\u2502\s]+", line) for line in short.splitlines() if "\u2502" in line]
    assert [row[0] for row in rows if row[0].isdecimal()] == [str(layer) for layer in range(17)]
    [first] = [row for row in rows if row[0] == "0"]
    length = math.hypot(*(one[make.module(name)].norm() for name in make.DIMS))
    assert first[1:4] == ["2", "4", f"{length:.4g}"]
    assert "34 modules; a line each with --all" in short
    whole = invoke("inspect", tmp_path / "a", "--all").stdout
    assert re.findall(r"layers\.(\d+)\.", whole) == [str(n // 2) for n in range(34)]


def test_inspect_has_no_change_since_a_fresh_start(box: Path) -> None:
    assert (
        "--base with an adapter"
        in invoke("inspect", box / "benign0", "--base", "fresh", code=2).stderr
    )


def test_zoo_list_shows_the_probes_of_a_folder(box: Path, tmp_path: Path) -> None:
    lying = Probe.from_pretrained(box / "of weights").with_facts(
        name="[/]", headline="[/] 0.9", head="[red]"
    )
    lying.save_pretrained(tmp_path / "[red]b[/red]" / "b")
    lying.save_pretrained(tmp_path / "[red]b[/red]" / "[b]")
    (tmp_path / "[red]b[/red]" / "no probe").mkdir()
    listed = json.loads(invoke("zoo", "list", tmp_path / "[red]b[/red]", "--json").stdout)
    assert [(entry["name"], entry["head"], entry["base_model"]) for entry in listed] == [
        ("[b]", "linear", probes.BASE),
        ("b", "linear", probes.BASE),
    ]
    shown = invoke("zoo", "list", tmp_path / "[red]b[/red]").stdout
    assert all(
        text in shown for text in ("[b]", "[/] 0.9", probes.BASE, "slices of B, layers all", "0.5")
    )
    assert "ProbeFormatError: no probe in" in invoke("zoo", "list", tmp_path, code=2).stderr
    config = tmp_path / "[red]b[/red]" / "b" / "config.json"
    config.write_text(config.read_text()[:-2])
    assert str(config) in invoke("zoo", "list", tmp_path / "[red]b[/red]", code=2).stderr
