"""Features as pure functions.

The recorded official features, spectra against NumPy, norms with known values, scaling laws.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta, weight_delta
from loraprobe.adapters.layout import Layout, split
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import KindMismatch, NonFiniteError
from loraprobe.features import canonical, l2_normalised, norms, pooled, slices, spectra
from tests.helpers import make

DOUBLE = torch.float64
AFTER, BEFORE = make.adapter(seed=1, dtype=DOUBLE), make.adapter(seed=2, dtype=DOUBLE)


def svd(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix.astype(float), compute_uv=False)


# --- spectra


def test_spectra_of_weights_and_weight_deltas_are_those_of_the_product() -> None:
    for adapter in (AFTER, weight_delta(AFTER, BEFORE)):
        values = spectra(adapter, list(adapter), ("B",))  # factors matter to factor deltas only
        assert list(values) == [(name, "BA") for name in adapter]
        for name, pair in adapter.items():
            got = values[name, "BA"]
            np.testing.assert_allclose(got, svd(pair.dense())[: len(got)], rtol=1e-9)


def test_spectra_of_factor_deltas_are_those_of_each_factor() -> None:
    delta = factor_delta(AFTER, BEFORE)
    values = spectra(delta, list(delta), ("A", "B"))
    assert list(values) == [(name, factor) for name in delta for factor in ("A", "B")]
    for (name, factor), got in values.items():
        np.testing.assert_allclose(got, svd(delta[name].factor(factor)), rtol=1e-9)
    assert set(spectra(delta, [make.module()], ("B",))) == {(make.module(), "B")}
    product = spectra(weight_delta(AFTER, BEFORE), [make.module()], ("B",))[make.module(), "BA"]
    # the product of changes is the change of nothing
    assert np.abs(svd(delta[make.module()].dense())[:4] - product[:4]).max() > 1.0


def test_batching_by_shape_does_not_mix_matrices_up() -> None:
    shapes = [(9, 7, 3), (2, 7, 3), (9, 7, 3), (9, 2, 5), (2, 7, 3), (9, 7, 2)]
    adapter = Adapter(
        {f"m{index}": make.pair(*shape, seed=index) for index, shape in enumerate(shapes)}
    )
    order = ["m5", "m0", "m3", "m1", "m4", "m2"]
    values = spectra(adapter, order, ("A",))
    assert [module for module, _ in values] == order
    for name, pair in adapter.items():
        np.testing.assert_allclose(values[name, "BA"], pair.svdvals(), rtol=1e-12)


# --- the canonical form


def test_canonical_factors_have_the_shapes_of_the_slots_with_zeros_behind() -> None:
    adapter = Adapter({"m": make.pair(3, 8, 5)})  # rank 5, but B @ A has rank 3
    slots = Layout.of(adapter).slots
    A, B = (matrix for _, matrix in split(canonical(adapter, slots), slots))
    assert not A[3:].any()
    assert not B[:, 3:].any()
    np.testing.assert_allclose(B @ A, adapter["m"].dense(), rtol=1e-4, atol=1e-5)


# --- norms


def test_norms_of_known_spectra() -> None:
    entropy = -(4 / 7 * math.log(4 / 7) + 3 / 7 * math.log(3 / 7))
    expected = [math.log(5), math.log(4), math.log(7), 25 / 16, math.exp(entropy)]
    np.testing.assert_allclose(norms(np.array([4.0, 3.0])), expected, rtol=1e-14)
    np.testing.assert_allclose(norms(np.ones(6))[3:], [6, 6], rtol=1e-14)
    np.testing.assert_allclose(norms(np.array([2.0, 0.0, 0.0]))[3:], [1, 1], rtol=1e-14)
    for tiny in (0.0, 1e-13):
        np.testing.assert_allclose(norms(np.full(4, tiny))[3:], [0, 0])
    np.testing.assert_allclose(norms(np.zeros(4))[:3], [math.log(1e-12)] * 3)


# --- pooling and normalising


def test_pooling_is_mean_and_deviation_over_layers_by_name_and_matrix() -> None:
    rows = {
        ("layers.0.v", "BA"): [1.0, 2.0],
        ("layers.0.q", "BA"): [0.0, 0.0],
        ("layers.1.v", "BA"): [3.0, 6.0],
        ("layers.1.q", "BA"): [0.0, 4.0],
    }
    arrays = {key: np.array(row) for key, row in rows.items()}
    # q: mean, deviation; v: mean, deviation
    assert pooled(arrays).tolist() == [0, 2, 0, 2, 2, 4, 1, 2]
    assert np.array_equal(pooled(dict(reversed(arrays.items()))), pooled(arrays))
    assert pooled(
        {("layers.0.q", "A"): np.array([5.0]), ("layers.0.q", "B"): np.array([7.0])}
    ).tolist() == [5, 0, 7, 0]


def test_normalising_makes_length_one_whatever_the_length_was() -> None:
    direction = np.array([3.0, -4.0], np.float32)
    for length in (1e-6, 1.0, 1e30):  # the square of 1e30 overflows float32
        np.testing.assert_allclose(l2_normalised(direction * length), [0.6, -0.8], rtol=1e-6)
    assert l2_normalised(direction * 1e-14).tolist() == (direction * 1e-14).tolist()
    assert l2_normalised(np.zeros(3, np.float32)).tolist() == [0, 0, 0]
    # A length beyond float32 would make every quotient zero: the vector of an adapter without a
    # change.
    np.testing.assert_allclose(l2_normalised(np.full(4, 3e38, np.float32)), 0.5, rtol=1e-6)


# --- bad numbers


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("feature", ["slices", "canonical", "spectra", "factor spectra"])
def test_every_feature_names_what_is_not_finite(bad: float, factor: str, feature: str) -> None:
    factors = {"A": AFTER[make.module()].A.copy(), "B": AFTER[make.module()].B.copy()}
    factors[factor][0, 0] = bad
    weights = make.with_pairs(AFTER, {make.module(): LoRAPair(**factors)})
    slots = Layout.of(weights).slots
    delta = Adapter(dict(weights), kind="factor_delta")
    compute = {
        "slices": lambda: slices(weights, slots),
        "canonical": lambda: canonical(weights, slots),
        "spectra": lambda: spectra(weights, list(weights), ("A", "B")),
        "factor spectra": lambda: spectra(delta, list(weights), ("A", "B")),
    }[feature]
    with pytest.raises(
        NonFiniteError, match=rf"model\.layers\.0\.self_attn\.q_proj, lora_{factor}: 1 of"
    ):
        compute()


def test_a_factor_delta_has_no_canonical_form() -> None:
    with pytest.raises(KindMismatch, match="use weight_delta"):
        canonical(factor_delta(AFTER, BEFORE), Layout.of(AFTER).slots)
    delta = weight_delta(AFTER, BEFORE)
    assert canonical(delta, Layout.of(delta).slots).shape == (Layout.of(delta).size,)  # the control
