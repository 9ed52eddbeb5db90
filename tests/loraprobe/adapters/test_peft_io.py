"""Reading adapters: agreement with what PEFT itself computes and writes, folders and files,
laziness, writing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import load_adapter, save_adapter
from loraprobe.errors import (
    AdapterFormatError,
    KindMismatch,
    LoraprobeError,
    UnsupportedAdapterError,
)
from loraprobe.featurizer import FeatureRecipe, Featurizer
from tests.helpers import make
from tests.helpers.one_module import Q, assert_same, tiny

# --- agreement with PEFT

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "alpha of one name": {"alpha_pattern": {"v_proj": 6}},
    "alpha of one path": {
        "alpha_pattern": {
            "^model.layers.0.self_attn.q_proj": 5,
            "model.layers.1.self_attn.v_proj": 3,
        }
    },
    "first pattern wins": {"alpha_pattern": {"self_attn.q_proj": 3, "q_proj": 5}},
    "half a name is no name": {"alpha_pattern": {"proj": 99, "^self_attn.q_proj": 77}},
    "a dot is any character": {"alpha_pattern": {"q.proj": 99, "layers.1.self.attn.v_proj": 33}},
    "rank of one path": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    "everything": {
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 6},
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 3},
    },
    "all linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_scalings_and_products_are_pefts_own(
    name: str, peft_llama: Callable[..., Any], tmp_path: Path
) -> None:
    import peft

    model = peft_llama(**CONFIGS[name])
    config = model.peft_config["default"]
    adapter = Adapter.from_state_dict(
        peft.get_peft_model_state_dict(model, save_embedding_layers=False),
        alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        alpha_pattern=config.alpha_pattern,
        rank_pattern=config.rank_pattern,
    )
    assert len(adapter) == (14 if name == "all linear" else 4)
    for module, pair in adapter.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        assert pair.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        np.testing.assert_allclose(
            pair.dense(), layer.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-5
        )
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about patterns that match nothing
        model = peft.PeftModel.from_pretrained(model.unload(), tmp_path)
    loaded = load_adapter(tmp_path)
    assert list(loaded) == list(adapter)
    for (
        module,
        pair,
    ) in loaded.items():  # PEFT sorts the patterns on saving, so that another one may be the first
        layer = model.get_submodule(f"base_model.model.{module}")
        assert pair.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert np.array_equal(pair.A, adapter[module].A)
        assert np.array_equal(pair.B, adapter[module].B)
    assert (name == "first pattern wins") == any(
        loaded[module].scaling != adapter[module].scaling for module in adapter
    )


def test_an_adapter_goes_back_into_peft(peft_llama: Callable[..., Any]) -> None:
    import peft

    adapter = make.adapter(dims={"q_proj": (32, 32), "v_proj": (16, 32)})
    model = peft_llama()
    result = peft.set_peft_model_state_dict(model, adapter.state_dict())
    assert not result.unexpected_keys
    assert_same(
        Adapter.from_state_dict(
            peft.get_peft_model_state_dict(model, save_embedding_layers=False), alpha=8
        ),
        adapter,
    )


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
        state_dict = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(UnsupportedAdapterError, match=says):
        Adapter.from_state_dict(state_dict, alpha=8)
    with pytest.raises(UnsupportedAdapterError):
        load_adapter(tmp_path)


# --- folders and files


def test_a_folder_a_subfolder_and_a_file_with_its_config_are_the_same(tmp_path: Path) -> None:
    folder = make.folder(
        tmp_path / "run" / "step", make.tensors(), base_model_name_or_path="org/base"
    )
    for adapter in (
        load_adapter(folder),
        load_adapter(str(tmp_path), subfolder="run/step"),
        load_adapter(folder / "adapter_model.safetensors"),
    ):
        assert_same(adapter, make.adapter())
        assert adapter.base_model == "org/base"
    assert load_adapter(folder, base_model="other").base_model == "other"


def test_a_pickle_is_refused_with_the_lines_that_convert_it(tmp_path: Path) -> None:
    folder = make.folder(tmp_path, make.tensors())
    (folder / "adapter_model.safetensors").unlink()
    torch.save(make.tensors(), folder / "adapter_model.bin")
    for source in (folder, folder / "adapter_model.bin"):
        with pytest.raises(AdapterFormatError, match=r"a pickle, .* convert it") as caught:
            load_adapter(source)
    lines = str(caught.value).partition("in Python: ")[2]
    exec(lines.replace("'adapter_model", f"'{folder}/adapter_model"), {})
    assert_same(load_adapter(folder / "adapter_model.safetensors"), make.adapter())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"source": "nowhere"}, "no file or folder"),
        ({"source": "no/such/folder"}, "no file or folder"),
        *(({"source": none}, "expected a path, or org/name") for none in ("", None, 3, b"folder")),
        ({"source": "a\0b"}, "no file or folder"),
        (
            {"source": "."},
            "adapters lie deeper. Give one of bare, folder",
        ),
        ({"source": ".", "subfolder": "nowhere", "alpha": 8}, "no folder 'nowhere'"),
        ({"source": "bare"}, "no adapter_config.json"),
        ({"source": "bare", "alpha": 8}, "no adapter_config.json in bare"),
        ({"source": "folder", "revision": "main"}, "revisions belong to Hub ids"),
        ({"source": "notes.txt", "alpha": 8}, "got notes.txt; expected a .safetensors file"),
    ],
)
def test_what_is_missing_is_named(
    arguments: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make.folder(tmp_path / "folder", tiny())
    make.folder(tmp_path / "bare", tiny())
    (tmp_path / "bare" / "adapter_config.json").unlink()
    (tmp_path / "notes.txt").write_text("none")
    assert list(load_adapter("folder")) == [Q]  # the control
    with pytest.raises(LoraprobeError, match=says):
        load_adapter(**arguments)


def test_scoring_one_layer_reads_one_layer(tmp_path: Path) -> None:
    """What follows the first layer in the file is gone when it is scored, and not missed."""
    path = make.folder(tmp_path, make.tensors(make.adapter(layers=5)))
    adapter = load_adapter(path)
    featurizer = Featurizer.fit(FeatureRecipe.paper(), [adapter])
    weights = path / "adapter_model.safetensors"
    whole, status = weights.read_bytes(), weights.stat()
    layer, header = (4 * (10 + 12 + 6 + 12) * 4, 8 + int.from_bytes(whole[:8], "little"))
    zeros = bytes(len(whole) - header - layer)
    weights.write_bytes(whole[: header + layer] + zeros)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert featurizer([adapter]).any()
    later = adapter[make.module(layer=3)]
    assert not later.A.any()  # the control: it is read now


def test_a_file_that_changes_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = make.folder(tmp_path, make.tensors())
    adapter = load_adapter(path)
    make.folder(tmp_path, make.tensors(make.adapter(seed=5)))
    with pytest.raises(AdapterFormatError, match="was written to after its header was checked"):
        adapter.load()
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFormatError, match="cannot be read any more"):
        adapter.load()
    assert len(load_adapter(make.folder(tmp_path, make.tensors())).load()) == 4  # the control


# --- writing


def test_a_written_adapter_is_read_as_it_was_by_us_and_by_peft(
    peft_llama: Callable[..., Any], tmp_path: Path
) -> None:
    import peft

    dims = {"q_proj": (32, 32), "v_proj": (16, 32)}
    adapter = make.with_pairs(
        make.adapter(dims=dims, base_model="org/base"),
        {make.module("q_proj", 1): make.pair(32, 32, 2, scaling=5.5)},
    )
    folder = save_adapter(adapter, tmp_path / "new" / "folder")
    loaded = load_adapter(folder)
    assert_same(loaded, adapter)
    assert loaded.base_model == "org/base"
    model = peft.PeftModel.from_pretrained(peft_llama().unload(), folder)
    for module, pair in adapter.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        np.testing.assert_allclose(
            layer.get_delta_weight("default").detach(), pair.dense(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["factor_delta", "weight_delta"])
def test_a_delta_is_not_written_as_if_it_were_weights(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(KindMismatch, match=f"kind '{kind}'; PEFT's format holds weights"):
        save_adapter(make.adapter(kind=kind), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_modules_that_share_memory_are_saved_each_for_itself(tmp_path: Path) -> None:
    pair = make.pair(seed=3)
    shared = Adapter({make.module(layer=0): pair, make.module(layer=7): pair})
    loaded = load_adapter(save_adapter(shared, tmp_path))
    assert sorted(loaded) == sorted(shared)
    assert all(np.array_equal(loaded[module].B, pair.B) for module in shared)
