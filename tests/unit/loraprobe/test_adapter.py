"""Adapters and their deltas.

Theorems about B @ A that hold for every factorisation, each with a case where it fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraprobe.adapters.adapter import Adapter, LazyPairs
from loraprobe.adapters.deltas import add_delta, factor_delta, weight_delta
from loraprobe.adapters.layout import Layout, layer_of, pack, unpack
from loraprobe.adapters.pair import LazyTensor, LoRAPair
from loraprobe.errors import AdapterFormatError, KindMismatch, LayoutMismatch, NonFiniteError
from tests.helpers import make

DOUBLE = torch.float64
SHAPES = [
    (10, 12, 4),
    (3, 12, 8),
    (12, 3, 8),
    (5, 5, 5),
    (6, 4, 9),
    (7, 2, 1),
    (1, 1, 3),
]  # (d_out, d_in, r); some r > min(d)


def dense(pair: LoRAPair) -> np.ndarray:
    """The definition, scaling * B @ A, in NumPy and float64: (d_out, d_in)."""
    return pair.scaling * pair.B.astype(float) @ pair.A.astype(float)


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """The relative distance of two arrays."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# --- spectra and norms


@pytest.mark.parametrize(("d_out", "d_in", "r"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_singular_values_are_those_of_the_dense_product(
    d_out: int, d_in: int, r: int, dtype: torch.dtype
) -> None:
    pair = make.pair(d_out, d_in, r, dtype=dtype, scaling=-1.5)
    expected = np.linalg.svd(dense(pair), compute_uv=False)
    values = pair.svdvals()
    assert values.dtype == np.float64
    assert values.shape == (min(r, d_out, d_in),)
    np.testing.assert_allclose(values, expected[: len(values)], rtol=0, atol=1e-9 * expected[0])
    np.testing.assert_allclose(
        expected[len(values) :], 0, atol=1e-12 * expected[0]
    )  # what is left out is zero
    assert max(pair.core().shape) <= r


def test_an_untrained_adapter_has_no_singular_values_above_zero() -> None:
    pair = LoRAPair(make.pair().A, torch.zeros(10, 4), 2.0)
    assert pair.svdvals().tolist() == [0.0] * 4
    assert pair.norm("frobenius") == pair.norm("spectral") == pair.norm("nuclear") == 0.0


@pytest.mark.parametrize(("d_out", "d_in", "r"), SHAPES)
@pytest.mark.parametrize(
    ("kind", "order"), [("frobenius", "fro"), ("spectral", 2), ("nuclear", "nuc")]
)
def test_norms_are_those_of_the_dense_product(
    d_out: int, d_in: int, r: int, kind: str, order: str | int
) -> None:
    pair = make.pair(d_out, d_in, r, dtype=DOUBLE)
    assert pair.norm(kind) == pytest.approx(np.linalg.norm(dense(pair), order), rel=1e-12)  # type: ignore[arg-type]


def test_an_unknown_norm_is_named() -> None:
    with pytest.raises(ValueError, match="'max'; expected frobenius, spectral or nuclear"):
        make.pair().norm("max")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_spectra_do_not_depend_on_the_factorisation_but_factors_do(seed: int) -> None:
    pair = make.pair(seed=seed, dtype=DOUBLE)
    same = make.gauged(pair, seed)
    np.testing.assert_allclose(same.svdvals(), pair.svdvals(), rtol=1e-11)
    assert difference(same.B, pair.B) > 0.1  # what the paper's features read
    assert difference(same.A, pair.A) > 0.1
    G = np.linalg.lstsq(pair.B, same.B)[0]
    other = LoRAPair(G @ pair.A, same.B, pair.scaling)  # (B G, G A): not a gauge
    assert difference(other.svdvals(), pair.svdvals()) > 0.1


def test_singular_values_scale_with_scaling_and_with_either_factor() -> None:
    pair = make.pair(dtype=DOUBLE)
    for scaled in (
        LoRAPair(pair.A, pair.B, -3 * pair.scaling),
        LoRAPair(3 * pair.A, pair.B, pair.scaling),
        LoRAPair(pair.A, 3 * pair.B, pair.scaling),
    ):
        np.testing.assert_allclose(scaled.svdvals(), 3 * pair.svdvals(), rtol=1e-12)


# --- the canonical form


@pytest.mark.parametrize(("d_out", "d_in", "r"), SHAPES)
def test_the_canonical_form_has_the_same_product_and_balanced_factors(
    d_out: int, d_in: int, r: int
) -> None:
    pair = make.pair(d_out, d_in, r, dtype=DOUBLE, scaling=-0.5)
    form = pair.canonical()
    k = min(d_out, d_in, r)
    assert (form.shape_of("A"), form.shape_of("B"), form.scaling) == ((k, d_in), (d_out, k), 1.0)
    assert difference(form.dense(), dense(pair)) < 1e-6
    spectrum = np.diag(pair.svdvals())
    np.testing.assert_allclose(form.A @ form.A.T, spectrum, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(form.B.T @ form.B, spectrum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_canonical_form_depends_on_the_product_only(seed: int) -> None:
    pair = make.pair(seed=seed, dtype=DOUBLE)
    form = pair.canonical()
    for same in (
        make.gauged(pair, seed),
        LoRAPair(-pair.A, -pair.B, pair.scaling),
        LoRAPair(2 * pair.A, pair.B, pair.scaling / 2),
        form,
    ):
        assert difference(same.canonical().A, form.A) < 1e-5
        assert difference(same.canonical().B, form.B) < 1e-5
    negated = LoRAPair(
        pair.A, pair.B, -pair.scaling
    ).canonical()  # another product: A changes its sign, B does not
    assert difference(negated.A, form.A) == pytest.approx(2.0)
    assert difference(negated.B, form.B) < 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_never_reach_a_decomposition(bad: float) -> None:
    A = make.pair().A.copy()
    A[1, 2] = bad
    overflowing = LoRAPair(
        torch.full((2, 3), 1e300, dtype=DOUBLE), torch.full((3, 2), 1e300, dtype=DOUBLE)
    )
    for pair in (LoRAPair(A, make.pair().B), overflowing):
        for method in (pair.svdvals, pair.norm, pair.canonical):
            with pytest.raises(NonFiniteError, match="NaN or infinity"):
                method()


# --- pairs and adapters as values


@pytest.mark.parametrize(
    ("a", "b", "scaling", "says"),
    [
        ((4, 12), (10, 5), 1.0, "of one rank"),
        ((12,), (10, 4), 1.0, r"\(12,\)"),
        ((4, 3, 3), (10, 4), 1.0, r"\(4, 3, 3\)"),
        ((0, 12), (10, 0), 1.0, "r >= 1"),
        ((4, 12), (0, 4), 1.0, r"\(0, 4\)"),
        ((4, 12), (10, 4), 0.0, "scaling 0.0; expected a finite number other than 0"),
        ((4, 12), (10, 4), math.nan, "scaling nan"),
        ((4, 12), (10, 4), -math.inf, "scaling -inf"),
    ],
)
def test_a_pair_needs_two_matrices_of_one_rank_and_a_scaling(
    a: tuple[int, ...], b: tuple[int, ...], scaling: float, says: str
) -> None:
    with pytest.raises(AdapterFormatError, match=says):
        LoRAPair(torch.zeros(a), torch.zeros(b), scaling)


def test_half_precision_is_widened_when_it_is_read_and_double_is_kept() -> None:
    for stored, read in (
        (torch.float16, np.float32),
        (torch.bfloat16, np.float32),
        (torch.float32, np.float32),
        (DOUBLE, np.float64),
    ):
        pair = make.pair(dtype=stored)
        assert (pair.A.dtype, pair.B.dtype) == (read, read)
    trained = torch.randn(2, 3, requires_grad=True)
    assert isinstance(LoRAPair(trained, torch.zeros(4, 2)).A, np.ndarray)


def test_an_adapter_is_sorted_immutable_and_equal_to_itself_only() -> None:
    pairs = {name: make.pair() for name in ("b", "a", "c")}
    adapter = Adapter(pairs)
    assert list(adapter) == ["a", "b", "c"]
    pairs["d"] = make.pair()
    assert len(adapter) == 3
    with pytest.raises(TypeError):
        adapter["d"] = make.pair()  # type: ignore[index]
    with pytest.raises(AttributeError):
        adapter["a"].A = torch.zeros(4, 12)  # type: ignore[misc]
    assert adapter == adapter
    assert adapter != Adapter(dict(adapter))
    assert len({adapter, adapter}) == 1
    with pytest.raises(AdapterFormatError, match="without a single LoRA module"):
        Adapter({})
    with pytest.raises(
        AdapterFormatError,
        match="kind 'delta'; expected one of weights, factor_delta, weight_delta",
    ):
        Adapter(pairs, kind="delta")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.12.self_attn.q_proj", 12),
        ("transformer.h.3.attn.c_attn", 3),
        ("encoder.layer.0.attention.self.query", 0),
        ("blocks.7.qkv", 7),
        ("layers.4", 4),
        ("lm_head", None),
        ("model.players.2.q_proj", None),
        ("model.layers.x.q_proj", None),
        ("layers." + "9" * 5000 + ".q_proj", None),  # int() refuses so many digits
    ],
)
def test_the_layer_is_read_from_the_module_path(module: str, layer: int | None) -> None:
    assert layer_of(module) == layer


class Reads:
    """Makes an adapter of lazy tensors and lists what was read of it."""

    def __init__(self, of: Adapter) -> None:
        self.names: list[str] = []
        self.adapter = Adapter(
            {
                name: LoRAPair(
                    self._lazy(name, "A", pair.A), self._lazy(name, "B", pair.B), pair.scaling
                )
                for name, pair in of.items()
            }
        )

    def _lazy(self, name: str, factor: str, tensor: np.ndarray) -> LazyTensor:
        def load() -> np.ndarray:
            self.names.append(f"{name}.{factor}")
            return tensor

        return LazyTensor(tuple(tensor.shape), load)


def test_nothing_is_read_before_it_is_asked_for_and_then_only_that() -> None:
    after, before = Reads(make.adapter(seed=1)), Reads(make.adapter(seed=2))
    deltas = (
        factor_delta(after.adapter, before.adapter),
        factor_delta(after.adapter, None),
        weight_delta(after.adapter, before.adapter),
    )
    for delta in (after.adapter, *deltas):
        Layout.of(delta).check(delta)
        assert (delta[make.module()].shape, repr(delta).startswith("Adapter(4 modules")) == (
            (10, 12),
            True,
        )
    assert after.names == before.names == []
    _ = deltas[0][make.module()].B
    _ = deltas[1][make.module()].B
    assert after.names == [f"{make.module()}.B"] * 2
    assert before.names == [f"{make.module()}.B"]
    loaded = after.adapter.load()  # the control: now everything is read, and once
    assert len(after.names) == 2 + 8
    _ = loaded[make.module()].A
    assert len(after.names) == 2 + 8


def test_pairs_are_made_once_when_they_are_asked_for() -> None:
    made: list[str] = []

    def pair(module: str) -> LoRAPair:
        made.append(module)
        return make.pair()

    adapter = Adapter(LazyPairs(["b", "a"], pair), kind="weights")
    assert (list(adapter), len(adapter), "a" in adapter, "c" in adapter, made) == (
        ["a", "b"],
        2,
        True,
        False,
        [],
    )
    assert adapter["b"] is adapter["b"]
    assert made == ["b"]
    with pytest.raises(KeyError):
        adapter["c"]
    assert [name for name, _ in adapter.items()] == ["a", "b"]
    assert made == ["b", "a"]


# --- deltas


def test_the_weight_delta_is_the_change_of_the_weight_and_the_product_of_factor_deltas_is_not() -> (
    None
):
    after, before = make.adapter(seed=1, dtype=DOUBLE), make.adapter(seed=2, dtype=DOUBLE)
    exact, factors = weight_delta(after, before), factor_delta(after, before)
    assert (exact.kind, factors.kind) == ("weight_delta", "factor_delta")
    for name in after:
        change = dense(after[name]) - dense(before[name])
        assert difference(dense(exact[name]), change) < 1e-14
        np.testing.assert_allclose(
            exact[name].svdvals()[:6], np.linalg.svd(change, compute_uv=False)[:6], rtol=1e-9
        )
        assert exact[name].norm("nuclear") == pytest.approx(
            np.linalg.norm(change, "nuc"), rel=1e-12
        )
        assert difference(dense(factors[name]), change) > 0.5


def test_the_weight_delta_takes_other_ranks_and_scalings_before_than_after() -> None:
    after, before = (
        make.adapter(seed=1, r=3, scaling=2.0, dtype=DOUBLE),
        make.adapter(seed=2, r=5, scaling=-0.25, dtype=DOUBLE),
    )
    exact = weight_delta(after, before)
    for name in after:
        assert exact[name].rank == 8
        assert difference(dense(exact[name]), dense(after[name]) - dense(before[name])) < 1e-14
    with pytest.raises(LayoutMismatch):  # factors of different ranks have no difference
        factor_delta(after, before)
    still = weight_delta(after, Adapter({name: make.gauged(pair) for name, pair in after.items()}))
    assert all(
        still[name].norm() < 1e-12 * after[name].norm() for name in after
    )  # another gauge is no change


def test_the_factor_delta_subtracts_factor_by_factor() -> None:
    after, before = (
        make.adapter(seed=1, dtype=torch.bfloat16, base_model="org/base"),
        make.adapter(seed=2),
    )
    delta = factor_delta(after, before)
    assert delta.base_model == "org/base"
    for name in after:
        assert np.array_equal(delta[name].A, after[name].A - before[name].A)
        assert np.array_equal(delta[name].B, after[name].B - before[name].B)
        assert delta[name].scaling == after[name].scaling


def test_adding_the_factor_delta_to_the_start_gives_the_end_again() -> None:
    after, before = (
        make.adapter(seed=1, dtype=DOUBLE),
        make.adapter(seed=2, dtype=DOUBLE, base_model="org/base"),
    )
    delta = factor_delta(after, before)
    back = add_delta(before, delta)
    assert (back.kind, back.base_model) == ("weights", "org/base")
    for name, pair in after.items():
        np.testing.assert_allclose(back[name].A, pair.A, rtol=0, atol=1e-14)
        np.testing.assert_allclose(back[name].B, pair.B, rtol=0, atol=1e-14)
        assert difference(back[name].A, before[name].A) > 0.5  # the control
    for wrong in (after, weight_delta(after, before)):
        with pytest.raises(KindMismatch):
            add_delta(before, wrong)
    with pytest.raises(KindMismatch):
        add_delta(delta, delta)
    for misfit in ("rank", "width", "one shape", "scaling", "module", "names"):
        other = MISFITS[misfit][0]
        with pytest.raises(LayoutMismatch, match=r"model\.layers\.[01]\.self_attn"):
            add_delta(before, factor_delta(other, other))


def test_without_a_start_the_factor_delta_knows_b_and_refuses_a() -> None:
    after = make.adapter()
    delta = factor_delta(after, None)
    assert delta.kind == "factor_delta"
    assert np.array_equal(delta[make.module()].B, after[make.module()].B)
    for read in (lambda: delta[make.module()].A, lambda: pack(delta), delta.load):
        with pytest.raises(
            KindMismatch, match=r"model\.layers\.0\.self_attn\.q_proj: the delta of lora_A needs"
        ):
            read()


@pytest.mark.parametrize("take", [factor_delta, weight_delta])
@pytest.mark.parametrize("kind", ["factor_delta", "weight_delta"])
def test_a_delta_is_taken_of_weights_only(
    take: Callable[[Adapter, Adapter], Adapter], kind: str
) -> None:
    weights, delta = make.adapter(), make.adapter(kind=kind)  # type: ignore[arg-type]
    for after, before in ((delta, weights), (weights, delta), (delta, delta)):
        with pytest.raises(
            KindMismatch,
            match=rf"kind '{kind}'; a delta is taken of two adapters of kind 'weights'",
        ):
            take(after, before)
    with pytest.raises(KindMismatch):
        factor_delta(delta, None)
    assert len(take(weights, weights)) == 4  # the control


# --- layouts


def without(adapter: Adapter, module: str) -> Adapter:
    return Adapter({name: pair for name, pair in adapter.items() if name != module})


FIRST = make.module()
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
    layout = Layout.of(make.adapter())
    layout.check(make.adapter(seed=9))  # the control: other numbers fit
    for use in (lambda: layout.check(adapter), lambda: pack(adapter, layout)):
        with pytest.raises(LayoutMismatch) as caught:
            use()
        assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("misfit", ["rank", "width", "one shape", "scaling", "module", "names"])
def test_a_factor_delta_of_adapters_that_differ_in_layout_is_refused(misfit: str) -> None:
    for after, before in (
        (MISFITS[misfit][0], make.adapter()),
        (make.adapter(), MISFITS[misfit][0]),
    ):
        with pytest.raises(LayoutMismatch, match=r"model\.layers\.[01]\.self_attn"):
            factor_delta(after, before)


@pytest.mark.parametrize("misfit", ["width", "one shape", "module", "names"])
def test_a_weight_delta_of_different_weights_is_refused(misfit: str) -> None:
    with pytest.raises(LayoutMismatch, match=r"model\.layers\.[01]\.self_attn"):
        weight_delta(MISFITS[misfit][0], make.adapter())


def test_a_layout_takes_one_kind_and_says_how_to_get_it() -> None:
    weights, delta = make.adapter(), factor_delta(make.adapter(seed=1), make.adapter())
    with pytest.raises(
        KindMismatch,
        match=r"kind 'weights'; expected 'factor_delta'\. Take factor_delta\(after, before\)",
    ):
        Layout.of(delta).check(weights)
    with pytest.raises(KindMismatch, match=r"kind 'factor_delta'; expected 'weights'\.$"):
        Layout.of(weights).check(delta)


def test_a_layout_of_some_modules_ignores_the_others() -> None:
    layout = Layout.of(make.adapter(), [FIRST], ("B",))
    assert [(slot.module, slot.factor, slot.shape) for slot in layout.slots] == [
        (FIRST, "B", (10, 4))
    ]
    layout.check(Adapter({FIRST: make.pair(d_in=99), "other": make.pair(1, 1, 1)}))
    with pytest.raises(LayoutMismatch):
        layout.check(Adapter({FIRST: make.pair(d_out=99)}))


# --- pack and unpack

dimensions = st.integers(1, 7)
layouts = st.dictionaries(
    st.sampled_from("abcdefg"),
    st.tuples(dimensions, dimensions, dimensions),
    min_size=1,
    max_size=4,
)


@given(
    layouts,
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
    adapter = Adapter(pairs, kind=kind)  # type: ignore[arg-type]
    vector, layout = pack(adapter)
    assert (vector.dtype, vector.shape) == (
        torch.float32,
        (sum(r * (o + i) for o, i, r in shapes.values()),),
    )
    back = unpack(vector, layout, base_model="org/base")
    assert (back.kind, back.base_model, list(back)) == (kind, "org/base", sorted(shapes))
    for name, pair in adapter.items():
        assert np.array_equal(back[name].A, pair.A)
        assert np.array_equal(back[name].B, pair.B)
        assert back[name].scaling == pair.scaling
    random = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(unpack(random, layout), layout)[0], random)
    assert (
        not torch.equal(pack(unpack(random.flip(0), layout), layout)[0], random) or layout.size == 1
    )  # the control


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
    with pytest.raises(
        LayoutMismatch, match=r"only one factor of 'model\.layers\.0\.self_attn\.q_proj'"
    ):
        unpack(torch.zeros(half.size), half)


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, 1e39]
)  # the last is finite, but not in float32
@pytest.mark.parametrize("factor", ["A", "B"])
def test_pack_names_what_is_not_finite(bad: float, factor: str) -> None:
    good = make.pair(dtype=DOUBLE)
    tensors = {"A": good.A.copy(), "B": good.B.copy()}
    tensors[factor][2, 1] = bad
    adapter = make.with_pairs(
        make.adapter(), {make.module("q_proj", 1): LoRAPair(**tensors, scaling=2.0)}
    )
    with pytest.raises(
        NonFiniteError,
        match=(
            rf"model\.layers\.1\.self_attn\.q_proj, lora_{factor}: 1 of {tensors[factor].size}"
            r" values"
        ),
    ):
        pack(adapter)
