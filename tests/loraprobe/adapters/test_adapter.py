"""Adapters and their deltas.

Theorems about B @ A that hold for every factorisation, each with a case where it fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from loraprobe.adapters.adapter import Adapter, LazyPairs
from loraprobe.adapters.deltas import add_delta, factor_delta, weight_delta
from loraprobe.adapters.layout import Layout, layer_of, pack
from loraprobe.adapters.pair import LazyTensor, LoRAPair
from loraprobe.errors import AdapterFormatError, KindMismatch, LayoutMismatch, NonFiniteError
from tests.helpers import make

DOUBLE = torch.float64
# (d_out, d_in, r); some r > min(d)
SHAPES = [(10, 12, 4), (3, 12, 8), (12, 3, 8), (5, 5, 5), (6, 4, 9), (7, 2, 1), (1, 1, 3)]
FIRST = make.module()


def dense(pair: LoRAPair) -> np.ndarray:
    """The definition, scaling * B @ A, in NumPy and float64: (d_out, d_in)."""
    return pair.scaling * pair.B.astype(float) @ pair.A.astype(float)


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """The relative distance of two arrays."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# --- spectra, norms and the canonical form


@pytest.mark.parametrize(("d_out", "d_in", "r"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_spectra_and_norms_are_those_of_the_dense_product(
    d_out: int, d_in: int, r: int, dtype: torch.dtype
) -> None:
    pair = make.pair(d_out, d_in, r, dtype=dtype, scaling=-1.5)
    expected = np.linalg.svd(dense(pair), compute_uv=False)
    values = pair.svdvals()
    assert (values.dtype, values.shape) == (np.float64, (min(r, d_out, d_in),))
    np.testing.assert_allclose(values, expected[: len(values)], rtol=0, atol=1e-9 * expected[0])
    # what is left out is zero
    np.testing.assert_allclose(expected[len(values) :], 0, atol=1e-12 * expected[0])
    assert max(pair.core().shape) <= r
    for kind, order in (("frobenius", "fro"), ("spectral", 2), ("nuclear", "nuc")):
        norm = np.linalg.norm(dense(pair), order)
        assert pair.norm(kind) == pytest.approx(norm, rel=1e-9)
    with pytest.raises(ValueError, match="'max'; expected frobenius, spectral or nuclear"):
        pair.norm("max")
    untrained = LoRAPair(pair.A, torch.zeros(d_out, r), 2.0)
    assert not untrained.svdvals().any()
    assert untrained.norm("frobenius") == 0.0


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
def test_spectra_and_canonical_form_depend_on_the_product_only_and_factors_do_not(
    seed: int,
) -> None:
    pair = make.pair(seed=seed, dtype=DOUBLE)
    form, gauged = pair.canonical(), make.gauged(pair, seed)
    for same in (
        gauged,
        LoRAPair(-pair.A, -pair.B, pair.scaling),
        LoRAPair(2 * pair.A, pair.B, pair.scaling / 2),
        form,
    ):
        np.testing.assert_allclose(same.svdvals(), pair.svdvals(), rtol=1e-6)
        assert difference(same.canonical().A, form.A) < 1e-5
        assert difference(same.canonical().B, form.B) < 1e-5
    assert difference(gauged.B, pair.B) > 0.1  # what the paper's features read
    assert difference(gauged.A, pair.A) > 0.1
    G = np.linalg.lstsq(pair.B, gauged.B, rcond=None)[0]
    other = LoRAPair(G @ pair.A, gauged.B, pair.scaling)  # (B G, G A): not a gauge
    assert difference(other.svdvals(), pair.svdvals()) > 0.1
    # another product: A changes its sign, B does not
    negated = LoRAPair(pair.A, pair.B, -pair.scaling).canonical()
    assert difference(negated.A, form.A) == pytest.approx(2.0)
    assert difference(negated.B, form.B) < 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_never_reach_a_decomposition(bad: float) -> None:
    A = make.pair().A.copy()
    A[1, 2] = bad
    huge = torch.full((2, 2), 1e300, dtype=DOUBLE)
    for pair in (LoRAPair(A, make.pair().B), LoRAPair(huge, huge)):
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


@pytest.mark.parametrize(
    ("stored", "read"),
    [(torch.float16, np.float32), (torch.bfloat16, np.float32), (DOUBLE, np.float64)],
)
def test_half_precision_is_widened_when_it_is_read_and_double_is_kept(
    stored: torch.dtype, read: type
) -> None:
    pair = make.pair(dtype=stored)
    assert (pair.A.dtype, pair.B.dtype) == (read, read)
    trained = torch.randn(2, 3, requires_grad=True)
    assert isinstance(LoRAPair(trained, torch.zeros(4, 2)).A, np.ndarray)


def test_an_adapter_is_sorted_immutable_and_equal_to_itself_only() -> None:
    pairs = {name: make.pair() for name in ("b", "a", "c")}
    adapter = Adapter(pairs)
    pairs["d"] = make.pair()
    assert list(adapter) == ["a", "b", "c"]
    with pytest.raises(TypeError):
        adapter["d"] = make.pair()
    with pytest.raises(AttributeError):
        adapter["a"].A = torch.zeros(4, 12)
    assert adapter == adapter
    assert adapter != Adapter(dict(adapter))
    with pytest.raises(AdapterFormatError, match="without a single LoRA module"):
        Adapter({})
    kinds = "kind 'delta'; expected one of weights, factor_delta, weight_delta"
    with pytest.raises(AdapterFormatError, match=kinds):
        Adapter(pairs, kind="delta")


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.12.self_attn.q_proj", 12),
        ("transformer.h.3.attn.c_attn", 3),
        ("encoder.layer.0.attention.self.query", 0),
        ("blocks.7.qkv", 7),
        ("lm_head", None),
        ("model.players.2.q_proj", None),
        ("layers." + "9" * 5000 + ".q_proj", None),  # int() refuses so many digits
    ],
)
def test_the_layer_is_read_from_the_module_path(module: str, layer: int | None) -> None:
    assert layer_of(module) == layer


def lazy(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """The adapter with every pair and factor made when it is asked for, and the list of those."""
    read: list[str] = []

    def tensor(name: str, factor: str, array: np.ndarray) -> LazyTensor:
        return LazyTensor(array.shape, lambda: read.append(f"{name}.{factor}") or array)

    def pair(name: str) -> LoRAPair:
        made = adapter[name]
        return LoRAPair(tensor(name, "A", made.A), tensor(name, "B", made.B), made.scaling)

    return Adapter(LazyPairs(reversed(list(adapter)), pair), kind=adapter.kind), read


def test_nothing_is_read_before_it_is_asked_for_and_then_only_that() -> None:
    after, read = lazy(make.adapter(seed=1))
    before, read_before = lazy(make.adapter(seed=2))
    deltas = (factor_delta(after, before), factor_delta(after, None), weight_delta(after, before))
    for delta in (after, *deltas):
        Layout.of(delta).check(delta)
        assert delta[FIRST].shape == (10, 12)
        assert (list(delta), "other" in delta) == (sorted(make.adapter()), False)
        assert repr(delta).startswith("Adapter(4 modules")
    assert read == read_before == []
    _ = deltas[0][FIRST].B
    _ = deltas[1][FIRST].B
    assert read == [f"{FIRST}.B"] * 2
    assert read_before == [f"{FIRST}.B"]
    loaded = after.load()  # the control: now everything is read, and once
    _ = loaded[FIRST].A
    assert len(read) == 2 + 8


# --- deltas


def test_the_weight_delta_is_the_change_of_the_weight_and_the_product_of_factor_deltas_is_not() -> (
    None
):
    after, before = make.adapter(seed=1, dtype=DOUBLE), make.adapter(seed=2, dtype=DOUBLE)
    exact, factors = weight_delta(after, before), factor_delta(after, before)
    assert (exact.kind, factors.kind) == ("weight_delta", "factor_delta")
    for name in after:
        change = dense(after[name]) - dense(before[name])
        values = np.linalg.svd(change, compute_uv=False)[:6]
        assert difference(dense(exact[name]), change) < 1e-14
        np.testing.assert_allclose(exact[name].svdvals()[:6], values, rtol=1e-9)
        assert difference(dense(factors[name]), change) > 0.5


def test_the_weight_delta_takes_other_ranks_and_scalings_before_than_after() -> None:
    after = make.adapter(seed=1, r=3, scaling=2.0, dtype=DOUBLE)
    before = make.adapter(seed=2, r=5, scaling=-0.25, dtype=DOUBLE)
    exact = weight_delta(after, before)
    for name in after:
        assert exact[name].rank == 8
        assert difference(dense(exact[name]), dense(after[name]) - dense(before[name])) < 1e-14
    with pytest.raises(LayoutMismatch):  # factors of different ranks have no difference
        factor_delta(after, before)
    still = weight_delta(after, Adapter({name: make.gauged(pair) for name, pair in after.items()}))
    for name in after:  # another gauge is no change
        assert still[name].norm() < 1e-12 * after[name].norm()


def test_the_factor_delta_subtracts_by_factor_and_adding_it_gives_the_end_again() -> None:
    after = make.adapter(seed=1, dtype=torch.bfloat16, base_model="org/base")
    before = make.adapter(seed=2, dtype=DOUBLE, base_model="org/base")
    delta = factor_delta(after, before)
    back = add_delta(before, delta)
    assert (back.kind, back.base_model, delta.base_model) == ("weights", "org/base", "org/base")
    for name, pair in after.items():
        assert delta[name].scaling == pair.scaling
        for factor in ("A", "B"):
            change = pair.factor(factor) - before[name].factor(factor)
            np.testing.assert_allclose(delta[name].factor(factor), change, rtol=0, atol=1e-7)
            end = pair.factor(factor)
            np.testing.assert_allclose(back[name].factor(factor), end, rtol=0, atol=1e-7)
    assert difference(back[FIRST].A, before[FIRST].A) > 0.5  # the control
    for start, wrong in ((before, after), (before, weight_delta(after, before)), (delta, delta)):
        with pytest.raises(KindMismatch):
            add_delta(start, wrong)


def test_without_a_start_the_factor_delta_knows_b_and_refuses_a() -> None:
    after = make.adapter()
    delta = factor_delta(after, None)
    assert delta.kind == "factor_delta"
    assert np.array_equal(delta[FIRST].B, after[FIRST].B)
    for read in (lambda: delta[FIRST].A, lambda: pack(delta), delta.load):
        with pytest.raises(KindMismatch, match=r"0\.self_attn\.q_proj: the delta of lora_A needs"):
            read()


@pytest.mark.parametrize("take", [factor_delta, weight_delta])
@pytest.mark.parametrize("kind", ["factor_delta", "weight_delta"])
def test_a_delta_is_taken_of_weights_only(
    take: Callable[[Adapter, Adapter], Adapter], kind: str
) -> None:
    weights, delta = make.adapter(), make.adapter(kind=kind)
    says = f"kind '{kind}'; a delta is taken of two adapters of kind 'weights'"
    for after, before in ((delta, weights), (weights, delta), (delta, delta)):
        with pytest.raises(KindMismatch, match=says):
            take(after, before)
    with pytest.raises(KindMismatch):
        factor_delta(delta, None)
    assert len(take(weights, weights)) == 4  # the control
