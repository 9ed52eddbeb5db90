"""A folder of adapters, manifest and probes for the tests of the command line, and how they run a
command.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from fedloop.cli import run as fed_commands
from loraprobe import fit_probe
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta
from loraprobe.adapters.pair import LoRAPair
from loraprobe.cli import commands
from tests.helpers import make, probes

ROOT = Path(__file__).resolve().parents[2]
PEFT = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": probes.BASE}


def save(path: Path, adapter: Adapter, **config: Any) -> Path:
    """A PEFT folder with an adapter of `probes`."""
    return make.folder(path, make.tensors(adapter), **{**PEFT, **config})


def changed(adapter: Adapter, **factors: Any) -> Adapter:
    """The adapter with A or B of every module passed through a function."""
    same = {"A": lambda tensor: tensor, "B": lambda tensor: tensor, **factors}
    return Adapter(
        {
            module: LoRAPair(
                *(same[factor](torch.from_numpy(pair.factor(factor))) for factor in "AB"),
                pair.scaling,
            )
            for module, pair in adapter.items()
        }
    )


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, math.nan)


@cache
def weights() -> probes.Labelled:
    """Ten benign and ten malicious adapters, of ten clients each."""
    return probes.labelled(20, 1, kind="weights")


def filled_box(box: Path) -> Path:
    """The folder with adapters, good and bad, a manifest of the good ones, and a fitted probe per
    kind.
    """
    lines = ["path,label,group,source"]
    for number, (adapter, label, group) in enumerate(zip(*weights(), strict=True)):
        name = f"{('benign', 'malicious')[label]}{number // 2}"
        save(box / name, adapter)
        source = "gptfuzz" if label else ("gsm8k", "refusal_short")[number % 4 // 2]
        lines.append(f"{name},{label},{group},{source}")
    (box / "m.csv").write_text("\n".join(lines) + "\n")
    first = weights().adapters[0]
    save(box / "start", changed(first, B=torch.zeros_like))
    save(box / "blank", changed(first, B=torch.zeros_like))
    save(box / "later", changed(first, B=lambda tensor: 0.5 * tensor))
    save(box / "nan", changed(first, B=nan))
    save(box / "other base", first, base_model_name_or_path="other/base")
    save(
        box / "one layer",
        Adapter({module: pair for module, pair in first.items() if ".0." in module}),
    )
    copy = changed(first, A=torch.clone, B=torch.clone)
    save(
        box / "more layers",
        Adapter({**first, **{module.replace(".0.", ".7."): pair for module, pair in copy.items()}}),
    )
    save(box / "[red]x[/red]", first)
    save(box / "cut", first)
    file = box / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    for kind in ("weights", "factor_delta"):
        adapters = (
            weights().adapters
            if kind == "weights"
            else [factor_delta(adapter, None) for adapter in weights().adapters]
        )
        fit_probe(
            adapters, weights().labels, recipe="all_b", groups=weights().groups, threshold=0.5
        ).save_pretrained(box / f"of {kind}")
    return box


def invoke(*arguments: object, code: int = 0, app: Any = commands.app) -> Any:
    """Run the command in this process, without letting an exception pass for an exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fed(*arguments: object, code: int = 0) -> Any:
    """Run a command of `fedloop` in this process."""
    fed_commands.console.width = 200
    return invoke(*arguments, code=code, app=fed_commands.app)


def scores(
    probe: Path, *adapters: object, code: int = 0, options: Sequence[object] = ()
) -> list[dict[str, Any]]:
    """The rows of `score --json`; its own exit code must be the process's."""
    printed = json.loads(
        invoke("score", *adapters, "--probe", probe, "--json", *options, code=code).stdout
    )
    assert printed["exit_code"] == code
    assert printed["probe"] == str(probe)
    assert [row["adapter"] for row in printed["results"]] == [str(adapter) for adapter in adapters]
    rows: list[dict[str, Any]] = printed["results"]
    return rows


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )
