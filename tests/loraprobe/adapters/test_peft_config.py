"""adapter_config.json: what it may say, and every refusal by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import load_adapter
from loraprobe.errors import AdapterFormatError, UnsupportedAdapterError
from tests.helpers import make
from tests.helpers.one_module import Q, assert_same, read, tiny


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"use_dora": True}, UnsupportedAdapterError, "use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedAdapterError, "modules_to_save = "),
        ({"bias": "all"}, UnsupportedAdapterError, "got bias 'all'"),
        ({"bias": "lora_only"}, UnsupportedAdapterError, "got bias 'lora_only'"),
        ({"lora_bias": True}, UnsupportedAdapterError, "lora_bias = True"),
        (
            {"init_lora_weights": "pisa"},
            UnsupportedAdapterError,
            "init_lora_weights 'pisa'; expected",
        ),
        ({"init_lora_weights": 1}, UnsupportedAdapterError, "init_lora_weights 1; expected"),
        ({"layer_replication": [[0, 2]]}, UnsupportedAdapterError, "layer_replication = "),
        ({"trainable_token_indices": [1]}, UnsupportedAdapterError, "trainable_token_indices = "),
        ({"target_parameters": ["experts"]}, UnsupportedAdapterError, "target_parameters = "),
        (
            {"use_a_new_trick": 1, "and_another": "x"},
            UnsupportedAdapterError,
            "use_a_new_trick = 1, and_another = 'x': .*take it out of a copy of",
        ),
        ({"alpha_pattern": {"(q|v_proj": 4}}, UnsupportedAdapterError, r"pattern '\(q\|v_proj'"),
        ({"rank_pattern": {"": 4}}, UnsupportedAdapterError, "pattern ''; expected a module name"),
        ({"target_modules": None}, AdapterFormatError, "got no target_modules"),
        ({"alpha_pattern": ["q_proj"]}, AdapterFormatError, "alpha_pattern of type list"),
        ({"alpha_pattern": []}, AdapterFormatError, "alpha_pattern of type list"),
        ({"rank_pattern": ""}, AdapterFormatError, "rank_pattern of type str"),
        (
            {"alpha_pattern": {"q_proj": "4"}},
            AdapterFormatError,
            "alpha '4'; expected a finite number",
        ),
        ({"alpha_pattern": {"q_proj": 10**400}}, AdapterFormatError, "expected a finite number"),
        ({"peft_type": "IA3"}, UnsupportedAdapterError, "peft_type 'IA3'; expected 'LORA'"),
        ({"peft_type": None}, UnsupportedAdapterError, "peft_type None"),
        ({"lora_alpha": math.nan}, AdapterFormatError, "alpha nan"),
        ({"lora_alpha": math.inf}, AdapterFormatError, "alpha inf"),
        ({"lora_alpha": None}, AdapterFormatError, "alpha None"),
        ({"lora_alpha": 10**400}, AdapterFormatError, "expected a finite number"),
        ({"lora_alpha": 5e-324}, AdapterFormatError, "scaling 0.0"),
        ({"r": 8}, AdapterFormatError, rf"^{Q}: the configuration says rank 8, the tensors have 4"),
        (
            {"rank_pattern": {"q_proj": 5}},
            AdapterFormatError,
            rf"^{Q}: the configuration says rank 5, the tensors have 4",
        ),
        ({"r": 0}, AdapterFormatError, "r = 0; expected a whole number of at least 1"),
        ({"r": "4"}, AdapterFormatError, "r = '4'"),
        ({"r": True}, AdapterFormatError, "r = True"),
        ({"r": None}, AdapterFormatError, "r = None"),
        (
            {"base_model_name_or_path": ["x"]},
            AdapterFormatError,
            "base_model_name_or_path of type list",
        ),
        (
            {"base_model_name_or_path": "x\x1b[2J"},
            AdapterFormatError,
            r"base_model_name_or_path 'x\\x1b\[2J'; expected at most 500 printable",
        ),
        (
            {"base_model_name_or_path": "x" * 501},
            AdapterFormatError,
            "expected at most 500 printable",
        ),
        ({"use_rslora": "false"}, AdapterFormatError, "use_rslora 'false'; expected true or false"),
        ({"use_rslora": 1}, AdapterFormatError, "use_rslora 1; expected true or false"),
        (
            {"rank_pattern": {"q_proj": 4.0}},
            AdapterFormatError,
            r"rank 4\.0 in rank_pattern; expected a whole number",
        ),
        ({"rank_pattern": {"q_proj": True}}, AdapterFormatError, "rank True in rank_pattern"),
        ({"rank_pattern": {"elsewhere": "4"}}, AdapterFormatError, "rank '4' in rank_pattern"),
    ],
)
def test_a_config_that_says_more_or_less_than_plain_lora_is_refused(
    fields: dict[str, Any], error: type[AdapterFormatError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says) as caught:
        read(make.folder(tmp_path, tiny(), **fields))
    assert type(caught.value) is error


def test_a_config_with_harmless_fields_is_read_and_what_could_matter_is_reported(
    tmp_path: Path,
) -> None:
    harmless = {
        "task_type": "CAUSAL_LM",
        "peft_version": "0.21",
        "lora_dropout": 0.1,
        "target_modules": ["q_proj"],
        "exclude_modules": "x",
        "layers_to_transform": [0],
        "layers_pattern": "layers",
        "inference_mode": True,
        "revision": "main",
        "megatron_core": "megatron.core",
        "auto_mapping": {"a": "b"},
        "qalora_group_size": 16,
        "runtime_config": {"x": 1},
        "init_lora_weights": "gaussian",
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "loftq_config": {"loftq_bits": 4},
        "lorap_lr_ratio": 16.0,
        "_note": "run 17",
        "a_future_field": None,
    }
    adapter = load_adapter(make.folder(tmp_path / "a", tiny(), **harmless))
    assert adapter.ignored == ("_note", "loftq_config", "lorap_lr_ratio")
    assert_same(adapter, Adapter({Q: make.pair()}))
    reported = make.folder(
        tmp_path / "b", tiny(), fan_in_fan_out=True, ensure_weight_tying=True, a_future_field=3
    )
    assert load_adapter(reported, ignore_fields=["a_future_field", "absent"]).ignored == (
        "a_future_field",
        "ensure_weight_tying",
        "fan_in_fan_out",
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[]", "holds a JSON list; expected an object"),
        (b"\xef\xbb\xbf{}", "starts with a byte order mark"),
        (b'{"r": 4,}', "not readable JSON: .*Take out the comma before the closing bracket"),
        (b"null", "holds a JSON NoneType"),
        (b'{"peft_type": "LORA"', "not readable JSON"),
        (b'{"peft_type": "LORA", "r": 4, "r": 8}', "not readable JSON: the key 'r' occurs twice"),
        (b'{"x": "' + b"a" * (2 << 20) + b'"}', "bytes; expected at most 1048576"),
    ],
)
def test_a_config_that_is_no_small_json_object_is_refused(
    content: bytes, says: str, tmp_path: Path
) -> None:
    folder = make.folder(tmp_path, tiny())
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterFormatError, match=says):
        load_adapter(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "\x1b[31m" * 1000},
        {"bias": ["\x1b"] * 1000},
        {"init_lora_weights": "\x07" * 5000},
        {"\x1b[2J" * 100: 1},
        {"use_x": "\r\n" * 1000},
        {"r": "\u202e" * 5000},
        {"lora_alpha": ["\x00"]},
        {"alpha_pattern": {"(" * 5000: 1}},
        {"rank_pattern": {"q": "\n"}},
        {f"unknown_{number}": 1 for number in range(1000)},
    ],
    ids=[
        "peft_type",
        "bias",
        "init",
        "name",
        "value",
        "rank",
        "alpha",
        "pattern",
        "rank of a pattern",
        "many",
    ],
)
def test_no_refusal_repeats_what_a_terminal_would_act_upon(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        load_adapter(make.folder(tmp_path, tiny(), **fields))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2500
