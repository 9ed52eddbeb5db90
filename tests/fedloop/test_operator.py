"""Decisions as an operator needs them: nobody outside decides, all or nothing, explained."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedloop import Defense, RoundRecord
from fedloop.defense.explain import rejected
from fedloop.defense.levels import (
    CumulativeLevel,
    EvidenceLevel,
    Level,
    ShadowLevel,
    StepLevel,
)
from fedloop.defense.types import ClientUpdate
from fedloop.errors import ConfigError, EvidenceError
from loraprobe.adapters.adapter import Adapter
from tests.helpers import federated, make, probes
from tests.helpers.federated import CLIENTS, LEVELS, same_tree, update, updates


def defense(level: Any = "cumulative", **options: Any) -> Defense:
    return Defense(probes.tiny_probe("linear", "all_b"), level, **options)


def scaled(one: ClientUpdate, factor: float) -> ClientUpdate:
    return replace(one, adapter=federated.mapped(one.adapter, lambda tensor: factor * tensor))


def junk(client: str) -> ClientUpdate:
    return ClientUpdate(client, 40, Adapter({"x": make.pair(r=2)}, kind="factor_delta"))


@pytest.mark.parametrize(("asked", "answered"), [(5, 2), (10, 1), (100, 3)])
def test_dropout_does_not_close_the_gate(asked: int, answered: int) -> None:
    names = [f"n{index}" for index in range(asked)]
    record = defense().assess(
        1, [update(name, seed) for seed, name in enumerate(names[:answered])], expected=names
    )
    assert not record.skipped
    assert math.isclose(sum(record.weights.values()), 1)
    assert record.reasons[names[-1]] == "missing: asked and sent nothing"


@pytest.mark.parametrize("known", ["expected", "registered"])
def test_nobody_outside_can_close_the_gate(known: str) -> None:
    sent = [*updates(None).values(), *(junk(f"junk{index}") for index in range(40))]
    options: dict[str, Any] = {"registered": dict.fromkeys(CLIENTS, 7)}
    tested = defense(**options) if known == "registered" else defense()
    record = tested.assess(1, sent, expected=CLIENTS if known == "expected" else None)
    assert not record.skipped
    assert min(record.weights[client] for client in CLIENTS) > 0.1
    why = record.reasons["junk0"]
    assert why.startswith("unregistered" if known == "registered" else "not asked")


def test_where_nobody_was_asked_everybody_is_refused() -> None:
    record = defense().assess(1, list(updates(None).values()), expected=[])
    assert record.skipped
    assert set(record.reasons.values()) == {"not asked: nobody asked this client in this round"}


def test_who_is_rejected_does_not_decide_how_long_others_may_be() -> None:
    """Half of a round, all detected, with tiny updates."""
    malicious = CLIENTS[:3]
    for factor in (1.0, 1e-6):
        sent = updates(None, malicious=malicious)
        sent |= {client: scaled(sent[client], factor) for client in malicious}
        record = defense(max_norm_ratio=1.5).assess(1, list(sent.values()))
        assert {client for client in CLIENTS if not record.factors[client]} == set(malicious)
        assert min(record.factors[client] for client in CLIENTS[3:]) > 0.5
    trusting = Defense(None, max_norm_ratio=1.5).assess(1, list(sent.values()))
    assert "long" in trusting.reasons["c3"]  # negative control: they are short


def test_who_is_rejected_does_not_decide_how_many_examples_others_have() -> None:
    sent = updates(None, malicious=CLIENTS[:3])
    sent |= {client: replace(sent[client], num_examples=1) for client in CLIENTS[:3]}
    record = defense().assess(1, list(sent.values()))
    assert record.num_examples["c3"] == sent["c3"].num_examples
    trusting = Defense(None).assess(1, list(sent.values()))
    assert trusting.num_examples["c3"] == 3  # negative control


def nothing(adapter: Adapter, size: float = 0.0) -> Adapter:
    return federated.mapped(adapter, lambda tensor: tensor * 0 + size)


Forged = Callable[[Adapter], tuple[Adapter, ...]]
FORGERIES: dict[str, tuple[Forged, str]] = {
    "99 zero steps": (lambda sent: (*(nothing(sent) for _ in range(99)), sent), "repeats step 1"),
    "one zero step": (lambda sent: (nothing(sent), sent), "changes nothing"),
    "tiny steps": (
        lambda sent: (*(nothing(sent, 1e-30 * (index + 1)) for index in range(9)), sent),
        "changes nothing",
    ),
    "the update twice": (lambda sent: (sent, sent), "step 2 repeats step 1"),
}


@pytest.mark.parametrize("case", FORGERIES)
@pytest.mark.parametrize("level", [StepLevel(), ShadowLevel(), EvidenceLevel()])
def test_no_change_is_no_evidence_of_innocence(level: Level, case: str) -> None:
    forged, expected = FORGERIES[case]
    sent = updates(level, malicious=("c4",))
    sent["c4"] = replace(sent["c4"], steps=forged(sent["c4"].adapter))
    record = defense(level).assess(1, list(sent.values()))
    assert list(record.reasons) == ["c4"]
    assert expected in record.reasons["c4"]
    assert record.weights["c4"] == 0.0
    only = nothing(sent["c0"].adapter)
    record = defense(level).assess(1, [replace(sent["c0"], adapter=only, steps=(only,))])
    assert "nothing that the probe reads has changed" in record.reasons["c0"]


def test_ids_are_text_or_whole_numbers_and_come_out_as_text() -> None:
    sent = list(updates(None).values())
    numbered = [replace(one, client_id=number) for number, one in enumerate(sent)]  # type: ignore[arg-type]
    named = [replace(one, client_id=str(number)) for number, one in enumerate(sent)]
    expected = federated.untimed(defense().assess(1, named, expected=["0", "1", "2", "3", "4"]))
    counts = {np.int64(number): one.num_examples for number, one in enumerate(sent)}
    for ids in (range(5), np.arange(5), torch.arange(5), ["0", 1, "2", np.array(3), np.int64(4)]):
        assert federated.untimed(defense().assess(1, numbered, expected=ids)) == expected  # type: ignore[arg-type]
    registered = defense(registered=counts).assess(1, numbered)
    counted = [
        replace(one, client_id=torch.tensor(number), num_examples=torch.tensor(one.num_examples))  # type: ignore[arg-type]
        for number, one in enumerate(sent)
    ]
    assert federated.untimed(defense().assess(np.array(1), counted, expected=range(5))) == expected  # type: ignore[arg-type]
    assert registered.weights == expected.weights
    both = defense().assess(1, [numbered[0], replace(sent[1], client_id="0")])
    assert both.reasons == {"0": "duplicate: 2 updates in one round; expected one"}


WRONG: dict[str, dict[str, Any]] = {
    "an id of bytes": {"updates": [replace(update("a", 1), client_id=b"a")]},  # type: ignore[arg-type]
    "an id of 5,000 digits": {"updates": [replace(update("a", 1), client_id=10**5000)]},  # type: ignore[arg-type]
    "no id": {"updates": [replace(update("a", 1), client_id=None)]},  # type: ignore[arg-type]
    "an id of half a character": {"updates": [update("\ud800", 1)]},
    "no update": {"updates": [7]},
    "expected is one name": {"expected": "anna"},
    "expected holds nothing": {"expected": [None]},
    "a start of deltas": {"start": update("a", 1).adapter},
    "a start of nothing": {"start": 7},
    "a round that was": {"round": 1},
    "a round in parts": {"round": 2.5},
    "a true round": {"round": True},
}


@pytest.mark.parametrize("case", WRONG)
def test_whatever_raises_leaves_the_state_as_it_was(case: str) -> None:
    tested, whole = defense(), defense()
    for each in (tested, whole):
        each.assess(1, list(updates(None).values()))
    arguments = {"round": 2, "updates": list(updates(None, 2).values()), **WRONG[case]}
    before = tested.state_dict()
    with pytest.raises(EvidenceError):
        tested.assess(**arguments)
    assert tested.state_dict() == before
    second = list(updates(None, 2).values())
    assert federated.untimed(tested.assess(2, second)) == federated.untimed(whole.assess(2, second))
    assert same_tree(tested.state_dict(), whole.state_dict())


def test_an_interrupt_leaves_the_state_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = defense()
    before = tested.state_dict()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedloop.defense.defense.weigh", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tested.assess(1, list(updates(None).values()))
    assert tested.state_dict() == before
    assert not tested.assess(1, list(updates(None).values())).reasons


@pytest.mark.parametrize(
    "options",
    [
        {"min_mean_factor": 20},
        {"min_mean_factor": math.nan},
        {"max_count_ratio": 0.5},
        {"max_norm_ratio": math.inf},
        {"max_steps": 0},
        {"registered": {"a": 0}},
        {"registered": {"a": 40.0}},
        {"registered": ["a"]},
        {"registered": {None: 4}},
        {"level": "fltrust"},
        {"level": 7},
        {"probe": 7},
    ],
)
def test_what_is_out_of_range_is_said_when_a_defence_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Defense(**{"probe": probes.tiny_probe(), **options})


def test_probe_and_level_have_to_fit() -> None:
    pooled = probes.tiny_probe("linear", "spectral")
    for level in (
        CumulativeLevel(),
        CumulativeLevel(sketch=64),
        ShadowLevel(evidence="shadow_gradient"),
        EvidenceLevel(evidence="shadow_gradient"),
    ):
        with pytest.raises(ConfigError, match="no unit vectors"):
            Defense(pooled, level)
    with pytest.raises(ConfigError, match=r"sketch.* linear head"):
        Defense(probes.tiny_probe("mlp"), CumulativeLevel(sketch=64))
    with pytest.raises(ConfigError, match=r"sketch of 9 .* by 2\.5 .* expected sketch=None"):
        Defense(probes.tiny_probe(), CumulativeLevel(sketch=9))
    chosen = Defense(pooled)
    assert chosen.level == CumulativeLevel(normalize=False)
    record = chosen.assess(1, list(updates(None).values()))
    assert min(record.factors.values()) > 0
    assert Defense(probes.tiny_probe()).level == CumulativeLevel()
    assert Defense(None).level is None


def test_a_probe_is_named_by_its_folder(tmp_path: Any) -> None:
    folder = probes.tiny_probe("linear", "all_b").save_pretrained(tmp_path / "probe")
    sent = list(updates(None, malicious=("c4",)).values())
    expected = federated.untimed(defense(CumulativeLevel()).assess(1, sent))
    for probe in (str(folder), folder):
        assert federated.untimed(Defense(probe, "cumulative").assess(1, sent)) == expected
        assert federated.untimed(Defense(probe).assess(1, sent)) == expected


def test_what_is_accepted_is_what_was_screened() -> None:
    sent = updates(None, malicious=("c4",))
    assessment = defense().assess(1, list(sent.values()))
    assert list(assessment.accepted) == list(CLIENTS[:4])
    assert all(assessment.accepted[client] is sent[client].adapter for client in CLIENTS[:4])
    assert assessment.accepted.keys() == {c for c, w in assessment.weights.items() if w > 0}
    assert not defense().assess(1, list(updates(None, malicious=CLIENTS).values())).accepted


def test_every_decision_is_explained() -> None:
    tested = defense()
    record = tested.assess(
        1, list(updates(None, malicious=("c4",)).values()), expected=[*CLIENTS, "x"]
    )
    assert record.cuts["c4"] == 0.8
    said = rejected(record)
    assert said["x"] == "missing: asked and sent nothing"
    assert said["c4"].startswith(
        "judged malicious by level 'cumulative' on update_features: score "
    )
    assert said["c4"].endswith("; the cut is 0.800")
    why = tested.explain("c4")
    assert (why.level, why.evidence, why.cut, why.factor) == (
        "cumulative",
        "update_features",
        0.8,
        0.0,
    )
    assert why.scores == record.scores["c4"]
    assert why.reason == said["c4"]
    assert tested.explain("c0").reason == ""
    with pytest.raises(EvidenceError, match="expected one of round 1: c0"):
        tested.explain("nobody")
    assert rejected(RoundRecord.from_json(record.to_json())) == said


def test_an_operator_overrules_and_the_record_says_so() -> None:
    tested = defense()
    tested.allow("c4", 2, "a hospital we know")
    tested.deny("c0", None, "left the project")
    for number in (1, 2, 3):
        sent = updates(None, number, malicious=("c4",))
        record = tested.assess(number, list(sent.values()), expected=CLIENTS)
        assert record.factors["c0"] == record.weights["c0"] == 0.0
        assert record.reasons["c0"] == "denied: left the project"
        assert "c0" not in record.scores
        if number < 3:
            assert record.factors["c4"] == 1.0
            assert record.reasons["c4"] == "allowed until round 2: a hospital we know"
            tested.load_state_dict(tested.state_dict())  # it is part of the state
        else:
            assert record.factors["c4"] == 0.0
    malformed = [*list(updates(None, 4).values())[:4], junk("c4")]
    tested.allow("c4", None, "again")
    assert tested.assess(4, malformed).factors["c4"] == 0.0  # what is malformed stays so
    for arguments in (("c1", None, ""), ("c1", 3, "over"), (None, None, "nobody")):
        with pytest.raises(EvidenceError):
            tested.allow(*arguments)  # type: ignore[arg-type]


def test_rounds_from_several_threads_are_played_one_after_the_other() -> None:
    tested, errors = defense(), []

    def play(number: int) -> None:
        try:
            tested.assess(number, list(updates(None, number).values()))
        except EvidenceError as error:
            errors.append(error)  # a later round was first

    threads = [threading.Thread(target=play, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = tested.state_dict()
    assert state["round"] == 8
    assert {entry["count"] for entry in state["features"].values()} == {8 - len(errors)}


@pytest.mark.parametrize("level", LEVELS)
def test_clients_long_gone_are_forgotten_but_no_verdict_can_be_waited_out(level: str) -> None:
    """And what is not forgotten is what a defence without the option has."""
    gone = ("c0", "c3", "c4")
    tested, ever = (defense(LEVELS[level], forget_after=after) for after in (2, None))
    for one in (tested, ever):
        sent = updates(LEVELS[level], malicious=("c4",))
        one.assess(1, list(sent.values()))
        one.allow("c3", why="a field trial")
        for number in range(2, 5):
            left = updates(LEVELS[level], number)
            record = one.assess(number, [left[c] for c in CLIENTS if c not in gone])
            assert ("forgot" in record.note) is (number == 4 and one is tested)
    copied = defense(LEVELS[level], forget_after=2)
    copied.load_state_dict(tested.state_dict())
    kept, whole = copied.state_dict()["state"]["clients"], ever.state_dict()["state"]["clients"]
    verdict = whole["c4"]["factor"] == 0
    assert set(whole) - set(kept) == ({"c0"} if verdict else {"c0", "c4"})
    assert kept == {client: whole[client] for client in kept}
    assert verdict or level in ("step", "client")
