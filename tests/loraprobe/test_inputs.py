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

from fedloop import Defense
from fedloop.plugins import defend_round
from fedloop.plugins.replies import GlobalState, LoRAOptions
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta, factor_delta
from loraprobe.adapters.load import load_adapter, save_adapter
from loraprobe.cli import probes as commands
from loraprobe.errors import LoraprobeError
from loraprobe.probe import Probe
from loraprobe.serve.scoring import Question, Scorer
from loraprobe.serve.settings import Settings
from loraprobe.serve.slices import read_whole, save_whole
from tests.helpers import make, probes
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
    "not finite": (edited(B=torch.full((10, 4), torch.nan)), "NaN or inf"),
    "one factor": ({A_KEY: make.tensors()[A_KEY]}, f"{Q}: only lora_A is there"),
    "DoRA": (make.tensors() | {f"{Q}.lora_magnitude_vector": torch.ones(10)}, "this is DoRA"),
    "bias": (make.tensors() | {f"{Q}.lora_B.bias": torch.ones(10)}, "this is a LoRA bias"),
    "embedding": (renamed("lora_A.weight", "lora_embedding_A"), "this adapts an embedding"),
    "whole module": (make.tensors() | {"lm_head.weight": torch.ones(2, 2)}, "a whole trained"),
    "fused experts": (renamed("self_attn.q_proj", "mlp.experts"), "fused experts"),
    "fused, nested": (renamed("q_proj", "experts.base_layer"), "fused experts"),
    "torchtune": (renamed(".lora_A", ".lora_a"), "torchtune"),
    "mlx-lm": (renamed(".lora_A.weight", ".lora_a"), "mlx-lm"),
    "kohya": (renamed(A_KEY, "lora_unet_mid_block_attn.lora_down.weight"), "kohya"),
    "diffusers": (renamed("base_model.model.model", "unet.mid_block"), "diffusers"),
}
WAYS: dict[str, Callable[[Path, Tensors], Adapter]] = {
    "python": lambda path, tensors: read(make.folder(path, tensors)),
    "command line": lambda path, tensors: inspected(make.folder(path, tensors)),
    "state dict": lambda path, tensors: finite(Adapter.from_state_dict(tensors, alpha=8)),
    "http": lambda path, tensors: read_whole(saved(tensors), "weights", alpha=8),
    "defend_round": lambda path, tensors: GlobalState(tensors, LoRAOptions.of(8, {})).adapter,
}


def saved(tensors: Tensors) -> bytes:
    data: bytes = safetensors.numpy.save({name: t.numpy() for name, t in tensors.items()})
    return data


def finite(adapter: Adapter) -> Adapter:
    adapter.check_finite()
    return adapter


def read(path: Path) -> Adapter:
    return finite(load_adapter(path))


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


TOOLS = Path(__file__).resolve().parents[1] / "data" / "tools"  # make.py there wrote them
FOREIGN = {
    "mlx-lm/adapters.safetensors": "mlx-lm; its matrices are the other way round",
    "torchtune-own/adapter_0.safetensors": "a name of torchtune; let torchtune's checkpointer",
    "diffusers/pytorch_lora_weights.safetensors": "a name of diffusers; it adapts an image model",
    "kohya/lora.safetensors": "a name of kohya-ss sd-scripts; it adapts an image model",
}


def given_alpha(path: Path) -> Adapter:
    result = CliRunner().invoke(commands.app, ["inspect", str(path), "--alpha", "4"])
    if result.exit_code:
        raise LoraprobeError(result.stderr.replace("\n", " "))
    return load_adapter(path, alpha=4)


@pytest.mark.parametrize("name", FOREIGN)
def test_what_another_tool_wrote_is_refused_by_the_tools_name(name: str) -> None:
    path = TOOLS / name
    tensors = safetensors.numpy.load_file(path)
    for way in (
        lambda: load_adapter(path, alpha=4),
        lambda: given_alpha(path),
        lambda: Adapter.from_state_dict(tensors, alpha=4),
        lambda: read_whole(path.read_bytes(), "weights", alpha=4),
        lambda: GlobalState(torch_of(tensors), LoRAOptions.of(4, {})),
    ):
        with pytest.raises(LoraprobeError, match=FOREIGN[name]):
            way()


def torch_of(tensors: dict[str, Any]) -> Tensors:
    return {key: torch.from_numpy(array) for key, array in tensors.items()}


def same_product(adapter: Adapter, tool: str) -> None:
    expected = safetensors.numpy.load_file(TOOLS / tool / "product.safetensors")
    assert adapter.keys() == expected.keys()
    for module, pair in adapter.items():
        np.testing.assert_allclose(pair.dense(), expected[module], atol=1e-4)


def test_what_torchtunes_checkpointer_wrote_is_what_it_adds() -> None:
    path = TOOLS / "torchtune"
    tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    same_product(inspected(path), "torchtune")
    body = (path / "adapter_model.safetensors").read_bytes()
    same_product(read_whole(body, "weights", alpha=4), "torchtune")
    same_product(Adapter.from_state_dict(tensors, alpha=4), "torchtune")
    same_product(GlobalState(torch_of(tensors), LoRAOptions.of(4, {})).adapter, "torchtune")


def test_what_mlx_lm_wrote_is_what_it_adds_once_converted_as_the_message_says() -> None:
    config = json.loads((TOOLS / "mlx-lm" / "adapter_config.json").read_text())
    given = safetensors.numpy.load_file(TOOLS / "mlx-lm" / "adapters.safetensors")
    converted = {
        "base_model.model."
        + name.replace(".lora_a", ".lora_A.weight").replace(".lora_b", ".lora_B.weight"): array.T
        for name, array in given.items()
    }
    stated = config["lora_parameters"]
    alpha = stated["scale"] * stated["rank"]
    same_product(Adapter.from_state_dict(converted, alpha=alpha), "mlx-lm")


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
    "pickle by name": (
        lambda path: path.rename(path.with_suffix(".bin")).write_bytes(b"x"),
        "pick",
    ),
    "Git LFS by that name": (lambda path: lfs(path.rename(path.with_suffix(".bin"))), "git lfs"),
    "safetensors by that name": (lambda path: path.rename(path.with_suffix(".bin")), "rename it"),
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
    "configuration above": (deeper, "in .*/deep: move it up here, beside adapter_config.json"),
    "nested": (
        lambda path: (deeper(path), (path.parent / "adapter_config.json").unlink()),
        "adapters lie deeper. Give one of .*/deep",
    ),
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
    for way in (load_adapter, inspected):
        with pytest.raises(LoraprobeError, match=says):
            way(tmp_path)
    body = tmp_path / "adapter_model.safetensors"
    if body.is_file() and name != "two files":
        with pytest.raises(LoraprobeError, match=says):
            read_whole(body.read_bytes(), "weights", alpha=8)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_mean_another_adapter_are_refused(name: str, tmp_path: Path) -> None:
    fields, says = CONFIGS[name]
    with pytest.raises(LoraprobeError, match=says):
        inspected(make.folder(tmp_path, make.tensors(), **fields))


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    data = saved(make.tensors())
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    padded = (
        (0x0280 + 0x10000).to_bytes(8, "little") + header.ljust(0x10280) + data[8 + len(header) :]
    )
    path = make.folder(tmp_path, make.tensors()) / "adapter_model.safetensors"
    path.write_bytes(padded)
    assert load_adapter(tmp_path).keys() == read_whole(padded, "weights", alpha=8).keys()


START = probes.initial({"r": 2, "base_model": probes.BASE})
TRAINED = add_delta(START, probes.labelled_adapter(9000, malicious=True))
OTHER = make.adapter(r=2, seed=5, base_model=probes.BASE)
FACTORS: dict[str, tuple[Adapter, bool]] = {
    "as trained": (TRAINED, True),
    "rotated": (make.with_pairs(TRAINED, {m: make.gauged(p) for m, p in TRAINED.items()}), False),
    "another start": (OTHER, False),
}


def scored(adapter: Adapter, path: Path, probe: Any) -> float:
    [verdict] = probe.verdicts([factor_delta(adapter, START)])
    return float(verdict.score)


def scored_by_command(adapter: Adapter, path: Path, probe: Any) -> float:
    places = [save_adapter(one, path / name) for one, name in ((adapter, "a"), (START, "start"))]
    options = ["--probe", str(probe.save_pretrained(path / "probe")), "--base", str(places[1])]
    result = CliRunner().invoke(commands.app, ["score", str(places[0]), *options, "--json"])
    [entry] = json.loads(result.stdout)["results"]
    if entry["verdict"] == "error":
        raise LoraprobeError(entry["reason"])
    return float(entry["score"])


def scored_by_service(adapter: Adapter, path: Path, probe: Any) -> float:
    scorer = Scorer(Settings({"p": probe}, base=START))
    return float(scorer(save_whole(adapter), Question(("p",))).results[0].score)


def scored_in_a_round(adapter: Adapter, path: Path, probe: Any) -> float:
    sent = {"c": (10, adapter.state_dict())}
    done = defend_round(Defense(probe, "client"), 1, sent, START.state_dict(), alpha=4)
    if "c" not in done.record.scores:
        assert done.record.factors["c"] == 0
        raise LoraprobeError(done.record.reasons["c"])
    return float(done.record.scores["c"][-1])


@pytest.mark.parametrize(
    "way",
    [scored, scored_by_command, scored_by_service, scored_in_a_round],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("recipe", ["all_b", "spectral"])
@pytest.mark.parametrize("name", FACTORS)
def test_a_probe_of_factors_scores_only_what_started_where_it_knows(
    name: str, recipe: str, way: Callable[[Adapter, Path, Any], float], tmp_path: Path
) -> None:
    adapter, known = FACTORS[name]
    probe = probes.tiny_probe("linear", recipe)
    if known:
        assert way(adapter, tmp_path, probe) == pytest.approx(scored(adapter, tmp_path, probe))
        return
    with pytest.raises(LoraprobeError, match="points elsewhere"):
        way(adapter, tmp_path, probe)


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
    with pytest.raises(LoraprobeError, match="no file or folder 'runs/goof'; there is a folder"):
        Probe.from_pretrained("runs/goof")
    assert json.loads((tmp_path / "runs" / "good" / "adapter_config.json").read_text())["r"] == 4
