"""Weights are n f normalised, the gate closes, and no claim of a minority outweighs the cap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloop.defense.weights import MAX_EXAMPLES, aggregation_weights, counted_examples
from fedloop.errors import ConfigError, EvidenceError

CLIENTS = st.text("abcdefgh", min_size=1, max_size=3)
FACTORS = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1))


def slow_weights(
    factors: Mapping[str, float], num_examples: Mapping[str, int], gate: float
) -> dict[str, float] | None:
    """The definition, in exact fractions."""
    exact = {client: Fraction(factor) for client, factor in factors.items()}
    total = sum((num_examples[client] * exact[client] for client in exact), Fraction(0))
    if total == 0 or sum(exact.values(), Fraction(0)) / len(exact) < Fraction(gate):
        return None
    return {client: float(num_examples[client] * exact[client] / total) for client in exact}


@given(
    st.dictionaries(CLIENTS, st.tuples(FACTORS, st.integers(1, 10_000)), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
@settings(deadline=None, max_examples=300)
def test_weights_are_the_definition(clients: dict[str, tuple[float, int]], gate: float) -> None:
    factors = {c: f for c, (f, _) in clients.items()}
    examples = {c: n for c, (_, n) in clients.items()}
    mean = sum(map(Fraction, factors.values())) / len(factors)
    got = aggregation_weights(factors, examples, gate)
    expected = slow_weights(factors, examples, gate)
    if abs(mean - Fraction(gate)) < 1e-15:  # on the gate one rounding decides
        return
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-300)
        assert math.fsum(got.values()) == pytest.approx(1, abs=1e-12)
        assert all(got[client] == 0.0 for client, factor in factors.items() if factor == 0)


def test_the_gate_closes_below_its_mean_and_not_at_it() -> None:
    examples = dict.fromkeys("abcde", 10)
    one_of_five = {**dict.fromkeys("bcde", 0.0), "a": 1.0}
    assert aggregation_weights(one_of_five, examples) == {**dict.fromkeys("bcde", 0.0), "a": 1.0}
    less = {**one_of_five, "a": 0.999}
    assert aggregation_weights(less, examples) is None
    assert aggregation_weights(less, {**examples, "a": 10**6}) is None  # clients, not examples
    assert aggregation_weights(less, examples, min_mean_factor=0.0) is not None
    assert aggregation_weights(dict.fromkeys("abcde", 0.0), examples, min_mean_factor=0.0) is None


def test_clients_permute_weights_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    names = [f"c{i}" for i in range(50)]
    factors = dict(zip(names, rng.random(50).tolist(), strict=True))
    examples = dict(zip(names, rng.integers(1, 999, 50).tolist(), strict=True))
    before = aggregation_weights(factors, examples)
    for _ in range(20):
        order = rng.permutation(names).tolist()
        backwards = {c: examples[c] for c in reversed(order)}
        assert aggregation_weights({c: factors[c] for c in order}, backwards) == before
    renamed = dict(zip(names, rng.permutation(names).tolist(), strict=True))
    after = aggregation_weights(
        {renamed[c]: f for c, f in factors.items()}, {renamed[c]: n for c, n in examples.items()}
    )
    assert before is not None
    assert after == {renamed[c]: weight for c, weight in before.items()} != before


@pytest.mark.parametrize(
    ("factors", "examples", "message"),
    [
        ({}, {}, "without clients"),
        ({"a": 1.0}, {}, "'a'"),
        ({"a": 1.0}, {"a": 1, "b": 1}, "'b'"),
        ({"a": float("nan")}, {"a": 1}, "'a'.*nan"),
        ({"a": 1.0000001}, {"a": 1}, "'a'.*1.0000001"),
        ({"a": -1e-9}, {"a": 1}, "'a'.*-1e-09"),
        ({"a": float("inf")}, {"a": 1}, "'a'.*inf"),
        ({"a": "1"}, {"a": 1}, "'a'.*'1'"),
        ({"a": True}, {"a": 1}, "'a'.*True"),
        ({"a": None}, {"a": 1}, "'a'.*None"),
        ({"a": 1.0}, {"a": 0}, "'a'.*0"),
        ({"a": 1.0}, {"a": -5}, "'a'.*-5"),
        ({"a": 1.0}, {"a": 1.5}, "'a'.*1.5"),
        ({"a": 1.0}, {"a": True}, "'a'.*True"),
        ({"a": 1.0}, {"a": float("nan")}, "'a'.*nan"),
        ({"a": 1.0}, {"a": 10**400}, r"'a'.*2\*\*53"),
        ({7: 1.0}, {7: 10}, "7.*int.*string"),
    ],
)
def test_what_cannot_be_weighed_is_refused(factors: Any, examples: Any, message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        aggregation_weights(factors, examples)


@pytest.mark.parametrize("gate", [-0.1, 1.1, float("nan"), "0.2", None, True])
def test_a_gate_that_is_no_share_is_refused(gate: Any) -> None:
    with pytest.raises(ConfigError, match="min_mean_factor"):
        aggregation_weights({"a": 1.0}, {"a": 1}, gate)


# --- counts


def slow_cap(claimed: Mapping[str, int], ratio: float) -> dict[str, int]:
    """The definition; the lower median is the least claim that half of the claims do not exceed."""
    half = [
        n
        for n in claimed.values()
        if 2 * sum(other <= n for other in claimed.values()) >= len(claimed)
    ]
    cap = ratio * min(half)
    return {client: n if n <= cap else int(cap) for client, n in claimed.items()}


@given(
    st.dictionaries(CLIENTS, st.integers(1, 10**6), min_size=1, max_size=9),
    st.sampled_from([1.0, 1.5, 3.0, 10.0]),
)
@settings(deadline=None, max_examples=200)
def test_counts_are_the_definition(claimed: dict[str, int], ratio: float) -> None:
    assert counted_examples(claimed, ratio) == slow_cap(claimed, ratio)


def test_registered_counts_replace_claims() -> None:
    registered = {"a": 50, "b": 60, "absent": 5}
    counted = counted_examples({"a": 10**9, "b": 1}, registered=registered)
    assert counted == {"a": 50, "b": 60}
    with pytest.raises(EvidenceError, match=r"\['b'\] are not registered"):
        counted_examples({"a": 1, "b": 1}, registered={"a": 50})
    with pytest.raises(EvidenceError, match=r"'a'.*0"):
        counted_examples({"a": 1}, registered={"a": 0})


def test_odd_claims_are_counted_or_refused() -> None:
    assert counted_examples({}) == {}
    assert counted_examples({"a": np.int64(5)}) == {"a": 5}
    assert counted_examples({"a": 10**400, "b": 2, "c": 2}) == {"a": 6, "b": 2, "c": 2}
    assert counted_examples({"a": 10**400}, 1e308) == {"a": MAX_EXAMPLES}
    for claim in (0, -1, 2.0, True, None, "3", float("nan")):
        for registered in (None, {"a": 1, "b": 1}):
            with pytest.raises(EvidenceError, match="client 'b'"):
                counted_examples({"a": 1, "b": claim}, registered=registered)


@pytest.mark.parametrize("ratio", [0.9, 0, -1, float("nan"), float("inf"), "3", True])
def test_a_ratio_below_one_is_refused(ratio: Any) -> None:
    with pytest.raises(ConfigError, match="max_count_ratio"):
        counted_examples({"a": 1}, ratio)
