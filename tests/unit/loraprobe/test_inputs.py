"""docs/inputs.md: input x way in -> answer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from typer.testing import CliRunner

from fedloop.plugins.replies import GlobalState, LoRAOptions
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta
from loraprobe.adapters.load import load_adapter
from loraprobe.cli import probes as commands
from loraprobe.errors import LoraprobeError
from loraprobe.serve.slices import read_whole
from tests.helpers import make
from tests.helpers.one_module import A_KEY, B_KEY, Q

Tensors = dict[str, torch.Tensor]


def edited(B: torch.Tensor) -> Tensors:
    return make.tensors() | {B_KEY: B}


def renamed(old: str, new: str) -> Tensors:
    return {key.replace(old, new): tensor for key, tensor in make.tensors().items()}


TENSORS: dict[str, tuple[Tensors, str | None]] = {
    "plain": (make.tensors(), None),
    "wrapped twice": (renamed("base_model.model.", "base_model.model.base_model.model."), None),
    "compiled": (renamed("base_model.model.", "module._orig_mod.base_model.model."), None),
    "empty": (edited(B=torch.zeros(0)), rf"{Q}, lora_B: got the empty shape .* ZeRO-3"),
    "integers": (edited(B=torch.zeros(10, 4, dtype=torch.int8)), "got dtype"),
    "another rank": (edited(B=torch.zeros(10, 3)), f"{Q}: got A of shape"),
    "fused experts": (renamed("self_attn.q_proj", "mlp.experts"), "fused experts"),
    "fused, nested": (renamed("q_proj", "experts.base_layer"), "fused experts"),
    "torchtune": (renamed(".lora_A", ".lora_a"), "torchtune"),
    "mlx-lm": (renamed(".lora_A.weight", ".lora_a"), "mlx-lm"),
    "kohya": (renamed(A_KEY, "lora_unet_mid_block_attn.lora_down.weight"), "kohya"),
    "diffusers": (renamed("base_model.model.model", "unet.mid_block"), "diffusers"),
}
WAYS: dict[str, Callable[[Path, Tensors], Adapter]] = {
    "python": lambda path, tensors: load_adapter(make.folder(path, tensors)),
    "command line": lambda path, tensors: inspected(make.folder(path, tensors)),
    "state dict": lambda path, tensors: Adapter.from_state_dict(tensors, alpha=8),
    "http": lambda path, tensors: read_whole(saved(tensors), "weights", alpha=8),
    "defend_round": lambda path, tensors: GlobalState(tensors, LoRAOptions.of(8, {})).adapter,
}


def saved(tensors: Tensors) -> bytes:
    data: bytes = safetensors.numpy.save({name: t.numpy() for name, t in tensors.items()})
    return data


def inspected(path: Path) -> Adapter:
    """The adapter, after the command has shown it; what the command refuses is raised."""
    result = CliRunner().invoke(commands.app, ["inspect", str(path)])
    if result.exit_code:
        raise LoraprobeError(result.stderr.replace("\n", " "))
    return load_adapter(path)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_get_one_answer_in_every_way_in(name: str, way: str, tmp_path: Path) -> None:
    tensors, says = TENSORS[name]
    if says is None:
        got = WAYS[way](tmp_path, tensors)
        for module, pair in make.adapter().items():
            assert np.array_equal(got[module].B, pair.B)
        return
    with pytest.raises(LoraprobeError, match=says):
        WAYS[way](tmp_path, tensors)


def lfs(path: Path) -> Any:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def deeper(path: Path) -> None:
    (path.parent / "deep").mkdir()
    path.rename(path.parent / "deep" / path.name)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "Git LFS": (lfs, "git lfs pull"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "web page"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF\3" + bytes(99)), "GGUF"),
    "zip": (lambda path: path.write_bytes(b"PK\3\4" + bytes(99)), "zip archive"),
    "torch": (lambda path: torch.save(make.tensors(), path), "a pickle, which can run code"),
    "nothing": (lambda path: path.write_bytes(b""), "empty"),
    "dangling": (lambda path: (path.unlink(), os.symlink("gone", path)), "link to gone"),
    "two files": (
        lambda path: path.with_suffix(".bin").write_bytes(b"x"),
        "adapter_model.bin beside",
    ),
    "shards": (
        lambda path: path.rename(path.with_name("adapter_model-00001-of-00002.safetensors")),
        "1 shards of it",
    ),
    "another name": (lambda path: path.rename(path.with_name("x.safetensors")), "x.safetensors"),
    "nested": (deeper, "adapters lie deeper. Give one of .*/deep"),
    "gone": (lambda path: path.unlink(), "only adapter_config.json"),
}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unselected": ({"target_modules": ["v_proj"]}, "2 modules that adapter_config.json does not"),
    "unselected layers": ({"layers_to_transform": [1]}, f"does not select .*{Q}"),
    "excluded": ({"exclude_modules": ".*q_proj"}, f"does not select .*{Q}"),
    "text for a number": ({"lora_alpha": "8"}, "got alpha '8'"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "acts on the tokens after these only"),
    "moved base": ({"init_lora_weights": "pissa"}, "took part of the base's weights away"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_something_else_are_named(name: str, tmp_path: Path) -> None:
    spoil, says = FILES[name]
    spoil(make.folder(tmp_path, make.tensors()) / "adapter_model.safetensors")
    for read in (load_adapter, inspected):
        with pytest.raises(LoraprobeError, match=says):
            read(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_mean_another_adapter_are_refused(name: str, tmp_path: Path) -> None:
    fields, says = CONFIGS[name]
    with pytest.raises(LoraprobeError, match=says):
        inspected(make.folder(tmp_path, make.tensors(), **fields))


@pytest.mark.parametrize(
    ("init", "zero"),
    [(True, True), ("gaussian", True), ("eva", True), ("orthogonal", False), (False, False)],
)
def test_a_start_that_was_not_zero_has_to_be_given(init: Any, zero: bool, tmp_path: Path) -> None:
    adapter = load_adapter(make.folder(tmp_path, make.tensors(), init_lora_weights=init))
    assert adapter.zero_start is zero
    assert factor_delta(adapter, make.adapter()).kind == "factor_delta"
    if zero:
        assert factor_delta(adapter, None).kind == "factor_delta"
        return
    with pytest.raises(LoraprobeError, match=r"B did not start at zero .* pass the start"):
        factor_delta(adapter, None)


def test_a_mistyped_path_is_said_before_the_network_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make.folder(tmp_path / "runs" / "good", make.tensors())
    with pytest.raises(LoraprobeError, match="no file or folder 'runs/goof'; there is a folder"):
        load_adapter("runs/goof")
    assert json.loads((tmp_path / "runs" / "good" / "adapter_config.json").read_text())["r"] == 4
