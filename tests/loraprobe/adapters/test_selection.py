"""Which modules are adapted, and with what rank and alpha: as PEFT itself decides."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraprobe.adapters.selection import Expressions, Patterns, Selection
from loraprobe.errors import AdapterFormatError, UnsupportedAdapterError

MODULES = [
    *(
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (0, 1, 12)
        for name in ("q_proj", "v_proj")
    ),
    *(f"model.layers.{layer}.mlp.experts.{layer + 1}.up_proj" for layer in (0, 1)),
    *"transformer.h.3.attn.c_attn layers.2.q_proj q_proj lm_head".split(),
]
NAMES = st.sampled_from(
    ["q_proj", "v_proj", "proj", "self_attn.q_proj", "1.self_attn.v_proj", "c_attn", "lm_head"]
    + ["model.layers.0.self_attn.q_proj", "layers.2.q_proj", "up_proj"]
)
EXPRESSIONS = st.sampled_from(
    [
        r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
        r".*\.[qv]_proj",
        r".*layers\.[0-1]\..*",
        "q_proj",
    ]
    + [r"(?:.*\.)?lm_head", r".*\.(?!0\.)\d+\..*", r".*self.attn.*", r"^model.*$", "a|.*q_proj"]
    + [r".*\d{2}.*", r"\w+"]
)
LISTS = st.lists(NAMES, min_size=1, max_size=3)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    target = draw(LISTS | EXPRESSIONS)
    config = {"target_modules": target, "exclude_modules": draw(st.none() | LISTS | EXPRESSIONS)}
    if not isinstance(target, str):
        layers = draw(st.none() | st.integers(0, 3) | st.lists(st.integers(0, 12), max_size=3))
        config["layers_to_transform"] = layers
        if layers is not None:
            patterns = st.sampled_from(["layers", "h", "experts", "", "layers|h", r"lay\w+"])
            config["layers_pattern"] = draw(st.none() | patterns | st.lists(patterns, max_size=2))
    return config


@pytest.mark.slow
@given(configurations())
@settings(max_examples=400, deadline=None)
def test_the_selected_modules_are_those_that_peft_selects(config: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = LoraConfig(**config)
    try:
        selects = Selection.of_config(config).selector(Expressions())
        ours = [module for module in MODULES if selects(module)]
    except UnsupportedAdapterError:
        assert config["layers_pattern"] in ("", [""], ["", ""]) or "" in config["layers_pattern"]
        return
    assert ours == [m for m in MODULES if bool(check_target_module_exists(theirs, m))]


KEYS = (
    NAMES
    | EXPRESSIONS
    | st.sampled_from(
        ["^q_proj", "^model.layers.1.self_attn.q_proj", r"^model\.layers\.0\.self_attn\.q_proj"]
        + ["(q|v)_proj", "q.proj", "1.self.attn.v_proj", "roj", r".*\.mlp\.gate_proj", "q|v_proj"]
    )
)


@pytest.mark.slow
@given(st.dictionaries(KEYS, st.integers(1, 64), max_size=4))
@settings(max_examples=400, deadline=None)
def test_the_value_of_a_pattern_is_that_which_peft_takes(values: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    patterns = Patterns(values, Expressions())
    for module in MODULES:
        theirs = values.get(get_pattern_key(list(values), module), 7)
        assert patterns.value(module, 7) == theirs


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "got no target_modules"),
        ({"target_modules": []}, "got no target_modules"),
        ({"target_modules": ["q", 1]}, "got target_modules .* expected a name or a list"),
        ({"target_modules": {"q": 1}}, "got target_modules"),
        ({"target_modules": ["q"], "layers_to_transform": "1"}, "got layers_to_transform 1"),
        ({"target_modules": ["q"], "layers_to_transform": [True]}, "got layers_to_transform"),
        ({"target_modules": "q", "layers_to_transform": [1]}, "with a list of names only"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "without layers_to_transform"),
    ],
)
def test_what_peft_does_not_take_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(AdapterFormatError, match=says):
        Selection.of_config(config)


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "(?i)q_proj",
        r"(q)\1",
        "(?P<a>q)",
        "q{e<=1}",
        r"\p{L}",
        "[[a]]",
        "x" * 1001,
        "(?>q)",
        "",
    ],
)
def test_an_expression_that_two_libraries_could_read_two_ways_is_not_run(pattern: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match="expected a module name or a regular"):
        Patterns({pattern: 1}, Expressions())


def test_all_linear_is_everything_but_the_head() -> None:
    selects = Selection.of_config({"target_modules": "all-linear"}).selector(Expressions())
    assert [module for module in MODULES if not selects(module)] == ["lm_head"]


def test_an_expression_that_would_hang_is_given_up() -> None:
    hostile = Selection.of_config({"target_modules": r"(\w|\w\w)+[^a]"}).selector(Expressions(0.1))
    began = time.process_time()
    with pytest.raises(UnsupportedAdapterError, match="takes too long"):
        hostile("a" * 400)
    assert time.process_time() - began < 5
