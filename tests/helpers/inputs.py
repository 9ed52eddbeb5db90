"""Adapters as people have them, and what has to be answered to each: docs/inputs.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta
from loraprobe.adapters.load import save_adapter
from loraprobe.adapters.pair import LoRAPair
from tests.helpers import make, probes
from tests.helpers.one_module import A_KEY, B_KEY, Q

Tensors = dict[str, torch.Tensor]
Answer = Adapter | str | None  # read as this; refused with these words; nothing that can be sent
TOOLS = Path(__file__).resolve().parents[1] / "data" / "tools"  # make.py there wrote them
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = probes.BASE


class Case(NamedTuple):
    """An input and its answers.

    Attributes:
        row: the page's first cell.
        build: writes it into a folder that holds a plain adapter.
        folder, body, state: answers, by the columns of the page.
        but: the answers of single ways that differ from their column's.
        lora: what is said of a body or state dict beside its tensors.
        probe: which one is asked.
    """

    row: str
    build: Callable[[Path], Any]
    folder: Answer
    body: Answer = None
    state: Answer = None
    but: Mapping[str, Answer] = {}
    lora: Mapping[str, Any] = {"alpha": 8.0}
    probe: str = "plain"


def named(pairs: Mapping[str, LoRAPair]) -> Adapter:
    return Adapter(pairs, base_model=BASE)


PLAIN = make.adapter(base_model=BASE)
FIRST = named({m: LoRAPair(p.A, -p.B, p.scaling) for m, p in PLAIN.items() if ".layers.0." in m})
SHORT = named(
    {Q: LoRAPair(PLAIN[Q].A, PLAIN[Q].B, 1.0), **{m: p for m, p in PLAIN.items() if m != Q}}
)
ROTATED = named({module: make.gauged(pair) for module, pair in PLAIN.items()})
START = probes.initial({"r": 2, "base_model": BASE})
TRAINED = add_delta(START, probes.labelled_adapter(9000, malicious=True))
TURNED = make.with_pairs(TRAINED, {m: make.gauged(p) for m, p in TRAINED.items()})
OTHER = make.adapter(r=2, seed=5, base_model=BASE)


def product_of(tool: str) -> Adapter:
    """The adapter whose products are those that the tool itself adds."""
    products = safetensors.torch.load_file(TOOLS / tool / "product.safetensors")
    pairs = {}
    for module, product in products.items():
        left, values, right = np.linalg.svd(product.double().numpy())
        pairs[module] = LoRAPair(right[:2], left[:, :2] * values[:2], 1.0)
    return named(pairs)


def tensors(given: Tensors, row: str, answer: Answer, alpha: float = 8.0, **fields: Any) -> Case:
    """Tensors that get one answer in every way in."""
    fields = {"base_model_name_or_path": BASE, "lora_alpha": alpha, **fields}
    return Case(
        row,
        lambda path: make.folder(path, given, **fields),
        *(answer, answer, answer),
        lora={"alpha": alpha},
    )


def edited(B: torch.Tensor) -> Tensors:
    return make.tensors() | {B_KEY: B}


def renamed(old: str, new: str) -> Tensors:
    return {key.replace(old, new): tensor for key, tensor in make.tensors().items()}


def of_tool(path: str) -> Tensors:
    return safetensors.torch.load_file(TOOLS / path)


def kohya(ending: str) -> Tensors:
    return {f"lora_unet_double_blocks_0_img_attn_qkv.{ending}": torch.ones(2, 2)}


def config(row: str, answer: Answer, *, body: Answer = PLAIN, **fields: Any) -> Case:
    """What only adapter_config.json says: it does not reach who is sent tensors."""
    fields = {"base_model_name_or_path": BASE, **fields}
    return Case(row, lambda path: make.folder(path, make.tensors(), **fields), answer, body, body)


def rewritten(row: str, change: Callable[[bytes], bytes], says: str) -> Case:
    def build(path: Path) -> None:
        (path / CONFIG).write_bytes(change((path / CONFIG).read_bytes()))

    return Case(row, build, says, PLAIN, PLAIN)


def weights(row: str, spoil: Callable[[Path], Any], says: str, body: Answer = None) -> Case:
    """Something else where the weights should be."""
    return Case(row, lambda path: spoil(path / WEIGHTS), says, body)


def lfs(path: Path) -> Any:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def to_bin(path: Path) -> Path:
    return path.rename(path.with_suffix(".bin"))


def deeper(path: Path, *names: str) -> None:
    (path.parent / "deep").mkdir()
    for name in names:
        (path.parent / name).rename(path.parent / "deep" / name)


def whole_model(path: Path) -> None:
    path.rename(path.with_name("model.safetensors"))
    (path.parent / CONFIG).rename(path.with_name("config.json"))


def something(row: str, content: bytes, says: str) -> Case:
    return weights(row, lambda path: path.write_bytes(content), says, says)


def factors(row: str, adapter: Adapter, recipe: str, answer: Answer) -> Case:
    """Beside a start, with a probe that reads factors."""
    build = lambda path: save_adapter(adapter, path)  # noqa: E731
    return Case(row, build, *(answer,) * 3, lora={"alpha": 4.0}, probe=recipe)


EMPTY = "an empty tensor (ZeRO-3), another type or rank, one factor alone"
WHOLE = "DoRA, biases, embeddings, whole modules"
TOOL = "what kohya, diffusers, mlx-lm, or torchtune under its own names write"
TURN = "rotated factors or another initial adapter, and a probe of factors, or of their spectra"
ELSE = "Git LFS pointer, web page, GGUF, zip, pickle, nothing at all"
PLACE = "shards, dangling link, whole model, nested folders, weights below their configuration"
PATTERN = "`rank_pattern`, `alpha_pattern`: names and regular expressions"
HARMLESS = "harmless fields of other tools, `loftq_config` left over, `_notes`"
UNSELECTED = "the file holds modules that the configuration does not select"
FIELD = "`target_parameters`, aLoRA, arrow, an unknown field"
TYPO = "byte order mark, trailing comma, text for a number"
MOVED = "the initialisation changed the base too (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)"
CASES: dict[str, Case] = {
    "plain": tensors(make.tensors(), "plain LoRA of linear layers", PLAIN),
    "wrapped twice": tensors(
        renamed("base_model.model.", "base_model.model.base_model.model."),
        "wrappers: `module.`, `_orig_mod.`, a doubled `base_model.model.`",
        PLAIN,
    ),
    "compiled": tensors(
        renamed("base_model.model.", "module._orig_mod.base_model.model."),
        "wrappers: `module.`, `_orig_mod.`, a doubled `base_model.model.`",
        PLAIN,
    ),
    "empty": tensors(edited(torch.zeros(0)), EMPTY, rf"{Q}, lora_B: got the empty .* ZeRO-3"),
    "integers": tensors(edited(torch.zeros(10, 4, dtype=torch.int8)), EMPTY, "got dtype"),
    "another rank": tensors(edited(torch.zeros(10, 3)), EMPTY, f"{Q}: got A of shape"),
    "one factor": tensors({A_KEY: make.tensors()[A_KEY]}, EMPTY, f"{Q}: only lora_A is there"),
    "not finite": tensors(
        edited(torch.full((10, 4), torch.nan)),
        "NaN or infinity anywhere, also where no probe reads",
        f"{Q}.*NaN or inf",
    ),
    "no effect": tensors(
        {key: 2 * one if "lora_A" in key else 0 * one for key, one in make.tensors().items()},
        "no effect: B A is zero, whatever A is",
        "that the probe reads has changed",
    ),
    "fused experts": tensors(
        renamed("self_attn.q_proj", "mlp.experts"),
        "fused experts (names `experts`, `base_layer`)",
        "fused experts",
    ),
    "fused, nested": tensors(
        renamed("q_proj", "experts.base_layer"),
        "fused experts (names `experts`, `base_layer`)",
        "fused experts",
    ),
    "DoRA": tensors(
        make.tensors() | {f"{Q}.lora_magnitude_vector": torch.ones(10)}, WHOLE, "this is DoRA"
    ),
    "bias": tensors(make.tensors() | {f"{Q}.lora_B.bias": torch.ones(10)}, WHOLE, "a LoRA bias"),
    "embedding": tensors(
        renamed("lora_A.weight", "lora_embedding_A"), WHOLE, "adapts an embedding"
    ),
    "whole module": tensors(
        make.tensors() | {"lm_head.weight": torch.ones(2, 2)}, WHOLE, "a whole trained"
    ),
    "mlx-lm": tensors(
        of_tool("mlx-lm/adapters.safetensors"), TOOL, "mlx-lm; its matrices are the other way round"
    ),
    "torchtune's own": tensors(
        of_tool("torchtune-own/adapter_0.safetensors"),
        TOOL,
        "torchtune; let torchtune's checkpointer",
    ),
    "diffusers": tensors(
        of_tool("diffusers/pytorch_lora_weights.safetensors"),
        TOOL,
        "diffusers; it adapts an image model",
    ),
    "kohya": tensors(
        of_tool("kohya/lora.safetensors"), TOOL, "kohya-ss sd-scripts; it adapts an image"
    ),
    **{
        f"kohya, {ending}": tensors(kohya(ending), TOOL, "kohya-ss sd-scripts; it adapts an image")
        for ending in (
            "lora_down.0.weight",
            "lora_mid.weight",
            "hada_w1_a",
            "lokr_w1",
            "dora_scale",
        )
    },
    "torchtune": tensors(
        of_tool("torchtune/adapter_model.safetensors"),
        "what torchtune's checkpointer writes under PEFT's names",
        product_of("torchtune"),
        4.0,
        r=2,
    ),
    **{
        f"{what}, {recipe}": factors(TURN, adapter, recipe, "points elsewhere")
        for recipe in ("all_b", "spectral")
        for what, adapter in {"rotated": TURNED, "another start": OTHER}.items()
    },
    "as trained": factors(
        "an adapter of the start that a probe of factors knows", TRAINED, "all_b", TRAINED
    ),
    "rotated": tensors(
        make.tensors(ROTATED), "the same, and a probe of the recipe `invariant`", ROTATED
    ),
    "Git LFS": weights(ELSE, lfs, "git lfs pull", "git lfs pull"),
    "web page": something(ELSE, b"<!DOCTYPE html><html>", "web page"),
    "GGUF": something(ELSE, b"GGUF\3" + bytes(99), "GGUF"),
    "zip": something(ELSE, b"PK\3\4" + bytes(99), "zip archive"),
    "pickle": weights(
        ELSE, lambda p: torch.save(make.tensors(), p), *("a pickle, which can run",) * 2
    ),
    "nothing": something(ELSE, b"", "empty"),
    "pickle, .bin": weights(
        "the same under the name `adapter_model.bin`",
        lambda path: to_bin(path).write_bytes(b"x"),
        "a pickle",
    ),
    "Git LFS, .bin": weights(
        "the same under the name `adapter_model.bin`", lambda path: lfs(to_bin(path)), "git lfs"
    ),
    "safetensors, .bin": weights(
        "the same under the name `adapter_model.bin`", to_bin, "rename it"
    ),
    "dangling": weights(
        PLACE, lambda path: (path.unlink(), os.symlink("gone", path)), "link to gone|link to 'gone'"
    ),
    "shards": weights(
        PLACE,
        lambda path: path.rename(path.with_name("adapter_model-00001-of-00002.safetensors")),
        "1 shards of it",
    ),
    "whole model": weights(PLACE, whole_model, "this is a whole model"),
    "another name": weights(
        PLACE, lambda path: path.rename(path.with_name("x.safetensors")), "x.safetensors"
    ),
    "weights below": weights(
        PLACE, lambda path: deeper(path, WEIGHTS), "in .*deep: move it up here"
    ),
    "nested": weights(
        PLACE,
        lambda path: deeper(path, WEIGHTS, CONFIG),
        "adapters lie deeper. Give one of .*/deep",
    )._replace(but={"scan": PLAIN}),
    "gone": weights(PLACE, lambda path: path.unlink(), "only adapter_config.json"),
    "two files": weights(
        "`adapter_model.safetensors` and `adapter_model.bin` in one folder or repository",
        lambda path: path.with_suffix(".bin").write_bytes(b"x"),
        "adapter_model.bin beside",
    )._replace(body=PLAIN, state=PLAIN),
    "no configuration": weights(
        "no `adapter_config.json`",
        lambda path: (path.parent / CONFIG).unlink(),
        "how B @ A is scaled",
    )._replace(body=PLAIN, state=PLAIN),
    "alpha by name": config(PATTERN, SHORT, alpha_pattern={Q: 4})._replace(
        state=SHORT, lora={"alpha": 8.0, "alpha_pattern": {Q: 4}}
    ),
    "alpha by expression": config(
        PATTERN, SHORT, alpha_pattern={r"^model\.layers\.0\.self_attn\.(q|k)_proj": 4}
    )._replace(state=SHORT, lora={"alpha": 8.0, "alpha_pattern": {r"layers\.0\..*q_proj": 4}}),
    "rank by expression": config(PATTERN, PLAIN, r=16, rank_pattern={r".*\.(q|v)_proj": 4}),
    **{
        name: config(HARMLESS, PLAIN, **{name: value})
        for name, value in {
            "lorap_lr_ratio": 16.0,
            "loftq_config": {"loftq_bits": 4},
            "_comment": "run 17",
            "qalora_group_size": 16,
            "megatron_core": "megatron.core",
            "runtime_config": {"ephemeral_gpu_offload": True},
        }.items()
    },
    "unselected": config(
        UNSELECTED, "2 modules that adapter_config.json does not", target_modules=["v_proj"]
    ),
    "unselected layers": config(UNSELECTED, f"does not select .*{Q}", layers_to_transform=[1]),
    "excluded": config(UNSELECTED, f"does not select .*{Q}", exclude_modules=".*q_proj"),
    "incomplete": Case(
        "the configuration selects modules that the file does not hold",
        lambda path: save_adapter(FIRST, path),
        *("selects 2 modules that the file does not", FIRST, "lacks 2 modules"),
    ),
    "target_parameters": config(FIELD, "fused experts", target_parameters=["mlp.experts.up"]),
    "aLoRA": config(FIELD, "acts on the tokens after these only", alora_invocation_tokens=[1]),
    "arrow": config(FIELD, "arrow_config", arrow_config={"top_k": 3}),
    "unknown": config(FIELD, "brand_new = 'x'.*take it out of a copy", brand_new="x"),
    "B not zero": config(
        "B not zero at the start (`init_lora_weights`), and no start given",
        "B did not start at zero",
        init_lora_weights="orthogonal",
    ),
    "PiSSA": config(MOVED, "took part of the base's weights away", init_lora_weights="pissa"),
    "another base": config(
        "another base model", "of base model 'org/else'", base_model_name_or_path="org/else"
    )._replace(
        body="base model 'org/else'",
        state="base model 'org/else'",
        lora={"alpha": 8.0, "base_model": "org/else"},
    ),
    "byte order mark": rewritten(TYPO, lambda text: b"\xef\xbb\xbf" + text, "byte order mark"),
    "trailing comma": rewritten(TYPO, lambda text: text[:-1] + b",}", "Take out the comma"),
    "text for a number": config(TYPO, "got alpha '8'", lora_alpha="8"),
}
