"""The tensors of an adapter: names, types and shapes, beside what tests/helpers/inputs.py has.

What is wrong in the bytes of a file is in test_safetensors.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraprobe.adapters import files, load
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import load_adapter
from loraprobe.errors import AdapterFormatError, UnsupportedAdapterError
from tests.helpers import make
from tests.helpers.one_module import A_KEY, B_KEY, Q, assert_same, tiny

# --- names and dtypes


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("infix", ["", ".default", ".client_7"])
def test_names_with_and_without_prefix_and_adapter_name_mean_the_same(
    prefix: str, infix: str
) -> None:
    renamed = {
        prefix + key.removeprefix("base_model.model.").replace(".weight", f"{infix}.weight"): value
        for key, value in make.tensors().items()
    }
    assert set(renamed) != set(make.tensors()) or (prefix and not infix)
    assert_same(Adapter.from_state_dict(renamed, alpha=8), make.adapter())


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in tiny().items()}


@pytest.mark.parametrize(
    ("state_dict", "error", "says"),
    [
        ({}, AdapterFormatError, "without a single LoRA module"),
        ({B_KEY: tiny()[B_KEY]}, AdapterFormatError, rf"^{Q}: only lora_B is there"),
        (
            tiny() | renamed("base_model.model.", ""),
            AdapterFormatError,
            rf"^{Q}: lora_A occurs twice",
        ),
        (
            renamed(".weight", ".one.weight")
            | {
                k.replace("layers.0", "layers.1"): v
                for k, v in renamed(".weight", ".two.weight").items()
            },
            AdapterFormatError,
            "got 2 adapters in one state dict .'one', 'two'.; expected one",
        ),
        ({**tiny(), A_KEY: torch.zeros(4)}, AdapterFormatError, rf"^{Q}: got A of shape \(4,\)"),
        (
            {**tiny(), A_KEY: torch.zeros(4, 12, dtype=torch.complex64)},
            AdapterFormatError,
            "got dtype complex64",
        ),
        (
            {A_KEY: torch.zeros(4, 3, 3, 3), B_KEY: torch.zeros(8, 4, 1, 1)},
            UnsupportedAdapterError,
            r"\(4, 3, 3, 3\): this adapts a convolution",
        ),
        (
            {**tiny(), f"{Q}.lora_magnitude_vector.default.weight": torch.zeros(10)},
            UnsupportedAdapterError,
            "this is DoRA",
        ),
        (
            {**tiny(), f"base_model.model.{Q}.bias": torch.zeros(10)},
            UnsupportedAdapterError,
            "a bias or a base weight",
        ),
        (
            {**tiny(), f"{'x' * 500}.lora_A.weight": torch.zeros(4, 12)},
            AdapterFormatError,
            r"named 'x+\.\.\.; expected a name of at most 500",
        ),
        (
            {**tiny(), f"{Q}.lora_C.weight": torch.zeros(10, 4)},
            UnsupportedAdapterError,
            "no tensor of plain LoRA",
        ),
        (
            {**tiny(), f"{Q}.lora_A.a.b.weight": torch.zeros(4, 12)},
            UnsupportedAdapterError,
            "no tensor of plain LoRA",
        ),
        (
            {**tiny(), "lora_A.weight": torch.zeros(4, 12)},
            UnsupportedAdapterError,
            "not a LoRA factor",
        ),
    ],
)
def test_a_state_dict_that_is_not_one_plain_adapter_is_refused(
    state_dict: Mapping[str, Tensor], error: type[AdapterFormatError], says: str
) -> None:
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


# --- damaged and hostile files


def test_an_oversized_file_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tiny(), tmp_path / "a.safetensors")
    monkeypatch.setattr(files, "ADAPTER_WEIGHTS", 100)
    monkeypatch.setattr(load, "SafetensorsFile", None)
    with pytest.raises(AdapterFormatError, match="expected at most 100 for an adapter"):
        load_adapter(tmp_path / "a.safetensors", alpha=8)
