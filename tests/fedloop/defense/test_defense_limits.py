"""How much a client may claim, how long its update may be, and who is registered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedloop.defense.levels import (
    CumulativeLevel,
)
from fedloop.defense.types import RoundRecord
from fedloop.errors import ConfigError, EvidenceError
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta
from loraprobe.adapters.layout import pack
from loraprobe.adapters.pair import LoRAPair
from tests.helpers import probes
from tests.helpers.federated import CLIENTS, LEVELS, defense, same_tree, update, updates


def test_claims_count_up_to_a_multiple_of_the_median() -> None:
    claims = {"a": 10, "b": 20, "c": 30, "d": 10**9}
    sent = [update(who, seed, num_examples=n) for seed, (who, n) in enumerate(claims.items())]

    def assessed(**options: Any) -> RoundRecord:
        return defense(None, **options).assess(1, sent)

    assert assessed().num_examples == {**claims, "d": 60}
    capped = assessed(max_count_ratio=1.0).num_examples
    assert capped == {"a": 10, "b": 20, "c": 20, "d": 20}
    record = assessed(max_count_ratio=None)  # the paper
    assert record.num_examples["d"] == 10**9
    assert record.weights["d"] > 0.999
    registered = {"a": 5, "b": 5, "c": 5, "d": 5, "absent": 1}
    assert set(assessed(registered=registered).weights.values()) == {0.25}


def test_a_long_update_counts_for_as_much_less() -> None:
    sent = [update(client, seed) for seed, client in enumerate("abcd")]
    long = replace(sent[3], adapter=scaled(sent[3].adapter, 10.0))
    cases = ((None, long), (3.0, sent[3]), (3.0, long))
    usual, honest, bounded = (
        defense(None, max_norm_ratio=ratio).assess(1, [*sent[:3], last]) for ratio, last in cases
    )
    # the paper; and nobody is touched who is not long
    assert usual.factors["d"] == honest.factors["d"] == 1.0
    assert honest.reasons == {}
    norms = sorted(float(pack(one.adapter)[0].double().norm()) for one in (*sent[:3], long))
    assert bounded.factors == {
        "a": 1.0,
        "b": 1.0,
        "c": 1.0,
        "d": pytest.approx(3.0 * norms[1] / norms[3], rel=1e-6),
    }
    assert "up to" in bounded.reasons["d"]
    assert bounded.weights["d"] < 0.15 < usual.weights["d"]
    with pytest.raises(ConfigError, match="max_norm_ratio"):
        defense(None, max_norm_ratio=0.5)


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """The same delta, so many times as long."""
    pairs = {
        name: LoRAPair(factor * pair.A, factor * pair.B, pair.scaling)
        for name, pair in adapter.items()
    }
    return Adapter(pairs, kind=adapter.kind, base_model=adapter.base_model)


@pytest.mark.parametrize("ratio", [3.0, None])
def test_no_claim_is_large_enough_to_stop_a_round(ratio: float | None) -> None:
    for level in (None, LEVELS["step"]):
        for claim in (2**53 + 1, 10**30, 10**400, 10**5000, 2**53):
            sent = [update("a", 1, level), update("b", 2, level, num_examples=claim)]
            weights = defense(level, max_count_ratio=ratio).assess(1, sent).weights
            if claim > 2**53:
                assert weights == {"a": 1.0, "b": 0.0}
            else:
                assert weights["b"] > 0.5


@pytest.mark.parametrize("name", [*LEVELS, "none"])
def test_who_is_not_registered_is_not_even_compared_with_the_others(name: str) -> None:
    level = LEVELS.get(name)
    registered = dict.fromkeys(CLIENTS, 7)
    sent = updates(level)
    stranger = replace(sent["c1"], client_id="stranger")  # a copy, which would have c1 refused
    tested, without = defense(level, registered=registered), defense(level, registered=registered)
    record = tested.assess(1, [*sent.values(), stranger])
    alone = without.assess(1, list(sent.values()))
    assert record.factors == {**alone.factors, "stranger": 0.0}
    assert record.weights == {**alone.weights, "stranger": 0.0}
    assert "unregistered" in record.reasons["stranger"]
    assert same_tree(tested.state_dict(), without.state_dict())


def test_weights_are_compared_with_the_rounds_start() -> None:
    start = probes.initial({"r": 2, "base_model": probes.BASE})
    level, plain = CumulativeLevel(), list(updates(CumulativeLevel(), malicious=("c1",)).values())
    sent = [replace(one, adapter=add_delta(start, one.adapter)) for one in plain]
    record, deltas = (defense(level).assess(1, some, start=start) for some in (sent, plain))
    assert {client for client, factor in record.factors.items() if not factor} == {"c1"}
    assert record.factors == deltas.factors
    for client in CLIENTS:
        assert record.scores[client] == pytest.approx(deltas.scores[client], abs=1e-4)
    tested = defense(level)
    with pytest.raises(EvidenceError, match="start="):
        tested.assess(1, sent)
    assert not tested.assess(1, sent, start=start).reasons  # the round can be assessed after all
    mixed = defense(level).assess(1, [*sent[:2], *list(updates(level).values())[2:]])
    assert set(mixed.reasons) == {"c0", "c1"}
