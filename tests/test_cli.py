"""The two commands: exit codes, typed errors as rows, what is written, and that names from files are shown as they are."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import make
import numpy as np
import probes
import pytest
import tiny
import torch
from typer.testing import CliRunner

from fedloop import commands as fed_commands
from fedloop.data import read_jsonl
from fedloop.local import LocalTraining, LoRASettings, attach_lora, load_base, local_steps, read_adapter
from loraprobe import commands, commands_hub
from loraprobe import embed as embedding
from loraprobe.adapter import Adapter, factor_delta, pack
from loraprobe.embed import load_coordinates
from loraprobe.featurizer import FeatureRecipe
from loraprobe.manifest import read_labelled, read_manifest
from loraprobe.pair import LoRAPair
from loraprobe.peft_io import load_adapter
from loraprobe.probe import Probe, evaluate, fit_probe

ROOT = Path(__file__).resolve().parent.parent
PEFT = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": probes.BASE}
PIP_LINE = r"pip install 'loraprobe\[cli\]'"


def save(path: Path, adapter: Adapter, **config: Any) -> Path:
    """A PEFT folder with an adapter of `probes`."""
    return make.folder(path, make.tensors(adapter), **{**PEFT, **config})


def changed(adapter: Adapter, **factors: Any) -> Adapter:
    """The adapter with A or B of every module passed through a function."""
    same = {"A": lambda tensor: tensor, "B": lambda tensor: tensor, **factors}
    return Adapter({module: LoRAPair(same["A"](pair.A), same["B"](pair.B), pair.scaling) for module, pair in adapter.items()})


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, math.nan)


@cache
def weights() -> probes.Labelled:
    """Ten benign and ten malicious adapters, of ten clients each."""
    return probes.labelled(20, 1, kind="weights")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters, good and bad, a manifest of the good ones, and a fitted probe per kind."""
    box = tmp_path_factory.mktemp("box")
    lines = ["path,label,group,source"]
    for number, (adapter, label, group) in enumerate(zip(*weights(), strict=True)):
        name = f"{('benign', 'malicious')[label]}{number // 2}"
        save(box / name, adapter)
        lines.append(f"{name},{label},{group},{('gsm8k', 'refusal_short')[number % 4 // 2] if not label else 'gptfuzz'}")
    (box / "m.csv").write_text("\n".join(lines) + "\n")
    first = weights().adapters[0]
    save(box / "start", changed(first, B=torch.zeros_like))
    save(box / "blank", changed(first, B=torch.zeros_like))
    save(box / "later", changed(first, B=lambda tensor: 0.5 * tensor))
    save(box / "nan", changed(first, B=nan))
    save(box / "other base", first, base_model_name_or_path="other/base")
    save(box / "one layer", Adapter({module: pair for module, pair in first.items() if ".0." in module}))
    copy = changed(first, A=torch.clone, B=torch.clone)
    save(box / "more layers", Adapter({**first, **{module.replace(".0.", ".7."): pair for module, pair in copy.items()}}))
    save(box / "[red]x[/red]", first)
    save(box / "cut", first)
    file = box / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    for kind in ("weights", "factor_delta"):
        adapters = weights().adapters if kind == "weights" else [factor_delta(adapter, None) for adapter in weights().adapters]
        fit_probe(adapters, weights().labels, "linear", FeatureRecipe.all_b(), weights().groups, threshold=0.5).save_pretrained(box / f"of {kind}")
    return box


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for console in (commands.console, fed_commands.console):
        monkeypatch.setattr(console, "width", 1000)


def invoke(*arguments: object, code: int = 0, app: Any = commands_hub.app) -> Any:
    """Run the command in this process, without letting an exception pass for an exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def scores(probe: Path, *adapters: object, code: int = 0, options: Sequence[object] = ()) -> list[dict[str, Any]]:
    """The rows of `score --json`; its own exit code must be the process's."""
    printed = json.loads(invoke("score", *adapters, "--probe", probe, "--json", *options, code=code).stdout)
    assert printed["exit_code"] == code
    assert printed["probe"] == str(probe)
    assert [row["adapter"] for row in printed["results"]] == [str(adapter) for adapter in adapters]
    rows: list[dict[str, Any]] = printed["results"]
    return rows


# --- score ---------------------------------------------------------------------------------------

B, M, BLANK, BAD = "benign0", "malicious0", "blank", "nan"


@pytest.mark.parametrize(
    ("names", "code"),
    [
        ([B], 0), ([B, "benign1"], 0), ([M], 3), ([BLANK], 4), ([BAD], 2), ([B, M], 3), ([M, B], 3), ([B, BLANK], 4), ([BAD, B], 2),
        ([BLANK, BAD], 2), ([BAD, BLANK], 2), ([BAD, M], 3), ([M, BLANK], 3), ([BLANK, BAD, B, M], 3),
    ],
)  # fmt: skip
def test_the_gravest_verdict_is_the_exit_code(box: Path, names: list[str], code: int) -> None:
    adapters = [box / name for name in names]
    verdicts = {B: "benign", "benign1": "benign", M: "malicious", BLANK: "inconclusive", BAD: "error"}
    assert [row["verdict"] for row in scores(box / "of weights", *adapters, code=code)] == [verdicts[name] for name in names]
    table = invoke("score", *adapters, "-p", box / "of weights", code=code).stdout
    assert all(str(adapter) in table and verdicts[name] in table for adapter, name in zip(adapters, names, strict=True))


def test_scores_are_those_of_the_probe(box: Path) -> None:
    names = [path for path in sorted(box.iterdir()) if path.name[:-1] in ("benign", "malicious")]
    assert len(names) == 20
    expected = Probe.from_pretrained(box / "of weights")([load_adapter(path) for path in names])
    got = scores(box / "of weights", *names, code=3)
    assert [row["score"] for row in got] == pytest.approx(expected.tolist(), rel=1e-12)
    assert [row["verdict"] for row in got] == [path.name[:-1] for path in names]
    assert len(set(expected.tolist())) == 20


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nan", "NonFiniteError: .*NaN or infinite"),
        ("other base", "BaseModelMismatch: .*'other/base'.*--any-base"),
        ("one layer", "LayoutMismatch: .*lacks 2 of 4 modules"),
        ("more layers", "LayoutMismatch: "),
        ("cut", "AdapterFormatError: .*damaged or incomplete"),
        ("absent", "AdapterFormatError: no file or folder"),
        ("m.csv", "AdapterFormatError: "),
        ("x" * 300, "OSError: .*name too long"),
    ],
)
def test_an_adapter_that_cannot_be_scored_is_a_row_with_its_error(box: Path, name: str, reason: str) -> None:
    first, bad, last = scores(box / "of weights", box / "benign0", box / name, box / "malicious0", code=3)
    assert (first["verdict"], last["verdict"]) == ("benign", "malicious")
    assert (bad["verdict"], bad["score"]) == ("error", None)
    assert re.match(reason, bad["reason"]), bad["reason"]
    assert reason.split(":")[0] in invoke("score", box / name, "-p", box / "of weights", code=2).stdout


def test_another_base_model_is_scored_when_asked(box: Path) -> None:
    other, same = scores(box / "of weights", box / "other base", box / "benign0", options=["--any-base"])
    assert other["score"] == same["score"]


def test_a_bare_file_needs_alpha(box: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((box / "benign0" / "adapter_model.safetensors").read_bytes())
    [row] = scores(box / "of weights", bare, code=2)
    assert "pass alpha=" in row["reason"]
    [row] = scores(box / "of weights", bare, options=["--alpha", 4])
    assert row["score"] == scores(box / "of weights", box / "benign0")[0]["score"]
    [row] = scores(box / "of weights", bare, code=2, options=["--alpha", 8])  # another scaling than in training
    assert row["reason"].startswith("LayoutMismatch")


def test_a_probe_of_deltas_asks_for_the_start(box: Path) -> None:
    probe = box / "of factor_delta"
    [row] = scores(probe, box / "benign0", code=2)
    assert re.match(r"DataError: .*factor_delta.*--base .*adapter that training started from.*--base fresh", row["reason"])
    [fresh] = scores(probe, box / "benign0", options=["--base", "fresh"])
    [start] = scores(probe, box / "benign0", options=["--base", box / "start"])
    assert fresh["score"] == start["score"]  # the start's B is zero, and the probe reads B
    [later] = scores(probe, box / "malicious0", code=3, options=["-b", box / "later"])
    assert later["score"] != scores(probe, box / "malicious0", code=3, options=["-b", "fresh"])[0]["score"]
    [same] = scores(probe, box / "benign0", code=4, options=["--base", box / "benign0"])
    assert "nothing that the probe reads has changed" in same["reason"]


@pytest.mark.parametrize("base", ["fresh", "start", "absent"])
def test_a_probe_of_weights_refuses_a_start_instead_of_ignoring_it(box: Path, base: str) -> None:
    source = base if base == "fresh" else box / base
    result = invoke("score", box / "benign0", "-p", box / "of weights", "--base", source, "--json", code=2)
    assert result.stdout == ""
    assert re.match(rf"KindMismatch: got --base .*{base}.*'weights'.*Leave --base out", result.stderr)


def test_a_base_that_cannot_be_read_ends_the_run(box: Path) -> None:
    result = invoke("score", box / "benign0", "-p", box / "of factor_delta", "--base", box / "absent", code=2)
    assert result.stdout == ""
    assert "AdapterFormatError" in result.stderr


def test_an_unreadable_probe_is_one_line_on_stderr(box: Path) -> None:
    result = invoke("score", box / "benign0", "-p", box / "no [/] probe", "--json", code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert re.match(r"ProbeFormatError: no config\.json in .*no \[/\] probe", result.stderr)


def test_progress_of_many_adapters_stays_off_stdout(box: Path) -> None:
    many = [box / "benign0"] * 25
    assert len(scores(box / "of weights", *many)) == 25
    assert "scoring" not in invoke("score", *many, "-p", box / "of weights").stdout


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False)


def test_a_process_of_its_own_returns_the_exit_code(box: Path) -> None:
    """Names that are no UTF-8, and a narrow pipe without UTF-8, included."""
    odd = os.fsdecode(b"no\xffname")
    arguments = ["score", str(box / "benign0"), str(box / "malicious0"), odd, "-p", str(box / "of weights")]
    done = run("-m", "loraprobe.cli", *arguments, "--json", PYTHONIOENCODING="ascii")
    assert done.returncode == 3, done.stderr
    assert [row["verdict"] for row in json.loads(done.stdout)["results"]] == ["benign", "malicious", "error"]
    assert done.stderr == ""


# --- names that look like markup, or worse ---------------------------------------------------------


def test_markup_and_control_characters_in_names_are_shown(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = box / "of weights"
    names = [box / "[red]x[/red]", box / "[/]", box / "a\x1b[31mb", box / ":skull:"]
    assert [row["verdict"] for row in scores(probe, *names, code=2)] == ["benign", "error", "error", "error"]
    table = invoke("score", *names, "-p", probe, code=2).stdout
    for name in ("[red]x[/red]", "[/]", r"a\x1b[31mb", ":skull:"):
        assert f"{box}/{name} " in table
    assert "\x1b" not in table
    monkeypatch.setattr(commands.console, "width", 80)
    folded = re.sub(r"[\s\u2502]", "", invoke("score", *names, "-p", probe, code=2).stdout)
    assert "[red]" in folded  # no name is cut short in a narrow terminal
    assert "\u2026" not in folded


def test_names_inside_an_adapter_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    def inspected(module: str, base: str, code: int = 0) -> Any:
        tensors = {f"base_model.model.model.layers.0.{module}.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}
        path = make.folder(tmp_path / "[bold]a", tensors, r=2, base_model_name_or_path=base, fan_in_fan_out=True)
        result = invoke("inspect", path, code=code)
        assert "\x1b" not in result.output
        return result

    shown = inspected("[/]", "[/bold]").stdout
    assert "model.layers.0.[/]" in shown
    assert "base_model='[/bold]'" in shown
    assert "left out, without effect on the adapter: fan_in_fan_out" in shown
    for module, base in (("[/]\x1b[2J", "base"), ("q", "[/]\x1b[2J")):
        assert r"[/]\x1b[2J" in inspected(module, base, code=2).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed", "m.csv", "--out", "x.npz", "--base", "fresh", "--method", "[/]"),
        ("embed", "m.csv", "--out", "x.npz", "--base", "fresh", "--recipe", "[/]"),
        ("embed", "m.csv", "--out", "no such [/] folder/x.npz", "--base", "fresh", "--method", "pca"),
        ("train", "m.csv", "--out", "x", "--kind", "[/]", "--base", "fresh"),
        ("train", "m.csv", "--out", "x", "--head", "[/]", "--base", "fresh"),
        ("train", "m.csv", "--out", "x", "--threshold", "[/]", "--base", "fresh"),
        ("evaluate", "[/].csv", "--probe", "of weights"),
        ("inspect", "[/]"),
        ("zoo", "list", "[/]"),
    ],
)
def test_what_was_asked_for_stands_in_the_message(box: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.chdir(box)
    result = invoke(*arguments, code=2)
    assert re.match(r"[A-Za-z]+Error: .*\[/\]", result.stderr), result.stderr
    assert not (box / "x").exists()
    assert not (box / "x.npz").exists()


# --- train, evaluate, embed, inspect, zoo ----------------------------------------------------------


MEASURED = re.compile(r"[01]\.\d{3} \[[01]\.\d{3}, [01]\.\d{3}\]")


def compared(shown: str) -> dict[str, str]:
    """Detector -> AUROC with its interval, from what `train` prints."""
    lines = [line.split("\u2502") for line in shown.splitlines() if line.startswith("\u2502")]
    return {cells[1].strip(): cells[2].strip() for cells in lines}


def test_a_trained_probe_is_saved_and_scores(box: Path, tmp_path: Path) -> None:
    out = tmp_path / "[red]p[/red]"
    shown = invoke("train", box / "m.csv", "--out", out, "--base", "fresh", "--threshold", "0.6", "--seed", 3).stdout
    assert f"saved to {out}\n" in shown
    rows = compared(shown)
    assert [name for name, measure in rows.items() if MEASURED.fullmatch(measure)] == ["this probe (linear)", "norm_only", "cosine"]
    assert rows["a_only"] == "needs --base with an adapter, not fresh"
    assert rows["this probe (linear)"].startswith("1.000 ")
    probe, own = Probe.from_pretrained(out), read_manifest(box / "m.csv")
    assert (probe.threshold, probe.base_model, probe.featurizer.layout.kind) == (0.6, probes.BASE, "factor_delta")
    assert probe.facts["training"] | {"n": 20, "n_malicious": 10, "n_groups": 20, "seed": 3, "head": "linear"} == probe.facts["training"]
    deltas = read_labelled(own, "factor_delta", "fresh")
    fitted = fit_probe(deltas, [row.label for row in own], "linear", FeatureRecipe.all_b(), [row.group for row in own], 0.6, 3)
    np.testing.assert_array_equal(probe(deltas), fitted(deltas))
    assert [row["verdict"] for row in scores(out, box / "benign0", box / "malicious0", code=3, options=["-b", "fresh"])] == ["benign", "malicious"]


def test_train_takes_a_recipe_in_json_and_a_budget(box: Path, tmp_path: Path) -> None:
    recipe = '{"layers": [1], "factors": ["B"], "modules": ["q_proj"]}'
    options = ("--kind", "weights", "--recipe", recipe, "--threshold", "fpr:0.2", "--calibration", "platt")
    rows = compared(invoke("train", box / "m.csv", "-o", tmp_path, *options).stdout)
    assert list(rows) == ["this probe (linear)", "norm_only", "a_only", "cosine"]
    assert all(MEASURED.fullmatch(measure) for measure in rows.values())
    probe = Probe.from_pretrained(tmp_path)
    assert probe.featurizer.recipe == FeatureRecipe(layers=(1,), factors=("B",), modules=("q_proj",))
    assert probe.calibration is not None
    assert probe.facts["training"]["threshold_rule"] == "fpr:0.2"


def test_evaluate_reports_what_the_library_does(box: Path, tmp_path: Path) -> None:
    printed = json.loads(invoke("evaluate", box / "m.csv", "-p", box / "of factor_delta", "--base", "fresh", "--seed", 2, "--json").stdout)
    rows = read_manifest(box / "m.csv")
    expected = evaluate(
        Probe.from_pretrained(box / "of factor_delta"), read_labelled(rows, "factor_delta", "fresh"), [row.label for row in rows],
        [row.group for row in rows], by=[row.source for row in rows], seed=2,
    )  # fmt: skip
    assert printed == json.loads(json.dumps(expected.to_dict()))
    assert (printed["n"], printed["auroc"]) == (20, 1.0)
    assert "auroc" in invoke("evaluate", box / "m.csv", "-p", box / "of weights").stdout.lower()
    with_other = tmp_path / "m.csv"
    with_other.write_text(f"path,label\n{box / 'other base'},0\n{box / 'malicious0'},1\n")
    assert "--any-base" in invoke("evaluate", with_other, "-p", box / "of weights", code=2).stderr
    assert json.loads(invoke("evaluate", with_other, "-p", box / "of weights", "--any-base", "--json").stdout)["n"] == 2


def test_embed_writes_coordinates_and_a_figure(box: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    out, figure = tmp_path / "[/]" / "c.npz", tmp_path / "[red]f[/red].png"
    for path in (out, figure):
        path.parent.mkdir(parents=True)
    shown = invoke("embed", box / "m.csv", "-o", out, "--base", "fresh", "--method", "pca", "--figure", figure, "--seed", 4).stdout
    assert shown == f"wrote {out}\nwrote {figure}\n"
    got, rows = load_coordinates(out), read_manifest(box / "m.csv")
    assert (got.labels.tolist(), got.sources.tolist(), got.method, got.seed) == ([row.label for row in rows], [row.source for row in rows], "pca", 4)
    malicious = got.labels == 1
    assert abs(got.coordinates[malicious, 0].mean() - got.coordinates[~malicious, 0].mean()) > 2 * got.coordinates[malicious, 0].std()
    pixels = (255 * image.imread(figure)[..., :3]).astype(int)
    assert min(pixels.shape[:2]) > 300
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    saturated = np.ptp(colours, axis=1) > 80  # neither paper, ink nor grey: the points of the coloured sources
    assert counts[saturated].sum() > 200
    assert 0.5 < counts.max() / counts.sum() < 0.99


def test_embed_passes_on_what_was_asked_for(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pca, asked = embedding.embed, []

    def recording(features: np.ndarray, method: str, *, seed: int) -> np.ndarray:  # UMAP itself takes seconds to import
        asked.append((features.shape, method, seed))
        return pca(features, "pca")

    monkeypatch.setattr(embedding, "embed", recording)
    invoke("embed", box / "m.csv", "-o", tmp_path / "c.npz", "--base", box / "start", "--seed", 4, "--recipe", "norm_only")
    got = load_coordinates(tmp_path / "c.npz")
    assert (asked, got.method, got.seed) == ([((20, 40), "umap", 4)], "umap", 4)


@pytest.mark.parametrize("base", [None, "later"])
def test_inspect_prints_the_norms_of_the_dense_matrix(box: Path, base: str | None) -> None:
    options = ["--base", box / base] if base else []
    shown = invoke("inspect", box / "malicious0", *options).stdout
    rows = [[cell.strip() for cell in line.strip("\u2502\n").split("\u2502")] for line in shown.splitlines() if line.startswith("\u2502")]
    after, before = load_adapter(box / "malicious0"), load_adapter(box / "later")
    assert [row[0] for row in rows] == list(after)
    for module, shape, rank, *measures, spectrum in rows:
        dense = after[module].dense().double().numpy()
        if base:
            dense = dense - before[module].dense().double().numpy()
        values = np.linalg.svd(dense, compute_uv=False)
        share = values[values > 1e-5] / values.sum()
        length = np.linalg.norm(dense)
        expected = [length, values[0], (length / values[0]) ** 2, math.exp(-(share * np.log(share)).sum())]
        assert (shape, rank) == (f"{dense.shape[0]}x{dense.shape[1]}", "4" if base else "2")
        assert [float(measure) for measure in measures] == pytest.approx(expected, rel=5e-3)
        assert [float(value) for value in spectrum.split()] == pytest.approx(values[: int(rank)].tolist(), rel=0.06)


def test_inspect_has_no_change_since_a_fresh_start(box: Path) -> None:
    assert "--base with an adapter" in invoke("inspect", box / "benign0", "--base", "fresh", code=2).stderr


def test_zoo_list_shows_the_probes_of_a_folder(box: Path, tmp_path: Path) -> None:
    lying = Probe.from_pretrained(box / "of weights").with_facts(name="[/]", headline="[/] 0.9", head="[red]")
    lying.save_pretrained(tmp_path / "[red]b[/red]" / "b")
    lying.save_pretrained(tmp_path / "[red]b[/red]" / "[b]")
    (tmp_path / "[red]b[/red]" / "no probe").mkdir()
    listed = json.loads(invoke("zoo", "list", tmp_path / "[red]b[/red]", "--json").stdout)
    assert [(entry["name"], entry["head"], entry["base_model"]) for entry in listed] == [
        ("[b]", "linear", probes.BASE),
        ("b", "linear", probes.BASE),
    ]
    shown = invoke("zoo", "list", tmp_path / "[red]b[/red]").stdout
    assert all(text in shown for text in ("[b]", "[/] 0.9", probes.BASE, "slices of B, layers all", "0.5"))
    assert "ProbeFormatError: no probe in" in invoke("zoo", "list", tmp_path, code=2).stderr
    config = tmp_path / "[red]b[/red]" / "b" / "config.json"
    config.write_text(config.read_text()[:-2])
    assert str(config) in invoke("zoo", "list", tmp_path / "[red]b[/red]", code=2).stderr


# --- fedloop -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("lm") / "tiny [/]")


def client_data(path: Path) -> Path:
    path.write_text("".join(json.dumps({"instruction": f"Count to {n}.", "response": str(n)}) + "\n" for n in range(4)))
    return path


def test_client_trains_and_its_two_folders_make_a_delta(base: Path, tmp_path: Path) -> None:
    data, out = client_data(tmp_path / "d.jsonl"), tmp_path / "[red]out[/red]"
    options = ["--steps", 2, "--batch-size", 2, "--r", 2, "--alpha", 4, "--lr", 0.01, "--module", "q_proj", "--module", "v_proj", "--seed", 7]
    shown = invoke("client", base, data, *options, "--out", out, app=fed_commands.app).stdout
    assert f"wrote {out / 'initial'} and {out / 'adapter'}\n" in shown
    after, before = load_adapter(out / "adapter"), load_adapter(out / "initial")
    assert after.base_model == before.base_model == str(base)
    delta = factor_delta(after, before)
    assert {module.rpartition(".")[2] for module in delta} == {"q_proj", "v_proj"}
    assert all(pair.rank == 2 and pair.scaling == 2.0 and not before[module].B.any() and pair.B.any() for module, pair in delta.items())

    causal_lm, tokenizer = load_base(str(base))  # the same by the library's functions
    model = attach_lora(causal_lm, LoRASettings(2, 4, target_modules=("q_proj", "v_proj")), seed=7)
    start = read_adapter(model)
    assert torch.equal(pack(start)[0], pack(before)[0])
    steps = list(local_steps(model, tokenizer, read_jsonl(data), start, LocalTraining(lr=0.01, steps=2, batch_size=2), seed=7))
    assert torch.equal(pack(steps[-1].delta)[0], pack(delta)[0])
    assert re.findall(r"step (\d): loss (\S+)", shown) == [(str(step.index), f"{step.loss:.4f}") for step in steps]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "nowhere [/]"}, r"DataError: cannot load the base model .*nowhere \[/\]"),
        ({"data": "absent [/].jsonl"}, r"DataError: no such data file: .*absent \[/\]\.jsonl"),
        ({"data": "empty.jsonl"}, "DataError: got no training examples"),
        ({"data": "wrong.jsonl"}, r"DataError: .*wrong\.jsonl, line 1"),
        ({"module": "[/]"}, r"DataError: cannot put a LoRA on the model: .*\[/\]"),
    ],
)
def test_client_says_what_is_wrong(base: Path, tmp_path: Path, change: dict[str, str], message: str) -> None:
    (tmp_path / "nowhere [/]").mkdir(parents=True)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text("[]\n")
    client_data(tmp_path / "d.jsonl")
    model = tmp_path / change["base"] if "base" in change else base
    data, module = tmp_path / change.get("data", "d.jsonl"), change.get("module", "q_proj")
    result = invoke("client", model, data, "-o", tmp_path / "out", "--module", module, "--steps", 1, code=2, app=fed_commands.app)
    assert re.match(message, result.stderr.splitlines()[-1]), result.stderr  # behind transformers' progress bar
    assert not (tmp_path / "out" / "adapter").exists()


# --- starting up -------------------------------------------------------------------------------------

HELP = """
import sys
from {package}.cli import main
sys.argv = ["{package}", *{arguments!r}]
try:
    main()
except SystemExit as leaving:
    assert not leaving.code, leaving.code
heavy = {{"torch", "numpy", "scipy", "sklearn", "safetensors", "transformers", "peft", "huggingface_hub", "matplotlib", "umap", "xgboost"}}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("loraprobe", ["--help"]), ("loraprobe", ["push", "--help"]), ("fedloop", ["--help"]), ("fedloop", ["run", "--help"])],
)
def test_help_is_quick_and_imports_nothing_heavy(package: str, arguments: list[str]) -> None:
    seconds = []
    for _ in range(3):
        before = os.times()
        done = run("-c", HELP.format(package=package, arguments=arguments))
        after = os.times()  # the processor's time, not the clock's: other work on the machine is not the command's fault
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0, done.stderr
        assert "Usage:" in done.stdout
        assert done.stderr == "[]\n"
        if seconds[-1] < 1.0:
            break
    assert min(seconds) < 1.0, seconds


BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from {package}.cli import main
main()
"""


@pytest.mark.parametrize(("package", "blocked"), [("loraprobe", "typer"), ("loraprobe", "rich"), ("fedloop", "typer"), ("fedloop", "rich")])
def test_without_the_cli_extra_the_command_says_how_to_get_it(package: str, blocked: str) -> None:
    done = run("-c", BLOCKED.format(package=package, blocked=[blocked]))
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"The {package} command needs {blocked}, which is not installed: {PIP_LINE}\n", done.stderr)
