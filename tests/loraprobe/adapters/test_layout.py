"""Layouts: what fits one, and vectors that come back as the adapter they were packed from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraprobe import FeatureRecipe, Featurizer
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta, factor_delta, weight_delta
from loraprobe.adapters.layout import Layout, pack, unpack
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import AdapterFormatError, KindMismatch, LayoutMismatch, NonFiniteError
from tests.helpers import make
from tests.helpers.one_module import assert_same

DOUBLE = torch.float64
FIRST = make.module()

# --- layouts


def without(adapter: Adapter, module: str) -> Adapter:
    return Adapter({name: pair for name, pair in adapter.items() if name != module})


MISFITS: dict[str, tuple[Adapter, tuple[str, ...]]] = {
    "rank": (make.adapter(r=8), (FIRST, "(8, 12)", "(4, 12)")),
    "width": (
        make.adapter(dims={"q_proj": (10, 16), "v_proj": (6, 12)}),
        (FIRST, "A of shape (4, 16)", "expected (4, 12)"),
    ),
    "one shape": (
        make.with_pairs(make.adapter(), {FIRST: make.pair(11)}),
        (FIRST, "B of shape (11, 4)", "expected (10, 4)"),
    ),
    "scaling": (make.adapter(scaling=4.0), (FIRST, "scaling 4", "expected 2")),
    "module": (
        without(make.adapter(), make.module("v_proj", 1)),
        (make.module("v_proj", 1), "lacks 1 of 4"),
    ),
    "names": (
        make.adapter(dims={"q_proj": (10, 12), "k_proj": (6, 12)}),
        ("lacks 2 of 4", make.module("v_proj"), "it has 4"),
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_misfit_is_named_with_what_was_got_and_expected(misfit: str) -> None:
    adapter, words = MISFITS[misfit]
    fitting = make.adapter()
    layout = Layout.of(fitting)
    layout.check(make.adapter(seed=9))  # the control: other numbers fit
    for use in (lambda: layout.check(adapter), lambda: pack(adapter, layout)):
        with pytest.raises(LayoutMismatch) as caught:
            use()
        assert [word for word in words if word not in str(caught.value)] == []
    for take in (
        lambda: factor_delta(adapter, fitting),
        lambda: factor_delta(fitting, adapter),
        lambda: add_delta(fitting, factor_delta(adapter, adapter)),
        *([] if misfit in ("rank", "scaling") else [lambda: weight_delta(adapter, fitting)]),
    ):
        with pytest.raises(LayoutMismatch, match=r"model\.layers\.[01]\.self_attn"):
            take()


@pytest.mark.parametrize(
    "names",
    [
        *({"modules": wrong} for wrong in ("q_proj", [], ["q_proj"], [1], iter(["q_proj"]))),
        *({"factors": wrong} for wrong in ("lora_B", (), ("B", "B"), ["C"])),
    ],
)
def test_names_that_an_adapter_does_not_have_make_no_layout(names: dict[str, Any]) -> None:
    adapter = make.adapter()
    assert Layout.of(adapter, iter([FIRST]), ["B"]).size == 40  # the control
    with pytest.raises(LayoutMismatch, match=r"(modules|factors): got .* expected"):
        Layout.of(adapter, **names)


@pytest.mark.parametrize("wrong", [make.tensors(), "path", None, make.pair()])
def test_what_is_no_adapter_is_refused_by_its_type(wrong: Any) -> None:
    good = make.adapter()
    recipe = FeatureRecipe.all_b()
    for take in (
        lambda: pack(wrong),
        lambda: pack(wrong, Layout.of(good)),
        lambda: factor_delta(wrong, good),
        lambda: weight_delta(good, wrong),
        lambda: Featurizer.fit(recipe, [wrong]),
        lambda: Featurizer.fit("all_b", [good])([good, wrong]),
    ):
        with pytest.raises(AdapterFormatError, match=r"got \w+; expected an Adapter"):
            take()
    if not isinstance(wrong, dict):
        with pytest.raises(AdapterFormatError, match="expected a state dict"):
            Adapter.from_state_dict(wrong, alpha=8)


def test_a_layout_takes_one_kind_and_says_how_to_get_it() -> None:
    weights, delta = make.adapter(), factor_delta(make.adapter(seed=1), make.adapter())
    says = r"kind 'weights'; expected 'factor_delta'\. Take factor_delta\(after, before\)"
    with pytest.raises(KindMismatch, match=says):
        Layout.of(delta).check(weights)
    with pytest.raises(KindMismatch, match=r"kind 'factor_delta'; expected 'weights'\.$"):
        Layout.of(weights).check(delta)


def test_a_layout_of_some_modules_ignores_the_others() -> None:
    layout = Layout.of(make.adapter(), [FIRST], ("B",))
    [slot] = layout.slots
    assert (slot.module, slot.factor, slot.shape) == (FIRST, "B", (10, 4))
    layout.check(Adapter({FIRST: make.pair(d_in=99), "other": make.pair(1, 1, 1)}))
    with pytest.raises(LayoutMismatch):
        layout.check(Adapter({FIRST: make.pair(d_out=99)}))


# --- pack and unpack

dimensions = st.integers(1, 7)
shapes_by_name = st.dictionaries(
    st.sampled_from("abcdefg"),
    st.tuples(dimensions, dimensions, dimensions),
    min_size=1,
    max_size=4,
)


@given(
    shapes_by_name,
    st.sampled_from(["weights", "factor_delta", "weight_delta"]),
    st.floats(-8, 8).filter(bool),
)
@settings(deadline=None, max_examples=50)
def test_unpack_undoes_pack_and_pack_undoes_unpack(
    shapes: dict[str, tuple[int, int, int]], kind: str, scaling: float
) -> None:
    pairs = {
        name: make.pair(*shape, seed=index, scaling=scaling)
        for index, (name, shape) in enumerate(shapes.items())
    }
    adapter = Adapter(pairs, kind=kind)
    vector, layout = pack(adapter)
    size = sum(r * (o + i) for o, i, r in shapes.values())
    assert (vector.dtype, vector.shape) == (torch.float32, (size,))
    back = unpack(vector, layout, base_model="org/base")
    assert (back.kind, back.base_model, list(back)) == (kind, "org/base", sorted(shapes))
    assert_same(back, adapter)
    random = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(unpack(random, layout), layout)[0], random)


def test_packing_is_by_module_then_a_before_b_row_by_row() -> None:
    A, B = torch.arange(6.0).view(2, 3), torch.arange(6.0, 10.0).view(2, 2)
    adapter = Adapter({"m": LoRAPair(A, B), "a": LoRAPair(A - 100, B - 100)})
    assert pack(adapter)[0].tolist() == [*range(-100, -90), *range(10)]


def test_unpack_refuses_other_lengths_and_half_layouts() -> None:
    vector, layout = pack(make.adapter())
    for wrong in (vector[:-1], torch.cat([vector, vector[:1]]), vector[None]):
        with pytest.raises(LayoutMismatch, match=rf"expected \({layout.size},\)"):
            unpack(wrong, layout)
    half = Layout.of(make.adapter(), factors=("B",))
    with pytest.raises(LayoutMismatch, match=r"only one factor of 'model\.layers\.0"):
        unpack(torch.zeros(half.size), half)


# the last is finite, but not in float32
@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e39])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_pack_names_what_is_not_finite(bad: float, factor: str) -> None:
    good = make.pair(dtype=DOUBLE)
    factors = {"A": good.A.copy(), "B": good.B.copy()}
    factors[factor][2, 1] = bad
    module = make.module("q_proj", 1)
    adapter = make.with_pairs(make.adapter(), {module: LoRAPair(**factors, scaling=2.0)})
    says = rf"layers\.1\.self_attn\.q_proj, lora_{factor}: 1 of {factors[factor].size} values"
    with pytest.raises(NonFiniteError, match=says):
        pack(adapter)
