"""Defense fails closed.

Whatever is wrong with one client costs that client its weight, and nobody else anything.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from fedloop.defense.defense import Defense
from fedloop.defense.levels import (
    CumulativeLevel,
    Level,
    ShadowLevel,
    StepLevel,
)
from fedloop.defense.types import ClientUpdate, RoundRecord
from fedloop.errors import EvidenceError
from loraprobe import fit_probe
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout
from loraprobe.adapters.pair import LoRAPair
from loraprobe.heads import MLPHead
from loraprobe.probe import Probe
from tests.helpers import federated, make, probes
from tests.helpers.federated import CLIENTS, LEVELS, defense, same_tree, untimed, update, updates

Change = Callable[[ClientUpdate], ClientUpdate | None]


def bent(of: ClientUpdate, value: float) -> ClientUpdate:
    """The update with one number replaced; its evidence stays."""
    first = next(iter(of.adapter))
    pair = of.adapter[first]
    B = pair.B.copy()
    B[0, 0] = value
    return replace(
        of, adapter=make.with_pairs(of.adapter, {first: LoRAPair(pair.A, B, pair.scaling)})
    )


def stepping(of: ClientUpdate, change: Callable[[Adapter], Any]) -> ClientUpdate:
    return replace(of, steps=(change(of.steps[0] if of.steps else of.adapter), *of.steps[1:]))


def with_module(of: Adapter) -> Adapter:
    return make.with_pairs(of, {"lm_head": make.pair(r=2)})


REJECTED: dict[str, Change] = {
    "absent": lambda of: None,
    "nan": lambda of: bent(of, math.nan),
    "misshaped": lambda of: replace(
        of, adapter=make.with_pairs(of.adapter, {make.module(): make.pair(10, 13, 2)})
    ),
    "kind": lambda of: replace(of, adapter=Adapter(dict(of.adapter), kind="weights")),
    "base model": lambda of: replace(
        of, adapter=Adapter(dict(of.adapter), kind=of.adapter.kind, base_model="org/other")
    ),
    "zero examples": lambda of: replace(of, num_examples=0),
    "endless examples": lambda of: replace(of, num_examples=10**400),
    "step nan": lambda of: stepping(
        of, lambda step: federated.mapped(step, lambda tensor: tensor * math.nan)
    ),
    "steps none": lambda of: replace(of, steps=None),
    "step misshaped": lambda of: stepping(
        of, lambda step: make.with_pairs(step, {make.module(): make.pair(11, 12, 2)})
    ),
    "too many steps": lambda of: replace(of, steps=(of.steps or (of.adapter,)) * 20),
}


def reference(level: Level | None) -> tuple[Defense, RoundRecord, RoundRecord, dict[str, Any]]:
    """A defence after two rounds, "c2" absent without being asked in the second; their records.

    And its state between them.
    """
    known = defense(level, max_steps=6)
    first = known.assess(1, list(updates(level).values()))
    between = known.state_dict()
    second = known.assess(2, [one for client, one in updates(level, 2).items() if client != "c2"])
    return known, first, second, between


def of_client(state: Mapping[str, Any], client: str) -> Any:
    """What a defence remembers of a client."""
    return state["state"].get("clients", {}).get(client), state["features"].get(client)


def check_rejected(level: Level | None, sent: list[ClientUpdate]) -> str:
    """Play the second round with these updates of "c2"; hold what must hold if it is rejected.

    Return the reason.
    """
    known, _, without, before = reference(level)
    tested = defense(level, max_steps=6)
    tested.assess(1, list(updates(level).values()))
    others = [one for client, one in updates(level, 2).items() if client != "c2"]
    record = tested.assess(2, [*others, *sent], expected=CLIENTS)
    assert record.factors == {**without.factors, "c2": 0.0}
    assert {"c2": 0.0, **record.weights} == {"c2": 0.0, **without.weights}
    assert record.weights.get("c2", 0.0) == 0.0
    assert "c2" not in record.num_examples
    assert record.scores == without.scores
    assert not record.skipped
    assert list(record.reasons) == ["c2"]
    assert same_tree(of_client(tested.state_dict(), "c2"), of_client(before, "c2"))
    assert same_tree(tested.state_dict(), known.state_dict())
    assert RoundRecord.from_json(record.to_json()) == record.record()
    return record.reasons["c2"]


# Without a probe, nobody reads steps or knows which base model it should be.
PROBED = ("step nan", "step misshaped", "too many steps", "base model")


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in (*LEVELS, "none")
        for case in REJECTED
        if (name != "none" or case not in PROBED)
        and (case == "nan" or name in ("step", "shadow", "cumulative", "none"))
    ],
)
def test_a_rejected_client_has_no_weight_and_changes_nothing(name: str, case: str) -> None:
    level = LEVELS.get(name)
    changed = REJECTED[case](updates(level, 2)["c2"])
    reason = check_rejected(level, [changed] if changed else [])
    assert ("missing" in reason) is (case == "absent")


@pytest.mark.parametrize("name", [*LEVELS, "none"])
def test_a_client_that_is_not_rejected_does_count(name: str) -> None:
    level = LEVELS.get(name)  # the control of the test above
    tested = defense(level, max_steps=6)
    tested.assess(1, list(updates(level).values()))
    before = tested.state_dict()
    record = tested.assess(2, list(updates(level, 2).values()), expected=CLIENTS)
    assert record.factors["c2"] > 0.4
    assert record.weights["c2"] > 0.1
    assert not record.reasons
    assert ("c2" in record.scores) is (level is not None)
    if level is not None and level.name != "shadow":
        assert not same_tree(of_client(tested.state_dict(), "c2"), of_client(before, "c2"))


def elsewhere(sent: ClientUpdate) -> ClientUpdate:
    """An attacker who reports harmless steps and sends something else."""
    steps = updates(LEVELS["step"], 2)["c2"].steps
    return replace(sent, adapter=probes.labelled_adapter(5, malicious=True), steps=steps)


FORGED: dict[str, tuple[str, Callable[[ClientUpdate, Level], list[ClientUpdate]], str]] = {
    "sent twice": ("", lambda sent, level: [sent, sent], "duplicate: 2 updates"),
    "sent two": ("", lambda sent, level: [sent, update("c2", 999, level)], "duplicate: 2 updates"),
    "no steps": (
        "step shadow evidence shadow_gradient cumulative_gradient",
        lambda sent, level: [replace(sent, steps=())],
        "missing evidence",
    ),
    "two gradients": (
        "shadow_gradient cumulative_gradient",
        lambda sent, level: [replace(sent, steps=(*sent.steps, probes.labelled_adapter(1)))],
        "expected one shadow gradient",
    ),
    "a trajectory that ends elsewhere": (
        "step client",
        lambda sent, level: [elsewhere(sent)],
        "the last step is not the submitted update",
    ),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for case, (levels, *_) in FORGED.items() for name in (levels.split() or LEVELS)],
)
def test_what_a_client_may_not_send_costs_it_its_weight(name: str, case: str) -> None:
    _, forged, why = FORGED[case]
    assert why in check_rejected(LEVELS[name], forged(updates(LEVELS[name], 2)["c2"], LEVELS[name]))


@pytest.mark.parametrize("name", LEVELS)
def test_copies_cost_all_who_sent_them_and_nobody_else(name: str) -> None:
    level = LEVELS[name]
    sent = updates(level, 2)
    sent["c2"] = replace(sent["c1"], client_id="c2")
    tested, without = (defense(level) for _ in range(2))
    for each in (tested, without):
        each.assess(1, list(updates(level).values()))
    record = tested.assess(2, list(sent.values()))
    alone = without.assess(2, [sent[client] for client in ("c0", "c3", "c4")])
    assert record.factors == {**alone.factors, "c1": 0.0, "c2": 0.0}
    assert record.reasons.keys() == {"c1", "c2"}
    assert same_tree(tested.state_dict(), without.state_dict())


@pytest.mark.parametrize("name", LEVELS)
def test_malicious_updates_lose_their_weight_at_every_level(name: str) -> None:
    tested = defense(LEVELS[name])
    for number in range(1, 4):
        sent = updates(LEVELS[name], number, malicious=("c4",))
        record = tested.assess(number, list(sent.values()))
    assert record.factors["c4"] < 0.3 < 0.5 < min(record.factors[c] for c in CLIENTS[:4])
    assert record.weights["c4"] < 0.1


LOWEST = {"step": 0.96, "client": 0.99}


@pytest.mark.parametrize("name", "step client shadow evidence cumulative shadow_gradient".split())
def test_all_benign_gives_factors_near_one_and_an_open_gate(name: str) -> None:
    tested = defense(LEVELS[name])
    for number in range(1, 7):
        sent = updates(LEVELS[name], number)
        record = tested.assess(number, list(sent.values()), expected=CLIENTS)
        assert LOWEST.get(name, 1.0) <= min(record.factors.values())
        assert max(record.factors.values()) <= 1.0
        assert not record.skipped
        assert math.isclose(sum(record.weights.values()), 1)


def test_the_gate_skips_a_round_of_malicious_clients() -> None:
    level = ShadowLevel()

    def assessed(malicious: tuple[str, ...], **options: Any) -> Any:
        return defense(level, **options).assess(1, list(updates(level, 2, malicious).values()))

    record = assessed(CLIENTS)
    assert record.skipped
    assert record.weights == {}
    assert set(record.factors.values()) == {0.0}
    assert record.note == "skipped by the safety gate: mean factor 0 of 5 updates is below 0.2"
    assert not assessed(CLIENTS[:3]).skipped  # mean factor 0.4
    assert assessed(CLIENTS[:3], min_mean_factor=0.41).skipped


@pytest.mark.parametrize("name", [*LEVELS, "none"])
def test_the_order_of_arrival_does_not_matter(name: str) -> None:
    level, outcomes = LEVELS.get(name), []
    for order in range(3):
        tested, records = defense(level), []
        for number in range(1, 4):
            sent = list(updates(level, number, malicious=("c3",), signal=0.3).values())
            sent = [*sent, replace(sent[0], client_id="c9", num_examples=0)]
            random.Random(order).shuffle(sent)
            asked = (*CLIENTS, "c9", "c8", "c7")
            records.append(untimed(tested.assess(number, iter(sent), expected=iter(asked))))
        outcomes.append((records, tested.state_dict()))
    assert outcomes[0][0] == outcomes[1][0] == outcomes[2][0]
    assert same_tree(outcomes[0][1], outcomes[1][1])
    assert list(outcomes[0][0][0].reasons) == ["c7", "c8", "c9"]


def test_a_round_of_rejected_clients_is_skipped_even_without_a_gate() -> None:
    for level in (*LEVELS.values(), None):
        tested = defense(level, min_mean_factor=0.0)
        record = tested.assess(1, [bent(update("a", 1, level), math.nan)], expected=("a", "b"))
        assert record.skipped
        assert record.weights == {}
        assert record.factors == {"a": 0.0, "b": 0.0}
        assert record.note == "skipped: no well-formed update"
        empty = tested.assess(2, [])
        assert empty.skipped
        assert empty.factors == {}
        assert not tested.assess(3, [update("a", 2, level)]).skipped  # and life goes on


def test_a_layout_of_its_own_is_kept_to() -> None:
    layout = Layout.of(probes.labelled_adapter(0))
    plain = [update(client, seed) for seed, client in enumerate("abcd")]
    sent = [*(replace(one, adapter=with_module(one.adapter)) for one in plain[:3]), plain[3]]
    assert set(defense(None, layout=layout).assess(1, sent).reasons) == set("abc")
    # negative control
    assert set(defense(None).assess(1, sent).reasons) == {"d"}


def test_round_numbers_rise() -> None:
    tested = defense(CumulativeLevel())
    tested.assess(3, [update("a", 1)])
    for number in (3, 2, -1):
        with pytest.raises(EvidenceError, match=f"got round {number} after round 3"):
            tested.assess(number, [update("a", 2)])
    assert tested.assess(5, [update("a", 2)]).round == 5


def test_a_probe_and_a_level_belong_together() -> None:
    for probe, level in ((probes.tiny_probe(), None), (None, StepLevel())):
        with pytest.raises(EvidenceError, match="expected both"):
            Defense(probe, level)


def unnormalised(head: str) -> Probe:
    """A probe on features of any size; an MLP's head overflows on what is merely large."""
    data = probes.training_data()
    probe = fit_probe(
        data.adapters,
        data.labels,
        head=head,
        recipe=replace(probes.RECIPES["all_b"], normalize="none"),
        groups=data.groups,
        head_options=probes.HEAD_OPTIONS[head],
    )
    if not isinstance(probe.head, MLPHead):
        return probe
    weights = tuple(1e3 * weight for weight in probe.head.weights)
    return replace(probe, head=replace(probe.head, weights=weights))


@pytest.mark.parametrize(
    ("head", "level"),
    [
        ("mlp", StepLevel()),
        ("mlp", ShadowLevel()),
        ("mlp", CumulativeLevel(normalize=False)),
        # one update has a score, the sums that a sketch keeps have none
        ("linear", CumulativeLevel(sketch=64, normalize=False, sketch_seed=3)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_scores_that_overflow_are_a_reason_and_leave_no_trace(head: str, level: Level) -> None:
    probe = unnormalised(head)
    sign = federated.mapped(updates(level, 2)["c2"].adapter, lambda tensor: tensor.sign())
    huge = [
        federated.mapped(sign, lambda tensor, share=share: tensor * (share * 3e38))
        for share in (0.25, 0.5, 1.0)
    ]
    outcomes = []
    for present in (True, False):
        tested = Defense(probe, level)
        tested.assess(1, list(updates(level).values()))
        sent = updates(level, 2)
        steps = tuple(huge[-len(sent["c2"].steps) :]) if sent["c2"].steps else ()
        sent["c2"] = replace(sent["c2"], adapter=huge[-1], steps=steps)
        some = [one for client, one in sent.items() if present or client != "c2"]
        record = tested.assess(2, some, expected=CLIENTS)
        assert record.factors["c2"] == 0.0
        assert ("NonFiniteError" in record.reasons["c2"]) is present
        weight = record.weights.get("c2", 0.0)
        outcomes.append((dict(record.factors), weight, tested.state_dict()))
    assert same_tree(*outcomes)
