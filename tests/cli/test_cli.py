"""The `score` command: exit codes, typed errors as rows, and that names from files are shown as
they are.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from loraprobe.adapters.load import load_adapter
from loraprobe.cli import commands
from loraprobe.probe import Probe
from tests.helpers import make
from tests.helpers.boxed import invoke, run, scores

B, M, BLANK, BAD = "benign0", "malicious0", "blank", "nan"


@pytest.mark.parametrize(
    ("names", "code"),
    [
        ([B], 0),
        ([M], 3),
        ([BLANK], 4),
        ([BAD], 2),
        ([B, BLANK], 4),
        ([BAD, B], 2),
        ([BAD, M], 3),
        ([M, BLANK], 3),
        ([BLANK, BAD, B, M], 3),
    ],
)
def test_the_gravest_verdict_is_the_exit_code(box: Path, names: list[str], code: int) -> None:
    adapters = [box / name for name in names]
    verdicts = {
        B: "benign",
        "benign1": "benign",
        M: "malicious",
        BLANK: "inconclusive",
        BAD: "error",
    }
    assert [row["verdict"] for row in scores(box / "of weights", *adapters, code=code)] == [
        verdicts[name] for name in names
    ]
    table = invoke("score", *adapters, "-p", box / "of weights", code=code).stdout
    assert all(
        str(adapter) in table and verdicts[name] in table
        for adapter, name in zip(adapters, names, strict=True)
    )


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
        ("one layer", "LayoutMismatch: .*selects 2 modules that the file does not hold"),
        ("more layers", "LayoutMismatch: "),
        ("cut", "AdapterFormatError: .*damaged, incomplete"),
        ("absent", "AdapterFormatError: no file or folder"),
        ("m.csv", "AdapterFormatError: "),
        ("x" * 300, "AdapterFormatError: no file or folder"),
    ],
)
def test_an_adapter_that_cannot_be_scored_is_a_row_with_its_error(
    box: Path, name: str, reason: str
) -> None:
    first, bad, last = scores(
        box / "of weights", box / "benign0", box / name, box / "malicious0", code=3
    )
    assert (first["verdict"], last["verdict"]) == ("benign", "malicious")
    assert (bad["verdict"], bad["score"]) == ("error", None)
    assert re.match(reason, bad["reason"]), bad["reason"]
    assert (
        reason.split(":")[0] in invoke("score", box / name, "-p", box / "of weights", code=2).stdout
    )


def test_another_base_model_is_scored_when_asked(box: Path) -> None:
    other, same = scores(
        box / "of weights", box / "other base", box / "benign0", options=["--any-base"]
    )
    assert other["score"] == same["score"]


def test_a_bare_file_needs_alpha(box: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((box / "benign0" / "adapter_model.safetensors").read_bytes())
    [row] = scores(box / "of weights", bare, code=2)
    assert "pass alpha" in row["reason"]
    [row] = scores(box / "of weights", bare, options=["--alpha", 4, "--any-base"])
    assert row["score"] == scores(box / "of weights", box / "benign0")[0]["score"]
    # another scaling than in training
    [row] = scores(box / "of weights", bare, code=2, options=["--alpha", 8])
    assert row["reason"].startswith("LayoutMismatch")


def test_a_probe_of_deltas_asks_for_the_start(box: Path) -> None:
    probe = box / "of factor_delta"
    [row] = scores(probe, box / "benign0", code=2)
    assert re.match(
        r"DataError: .*factor_delta.*--base .*adapter that training started from.*--base fresh",
        row["reason"],
    )
    [fresh] = scores(probe, box / "benign0", options=["--base", "fresh"])
    [start] = scores(probe, box / "benign0", options=["--base", box / "start"])
    assert fresh["score"] == start["score"]  # the start's B is zero, and the probe reads B
    [later] = scores(probe, box / "malicious0", code=3, options=["-b", box / "later"])
    assert (
        later["score"]
        != scores(probe, box / "malicious0", code=3, options=["-b", "fresh"])[0]["score"]
    )
    [same] = scores(probe, box / "benign0", code=4, options=["--base", box / "benign0"])
    assert "nothing that the probe reads has changed" in same["reason"]


@pytest.mark.parametrize("base", ["fresh", "start", "absent"])
def test_a_probe_of_weights_refuses_a_start_instead_of_ignoring_it(box: Path, base: str) -> None:
    source = base if base == "fresh" else box / base
    result = invoke(
        "score", box / "benign0", "-p", box / "of weights", "--base", source, "--json", code=2
    )
    assert result.stdout == ""
    assert re.match(
        rf"KindMismatch: got --base .*{base}.*'weights'.*Leave --base out", result.stderr
    )


def test_a_base_that_cannot_be_read_ends_the_run(box: Path) -> None:
    result = invoke(
        "score", box / "benign0", "-p", box / "of factor_delta", "--base", box / "absent", code=2
    )
    assert result.stdout == ""
    assert "AdapterFormatError" in result.stderr


def test_an_unreadable_probe_is_one_line_on_stderr(box: Path) -> None:
    result = invoke("score", box / "benign0", "-p", box / "no [/] probe", "--json", code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert re.match(r"ProbeFormatError: .*no \[/\] probe does not exist; expected", result.stderr)


def test_a_process_of_its_own_returns_the_exit_code(box: Path) -> None:
    """Names that are no UTF-8, and a narrow pipe without UTF-8, included."""
    odd = os.fsdecode(b"no\xffname")
    arguments = [
        "score",
        str(box / "benign0"),
        str(box / "malicious0"),
        odd,
        "-p",
        str(box / "of weights"),
    ]
    done = run("-m", "loraprobe.cli.main", *arguments, "--json", PYTHONIOENCODING="ascii")
    assert done.returncode == 3, done.stderr
    assert [row["verdict"] for row in json.loads(done.stdout)["results"]] == [
        "benign",
        "malicious",
        "error",
    ]
    assert done.stderr == ""


# --- names that look like markup, or worse
# ---------------------------------------------------------


def test_markup_and_control_characters_in_names_are_shown(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = box / "of weights"
    names = [box / "[red]x[/red]", box / "[/]", box / "a\x1b[31mb", box / ":skull:"]
    assert [
        row["verdict"] for row in scores(probe, *names, code=2)
    ] == "benign error error error".split()
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
        tensors = {
            f"base_model.model.model.layers.0.{module}.lora_{factor}.weight": torch.ones(2, 2)
            for factor in "AB"
        }
        path = make.folder(
            tmp_path / "[bold]a", tensors, r=2, base_model_name_or_path=base, fan_in_fan_out=True
        )
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
        ("train", "m.csv", "--out", "x", "--kind", "[/]", "--base", "fresh"),
        ("train", "m.csv", "--out", "x", "--head", "[/]", "--base", "fresh"),
        ("evaluate", "[/].csv", "--probe", "of weights"),
        ("inspect", "[/]"),
        ("zoo", "list", "[/]"),
    ],
)
def test_what_was_asked_for_stands_in_the_message(
    box: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(box)
    result = invoke(*arguments, code=2)
    assert re.match(r"[A-Za-z]+Error: .*\[/\]", result.stderr), result.stderr
    assert not (box / "x").exists()
    assert not (box / "x.npz").exists()
