"""`fedloop client`: the two folders that one client's training leaves, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from fedloop.cli import run as fed_commands
from fedloop.client.training import (
    LocalTraining,
    LoRASettings,
    attach_lora,
    load_base,
    local_steps,
    read_adapter,
)
from fedloop.data.files import read_file
from loraprobe.adapters.deltas import factor_delta
from loraprobe.adapters.layout import pack
from loraprobe.adapters.load import load_adapter
from tests.helpers import tiny
from tests.helpers.boxed import invoke


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("lm") / "tiny [/]")


def client_data(path: Path) -> Path:
    path.write_text(
        "".join(
            json.dumps({"instruction": f"Count to {n}.", "response": str(n)}) + "\n"
            for n in range(4)
        )
    )
    return path


def test_client_trains_and_its_two_folders_make_a_delta(base: Path, tmp_path: Path) -> None:
    data, out = client_data(tmp_path / "d.jsonl"), tmp_path / "[red]out[/red]"
    options = [
        "--steps",
        2,
        "--batch-size",
        2,
        "--r",
        2,
        "--alpha",
        4,
        "--lr",
        0.01,
        *"--module q_proj --module v_proj --seed".split(),
        7,
        "--base-name",
        "org/base",
    ]
    shown = invoke("client", base, data, *options, "--out", out, app=fed_commands.app).stdout
    assert f"read 4 rows of {data} as fedloop: instruction, response\n" in shown
    assert f"wrote {out / 'initial'} and {out / 'adapter'}\n" in shown
    after, before = load_adapter(out / "adapter"), load_adapter(out / "initial")
    assert after.base_model == before.base_model == "org/base"
    delta = factor_delta(after, before)
    assert {module.rpartition(".")[2] for module in delta} == {"q_proj", "v_proj"}
    assert all(
        pair.rank == 2 and pair.scaling == 2.0 and not before[module].B.any() and pair.B.any()
        for module, pair in delta.items()
    )

    causal_lm, tokenizer = load_base(str(base))  # the same by the library's functions
    model = attach_lora(causal_lm, LoRASettings(2, 4, target_modules=("q_proj", "v_proj")), seed=7)
    start = read_adapter(model)
    assert torch.equal(pack(start)[0], pack(before)[0])
    steps = list(
        local_steps(
            model,
            tokenizer,
            read_file(data).examples,
            start,
            LocalTraining(lr=0.01, steps=2, batch_size=2),
            seed=7,
        )
    )
    assert torch.equal(pack(steps[-1].delta)[0], pack(delta)[0])
    assert re.findall(r"step (\d): loss (\S+)", shown) == [
        (str(step.index), f"{step.loss:.4f}") for step in steps
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "nowhere [/]"}, r"DataError: cannot load the base model .*nowhere \[/\]"),
        ({"data": "absent [/].jsonl"}, r"ConfigError: got source .*absent \[/\]\.jsonl"),
        ({"data": "empty.jsonl"}, "DataError: .*empty.jsonl holds no row"),
        ({"data": "wrong.jsonl"}, r"DataError: .*wrong\.jsonl, line 1"),
        ({"module": "[/]"}, r"DataError: cannot put a LoRA on the model: .*\[/\]"),
    ],
)
def test_client_says_what_is_wrong(
    base: Path, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    (tmp_path / "nowhere [/]").mkdir(parents=True)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text("{}\n")
    client_data(tmp_path / "d.jsonl")
    model = tmp_path / change["base"] if "base" in change else base
    data, module = tmp_path / change.get("data", "d.jsonl"), change.get("module", "q_proj")
    result = invoke(
        "client",
        model,
        data,
        "-o",
        tmp_path / "out",
        "--module",
        module,
        "--steps",
        1,
        code=2,
        app=fed_commands.app,
    )
    # behind transformers' progress bar
    assert re.match(message, result.stderr.splitlines()[-1]), result.stderr
    assert not (tmp_path / "out" / "adapter").exists()
