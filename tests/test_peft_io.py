"""Reading adapters: agreement with what PEFT itself computes and writes, laziness, and every refusal by name."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraprobe import peft_io
from loraprobe.adapter import Adapter, factor_delta
from loraprobe.errors import AdapterFormatError, KindMismatch, UnsupportedAdapterError
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.peft_io import load_adapter, save_adapter

Q = make.module()
A_KEY, B_KEY = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


def tiny() -> dict[str, Tensor]:
    """The tensors of one module."""
    return {A_KEY: make.pair().A, B_KEY: make.pair().B}


def read(source: Path, **arguments: Any) -> Adapter:
    """load_adapter, and then every module: shapes and types are checked when they are asked for."""
    return load_adapter(source, **arguments).load()


def assert_same(got: Adapter, expected: Adapter) -> None:
    assert list(got) == list(expected)
    for module, pair in expected.items():
        assert torch.equal(got[module].A, pair.A)
        assert torch.equal(got[module].B, pair.B)
        assert got[module].scaling == pair.scaling


# --- agreement with PEFT ----------------------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "alpha of one name": {"alpha_pattern": {"v_proj": 6}},
    "alpha of one path": {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, "model.layers.1.self_attn.v_proj": 3}},
    "first pattern wins": {"alpha_pattern": {"self_attn.q_proj": 3, "q_proj": 5}},
    "half a name is no name": {"alpha_pattern": {"proj": 99, "^self_attn.q_proj": 77}},
    "a dot is any character": {"alpha_pattern": {"q.proj": 99, "layers.1.self.attn.v_proj": 33}},
    "rank of one path": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    "everything": {"use_rslora": True, "alpha_pattern": {"q_proj": 6}, "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 3}},
    "all linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_scalings_and_products_are_pefts_own(name: str, peft_llama: Callable[..., Any], tmp_path: Path) -> None:
    import peft

    model = peft_llama(**CONFIGS[name])
    config = model.peft_config["default"]
    adapter = Adapter.from_state_dict(
        peft.get_peft_model_state_dict(model),
        alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        alpha_pattern=config.alpha_pattern,
        rank_pattern=config.rank_pattern,
    )
    assert len(adapter) == (14 if name == "all linear" else 4)
    for module, pair in adapter.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        assert pair.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        torch.testing.assert_close(pair.dense(), layer.get_delta_weight("default").detach())
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about patterns that match nothing
        model = peft.PeftModel.from_pretrained(model.unload(), tmp_path)
    loaded = load_adapter(tmp_path)
    assert list(loaded) == list(adapter)
    for module, pair in loaded.items():  # PEFT sorts the patterns on saving, so that another one may be the first
        layer = model.get_submodule(f"base_model.model.{module}")
        assert pair.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert torch.equal(pair.A, adapter[module].A)
        assert torch.equal(pair.B, adapter[module].B)
    assert (name == "first pattern wins") == any(loaded[module].scaling != adapter[module].scaling for module in adapter)


def test_an_adapter_goes_back_into_peft(peft_llama: Callable[..., Any]) -> None:
    import peft

    adapter = make.adapter(dims={"q_proj": (32, 32), "v_proj": (16, 32)})
    model = peft_llama()
    result = peft.set_peft_model_state_dict(model, adapter.state_dict())
    assert not result.unexpected_keys
    assert_same(Adapter.from_state_dict(peft.get_peft_model_state_dict(model), alpha=8), adapter)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts an embedding"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias=True"),
    ],
)
def test_what_peft_makes_beside_plain_lora_is_refused_from_a_state_dict_and_from_a_folder(
    config: dict[str, Any], says: str, peft_llama: Callable[..., Any], tmp_path: Path
) -> None:
    import peft

    model = peft_llama(**config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on saving embeddings
        state_dict = peft.get_peft_model_state_dict(model)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(UnsupportedAdapterError, match=says):
        Adapter.from_state_dict(state_dict, alpha=8)
    with pytest.raises(UnsupportedAdapterError):
        load_adapter(tmp_path)


# --- names and dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("infix", ["", ".default", ".client_7"])
def test_names_with_and_without_prefix_and_adapter_name_mean_the_same(prefix: str, infix: str) -> None:
    renamed = {prefix + key.removeprefix("base_model.model.").replace(".weight", f"{infix}.weight"): value for key, value in make.tensors().items()}
    assert set(renamed) != set(make.tensors()) or (prefix and not infix)
    assert_same(Adapter.from_state_dict(renamed, alpha=8), make.adapter())


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in tiny().items()}


@pytest.mark.parametrize(
    ("state_dict", "error", "says"),
    [
        ({}, AdapterFormatError, "without a single LoRA module"),
        ({A_KEY: tiny()[A_KEY]}, AdapterFormatError, rf"^{Q}: only lora_A is there; expected lora_A and lora_B"),
        ({B_KEY: tiny()[B_KEY]}, AdapterFormatError, rf"^{Q}: only lora_B is there"),
        (tiny() | renamed("base_model.model.", ""), AdapterFormatError, rf"^{Q}: lora_A occurs twice"),
        (
            renamed(".weight", ".one.weight") | {k.replace("layers.0", "layers.1"): v for k, v in renamed(".weight", ".two.weight").items()},
            AdapterFormatError,
            "got 2 adapters in one state dict .'one', 'two'.; expected one",
        ),
        ({**tiny(), A_KEY: torch.zeros(3, 12)}, AdapterFormatError, rf"^{Q}: got A of shape \(3, 12\) and B of shape \(10, 4\)"),
        ({**tiny(), A_KEY: torch.zeros(4)}, AdapterFormatError, rf"^{Q}: got A of shape \(4,\)"),
        ({**tiny(), A_KEY: torch.zeros(4, 12, dtype=torch.int8)}, AdapterFormatError, rf"^{Q}, lora_A: got dtype torch.int8; expected float32"),
        ({**tiny(), A_KEY: torch.zeros(4, 12, dtype=torch.complex64)}, AdapterFormatError, "got dtype torch.complex64"),
        ({A_KEY: torch.zeros(4, 3, 3, 3), B_KEY: torch.zeros(8, 4, 1, 1)}, UnsupportedAdapterError, r"\(4, 3, 3, 3\): this adapts a convolution"),
        ({**tiny(), f"{Q}.lora_magnitude_vector": torch.zeros(10)}, UnsupportedAdapterError, "this is DoRA"),
        ({**tiny(), f"{Q}.lora_magnitude_vector.default.weight": torch.zeros(10)}, UnsupportedAdapterError, "this is DoRA"),
        ({**tiny(), "model.embed_tokens.lora_embedding_A": torch.zeros(4, 9)}, UnsupportedAdapterError, "adapts an embedding"),
        ({**tiny(), "base_model.model.lm_head.weight": torch.zeros(9, 4)}, UnsupportedAdapterError, r"lm_head\.weight: .*modules_to_save"),
        ({**tiny(), f"base_model.model.{Q}.bias": torch.zeros(10)}, UnsupportedAdapterError, "a bias or a base weight"),
        ({**tiny(), f"{Q}.lora_B.bias": torch.zeros(10)}, UnsupportedAdapterError, "this is a LoRA bias"),
        ({**tiny(), f"{Q}.lora_C.weight": torch.zeros(10, 4)}, UnsupportedAdapterError, "no tensor of plain LoRA"),
        ({**tiny(), f"{Q}.lora_A.a.b.weight": torch.zeros(4, 12)}, UnsupportedAdapterError, "no tensor of plain LoRA"),
        ({**tiny(), "lora_A.weight": torch.zeros(4, 12)}, UnsupportedAdapterError, "not a LoRA factor"),
    ],
)
def test_a_state_dict_that_is_not_one_plain_adapter_is_refused(state_dict: Mapping[str, Tensor], error: type[AdapterFormatError], says: str) -> None:
    assert_same(Adapter.from_state_dict(tiny(), alpha=8), Adapter({Q: make.pair()}))  # the control
    with pytest.raises(error, match=says) as caught:
        Adapter.from_state_dict(state_dict, alpha=8)
    assert type(caught.value) is error


def test_a_buffer_that_follows_from_the_base_is_left_out_and_reported() -> None:
    key = "base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"
    adapter = Adapter.from_state_dict({**tiny(), key: torch.ones(4)}, alpha=8)
    assert list(adapter) == [Q]
    assert adapter.ignored == (key,)
    assert Adapter.from_state_dict(tiny(), alpha=8).ignored == ()


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 0, 0.0, True, "8", None, [8], 10**400])
def test_an_alpha_that_is_no_number_to_scale_with_is_refused(alpha: Any) -> None:
    with pytest.raises(AdapterFormatError, match="expected a finite number other than 0"):
        Adapter.from_state_dict(tiny(), alpha=alpha)
    with pytest.raises(AdapterFormatError, match="expected a finite number other than 0"):
        Adapter.from_state_dict(tiny(), alpha=8, alpha_pattern={"nowhere": alpha})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_half_precision_files_are_read_as_float32_of_the_same_value(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    stored = {key: value.to(dtype) for key, value in tiny().items()}
    save_file(stored, tmp_path / name) if name.endswith("s") else torch.save(stored, tmp_path / name)
    pair = load_adapter(tmp_path / name, alpha=8)[Q]
    assert pair.A.dtype == pair.B.dtype == torch.float32
    assert torch.equal(pair.A.to(dtype), stored[A_KEY])
    assert not torch.equal(pair.A, make.pair().A)  # the control: something was rounded


# --- folders and files ------------------------------------------------------------------------------------------------


def test_a_folder_a_subfolder_and_a_file_with_its_config_are_the_same(tmp_path: Path) -> None:
    folder = make.folder(tmp_path / "run" / "step", make.tensors(), base_model_name_or_path="org/base")
    for adapter in (load_adapter(folder), load_adapter(str(tmp_path), subfolder="run/step"), load_adapter(folder / "adapter_model.safetensors")):
        assert_same(adapter, make.adapter())
        assert adapter.base_model == "org/base"
    assert load_adapter(folder, base_model="other").base_model == "other"


def test_safetensors_come_before_bin_and_bin_is_read_without_it(tmp_path: Path) -> None:
    folder = make.folder(tmp_path, make.tensors())
    torch.save(make.tensors(make.adapter(seed=5)), folder / "adapter_model.bin")
    assert_same(load_adapter(folder), make.adapter())
    (folder / "adapter_model.safetensors").unlink()
    assert_same(load_adapter(folder), make.adapter(seed=5))


def test_a_bare_file_needs_alpha(tmp_path: Path) -> None:
    save_file(tiny(), tmp_path / "a.safetensors")
    with pytest.raises(AdapterFormatError, match="pass alpha="):
        load_adapter(tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors", alpha=6)[Q].scaling == 6 / 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"source": "nowhere"}, "no file or folder"),
        ({"source": "no/such/folder"}, "no file or folder"),
        ({"source": "a\0b"}, "no file or folder"),
        ({"source": "."}, "no adapter weights in .* expected adapter_model.safetensors or adapter_model.bin"),
        ({"source": ".", "subfolder": "nowhere", "alpha": 8}, "no folder 'nowhere'"),
        ({"source": "bare"}, "no adapter_config.json"),
        ({"source": "bare", "alpha": 8}, "no adapter_config.json"),
        ({"source": "folder", "revision": "main"}, "revisions belong to Hub ids"),
        ({"source": "notes.txt", "alpha": 8}, "got notes.txt; expected a .safetensors file"),
    ],
)
def test_what_is_missing_is_named(arguments: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make.folder(tmp_path / "folder", tiny())
    make.folder(tmp_path / "bare", tiny())
    (tmp_path / "bare" / "adapter_config.json").unlink()
    (tmp_path / "notes.txt").write_text("none")
    assert list(load_adapter("folder")) == [Q]  # the control
    with pytest.raises(AdapterFormatError, match=says):
        load_adapter(**arguments)


class Recorder:
    """safe_open, with lists of the tensors whose shapes were asked for and of those that were read."""

    shapes: list[str]
    reads: list[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.file = safe_open(*args, **kwargs)

    def get_slice(self, key: str) -> Any:
        self.shapes.append(key)
        return self.file.get_slice(key)

    def get_tensor(self, key: str) -> Tensor:
        self.reads.append(key)
        return self.file.get_tensor(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


safe_open = peft_io.safe_open


def test_scoring_one_layer_reads_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_io, "safe_open", Recorder)
    monkeypatch.setattr(Recorder, "reads", [], raising=False)
    monkeypatch.setattr(Recorder, "shapes", [], raising=False)
    adapter = load_adapter(make.folder(tmp_path, make.tensors(make.adapter(layers=5))))
    featurizer = Featurizer.fit(FeatureRecipe.paper(), [adapter])
    assert Recorder.reads == []
    featurizer([adapter])
    assert Recorder.reads == [f"base_model.model.{make.module(name)}.lora_B.weight" for name in ("q_proj", "v_proj")]
    assert len(Recorder.shapes) == 4
    assert all(".layers.0." in key for key in Recorder.shapes)
    adapter.load()
    assert (len(Recorder.reads), len(Recorder.shapes)) == (2 + 20, 20)  # the control


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_malformed_module_is_named_when_it_is_asked_for(name: str, tmp_path: Path) -> None:
    state_dict = make.tensors()
    state_dict[f"base_model.model.{make.module('v_proj', 1)}.lora_A.weight"] = torch.zeros(3, 12)
    folder = make.folder(tmp_path, {})
    (folder / "adapter_model.safetensors").unlink()
    save_file(state_dict, folder / name) if name.endswith("s") else torch.save(state_dict, folder / name)
    adapter = load_adapter(folder)
    assert Featurizer.fit(FeatureRecipe.paper(), [adapter])([adapter]).shape == (1, 64)  # the control: layer 0 is whole
    for use in (adapter.load, lambda: Featurizer.fit(FeatureRecipe.all_b(), [adapter]), lambda: factor_delta(adapter, make.adapter())):
        with pytest.raises(AdapterFormatError, match=r"^model\.layers\.1\.self_attn\.v_proj: got A of shape \(3, 12\)"):
            use()
    with pytest.raises(AdapterFormatError, match="got A of shape"):
        Adapter.from_state_dict(state_dict, alpha=8)  # what is in memory anyway is checked at once


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_written_adapter_is_read_as_it_was_by_us_and_by_peft(peft_llama: Callable[..., Any], tmp_path: Path) -> None:
    import peft

    dims = {"q_proj": (32, 32), "v_proj": (16, 32)}
    adapter = make.with_pairs(make.adapter(dims=dims, base_model="org/base"), {make.module("q_proj", 1): make.pair(32, 32, 2, scaling=5.5)})
    folder = save_adapter(adapter, tmp_path / "new" / "folder")
    loaded = load_adapter(folder)
    assert_same(loaded, adapter)
    assert loaded.base_model == "org/base"
    model = peft.PeftModel.from_pretrained(peft_llama().unload(), folder)
    for module, pair in adapter.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        torch.testing.assert_close(layer.get_delta_weight("default").detach(), pair.dense())


@pytest.mark.parametrize("kind", ["factor_delta", "weight_delta"])
def test_a_delta_is_not_written_as_if_it_were_weights(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(KindMismatch, match=f"kind '{kind}'; PEFT's format holds weights"):
        save_adapter(make.adapter(kind=kind), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# --- adapter_config.json ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"use_dora": True}, UnsupportedAdapterError, "use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedAdapterError, "modules_to_save = "),
        ({"bias": "all"}, UnsupportedAdapterError, "got bias 'all'"),
        ({"bias": "lora_only"}, UnsupportedAdapterError, "got bias 'lora_only'"),
        ({"lora_bias": True}, UnsupportedAdapterError, "lora_bias = True"),
        ({"init_lora_weights": "pissa"}, UnsupportedAdapterError, "init_lora_weights 'pissa', which moves part of the base"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedAdapterError, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, UnsupportedAdapterError, "olora"),
        ({"init_lora_weights": "loftq"}, UnsupportedAdapterError, "loftq"),
        ({"layer_replication": [[0, 2]]}, UnsupportedAdapterError, "layer_replication = "),
        ({"trainable_token_indices": [1]}, UnsupportedAdapterError, "trainable_token_indices = "),
        ({"target_parameters": ["experts"]}, UnsupportedAdapterError, "target_parameters = "),
        ({"use_a_new_trick": 1, "and_another": "x"}, UnsupportedAdapterError, "use_a_new_trick = 1, and_another = x: .*pass ignore_fields"),
        ({"alpha_pattern": {"(q|v)_proj": 4}}, UnsupportedAdapterError, r"alpha_pattern key '\(q\|v\)_proj'; expected a module name"),
        ({"rank_pattern": {".*": 4}}, UnsupportedAdapterError, r"rank_pattern key '\.\*'"),
        ({"rank_pattern": {"": 4}}, UnsupportedAdapterError, "rank_pattern key ''"),
        ({"alpha_pattern": ["q_proj"]}, AdapterFormatError, "alpha_pattern of type list"),
        ({"alpha_pattern": {"q_proj": "4"}}, AdapterFormatError, "alpha 4; expected a finite number"),
        ({"alpha_pattern": {"q_proj": 10**400}}, AdapterFormatError, "expected a finite number"),
        ({"peft_type": "IA3"}, UnsupportedAdapterError, "peft_type 'IA3'; expected 'LORA'"),
        ({"peft_type": None}, UnsupportedAdapterError, "peft_type None"),
        ({"lora_alpha": math.nan}, AdapterFormatError, "alpha nan"),
        ({"lora_alpha": math.inf}, AdapterFormatError, "alpha inf"),
        ({"lora_alpha": None}, AdapterFormatError, "alpha None"),
        ({"lora_alpha": 10**400}, AdapterFormatError, "expected a finite number"),
        ({"lora_alpha": 5e-324}, AdapterFormatError, "scaling 0.0"),
        ({"r": 8}, AdapterFormatError, rf"^{Q}: the configuration says rank 8, the tensors have 4"),
        ({"rank_pattern": {"q_proj": 5}}, AdapterFormatError, rf"^{Q}: the configuration says rank 5, the tensors have 4"),
        ({"r": 0}, AdapterFormatError, "r = 0; expected a whole number of at least 1"),
        ({"r": "4"}, AdapterFormatError, "r = '4'"),
        ({"r": True}, AdapterFormatError, "r = True"),
        ({"r": None}, AdapterFormatError, "r = None"),
        ({"base_model_name_or_path": ["x"]}, AdapterFormatError, "base_model_name_or_path of type list"),
    ],
)
def test_a_config_that_says_more_or_less_than_plain_lora_is_refused(
    fields: dict[str, Any], error: type[AdapterFormatError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says) as caught:
        read(make.folder(tmp_path, tiny(), **fields))
    assert type(caught.value) is error


def test_a_config_with_harmless_fields_is_read_and_what_could_matter_is_reported(tmp_path: Path) -> None:
    harmless = {
        "task_type": "CAUSAL_LM", "peft_version": "0.21", "lora_dropout": 0.1, "target_modules": ["q_proj"], "exclude_modules": "x",
        "layers_to_transform": [0], "layers_pattern": "layers", "inference_mode": True, "revision": "main", "megatron_core": "megatron.core",
        "auto_mapping": {"a": "b"}, "qalora_group_size": 16, "runtime_config": {"x": 1}, "init_lora_weights": "gaussian", "bias": "none",
        "use_dora": False, "modules_to_save": None, "loftq_config": {}, "a_future_field": None,
    }  # fmt: skip
    adapter = load_adapter(make.folder(tmp_path / "a", tiny(), **harmless))
    assert adapter.ignored == ()
    assert_same(adapter, Adapter({Q: make.pair()}))
    reported = make.folder(tmp_path / "b", tiny(), fan_in_fan_out=True, ensure_weight_tying=True, a_future_field=3)
    assert load_adapter(reported, ignore_fields=["a_future_field", "absent"]).ignored == ("a_future_field", "ensure_weight_tying", "fan_in_fan_out")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[]", "holds a JSON list; expected an object"),
        (b"null", "holds a JSON NoneType"),
        (b"", "not readable JSON"),
        (b'{"peft_type": "LORA"', "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not readable JSON"),
        (b'{"x": "' + b"a" * (2 << 20) + b'"}', "bytes; expected at most 1048576"),
    ],
)
def test_a_config_that_is_no_small_json_object_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    folder = make.folder(tmp_path, tiny())
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterFormatError, match=says):
        load_adapter(folder)


# --- damaged and hostile files ----------------------------------------------------------------------------------------


def test_a_truncated_safetensors_is_refused_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tiny(), path)
    whole = path.read_bytes()
    for length in {*range(20), *range(20, len(whole), 7), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterFormatError, match="damaged or incomplete"):
            load_adapter(path, alpha=8)
    path.write_bytes(whole)
    assert list(load_adapter(path, alpha=8)) == [Q]  # the control


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2, 2), offsets: tuple[int, int] = (0, 16)) -> dict[str, Any]:
    """A header whose B is right and whose A may not be."""
    return {A_KEY: {"dtype": dtype, "shape": shape, "data_offsets": offsets}, B_KEY: {"dtype": "F32", "shape": (2, 2), "data_offsets": (16, 32)}}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        safetensors({})[:8],
        safetensors(entry(offsets=(0, 2**40)), bytes(32)),
        safetensors(entry(shape=(2**31, 2**31)), bytes(32)),
        safetensors(entry(shape=(-1, 2)), bytes(32)),
        safetensors(entry(offsets=(16, 0)), bytes(32)),
        safetensors(entry(offsets=(16, 32)), bytes(32)),
        safetensors(entry(), bytes(33)),
        safetensors(entry("I8", (4, 4)), bytes(32)),
        safetensors(entry("F8_E4M3", (4, 4)), bytes(32)),
        safetensors(entry("I32"), bytes(32)),
        safetensors(entry("X32"), bytes(32)),
        b"PK\x03\x04",
    ],
)
def test_a_safetensors_file_that_lies_about_itself_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterFormatError, match=r"a\.safetensors"):
        read(path, alpha=8)


def test_the_handmade_safetensors_above_are_wrong_only_where_they_are_meant_to_be(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors(entry(), bytes(32)))
    assert read(tmp_path / "a.safetensors", alpha=8)[Q].A.tolist() == [[0, 0], [0, 0]]


def test_an_oversized_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(tiny(), tmp_path / "a.safetensors")
    monkeypatch.setattr(peft_io, "MAX_WEIGHT_BYTES", 100)
    monkeypatch.setattr(peft_io, "safe_open", None)
    with pytest.raises(AdapterFormatError, match="expected at most 100 for an adapter"):
        load_adapter(tmp_path / "a.safetensors", alpha=8)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_is_refused_without_being_executed(tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "a.bin"
    plain = pickle.dumps({**tiny(), "x": Payload(marker)}, protocol=2)
    torch.save({**tiny(), "x": Payload(marker)}, zipped := io.BytesIO())
    torch.save({**tiny(), "x": Payload(marker)}, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
    for content in (plain, zipped.getvalue(), legacy.getvalue()):
        path.write_bytes(content)
        with pytest.raises(AdapterFormatError, match="cannot be read as plain tensors"):
            load_adapter(path, alpha=8)
        assert not marker.exists()
    pickle.loads(plain)
    assert marker.exists()  # the control: it would have run


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_bin_is_refused_at_any_length(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save(tiny(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    assert list(load_adapter(path, alpha=8)) == [Q]
    for length in {*range(20), *range(20, len(whole) - 1, 71)}:
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterFormatError, match=r"a\.bin"):
            load_adapter(path, alpha=8)


def test_a_bin_whose_parts_name_each_other_wrongly_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save(tiny(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    key = re.findall(rb"\d{9,}", whole)[-1]  # of a tensor's numbers, which follow
    path.write_bytes(whole.replace(key, key[:-1] + b"x", 1))
    with pytest.raises(AdapterFormatError, match=r"a\.bin cannot be read as plain tensors"):
        load_adapter(path, alpha=8)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.zeros(2)], "does not hold a dictionary of tensors"),
        ({A_KEY: 3}, "does not hold a dictionary of tensors"),
        ({3: torch.zeros(2)}, "does not hold a dictionary of tensors"),
        ({**tiny(), A_KEY: torch.zeros(4, 12).to_sparse()}, "lora_A.weight: got a sparse, empty or expanded tensor"),
        ({**tiny(), A_KEY: torch.empty(4, 12, device="meta")}, "lora_A.weight: got a sparse, empty or expanded tensor"),
        ({**tiny(), A_KEY: torch.zeros(1).expand(4, 10**12)}, "lora_A.weight: got a sparse, empty or expanded tensor"),
        ({**tiny(), A_KEY: torch.zeros(4, 12, dtype=torch.int8)}, "got dtype torch.int8"),
    ],
)
def test_a_bin_with_anything_but_whole_tensors_is_refused(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(AdapterFormatError, match=says):
        read(tmp_path / "a.bin", alpha=8)


def test_a_bin_that_inflates_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({**tiny(), A_KEY: torch.zeros(4, 100_000)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as honest, zipfile.ZipFile(tmp_path / "b.bin", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in honest.namelist():
            bomb.writestr(name, honest.read(name))
    assert (tmp_path / "b.bin").stat().st_size < 10_000
    assert torch.load(tmp_path / "b.bin", weights_only=True)[A_KEY].shape == (4, 100_000)  # the control: PyTorch unpacks it
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(AdapterFormatError, match="would unpack to"):
        load_adapter(tmp_path / "b.bin", alpha=8)


def test_modules_that_share_memory_are_saved_each_for_itself(tmp_path: Path) -> None:
    pair = make.pair(seed=3)
    shared = Adapter({make.module(layer=0): pair, make.module(layer=7): pair})
    loaded = load_adapter(save_adapter(shared, tmp_path))
    assert sorted(loaded) == sorted(shared)
    assert all(torch.equal(loaded[module].B, pair.B) for module in shared)
