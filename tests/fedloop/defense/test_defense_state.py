"""What a Defense carries from round to round.

It can be saved, it is nobody else's, and it does not depend on how a round is cut.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloop.defense.defense import Defense
from fedloop.defense.levels import EvidenceLevel, ShadowLevel
from fedloop.defense.types import RoundRecord
from fedloop.errors import EvidenceError, StateError
from fedloop.run.checkpoint import load_checkpoint, save_checkpoint
from loraprobe.adapters.adapter import Adapter
from tests.fedloop.defense.test_defense import bent, defense
from tests.helpers.federated import CLIENTS, LEVELS, same_tree, untimed, update, updates
from tests.helpers.probes import tiny_probe


def play(of: Defense, rounds: range) -> list[RoundRecord]:
    """Rounds in which one client is malicious, one is absent now and then, and one sends nonsense
    now and then.
    """
    records = []
    for number in rounds:
        sent = updates(of.level, number, malicious=("c4",), signal=0.2)
        if number % 2:
            del sent["c0"]
        if number % 3 == 0:
            sent["c1"] = bent(sent["c1"], math.nan)
        due = of.wanted(sent)
        records.append(
            untimed(
                of.assess(
                    number,
                    [
                        one if client in due else replace(one, steps=())
                        for client, one in sent.items()
                    ],
                )
            )
        )
    return records


@pytest.mark.parametrize("name", LEVELS)
def test_a_saved_state_goes_on_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    whole, stopped = defense(LEVELS[name]), defense(LEVELS[name])
    play(whole, range(1, 5))
    play(stopped, range(1, 5))
    save_checkpoint(tmp_path, 4, stopped.state_dict())
    found = load_checkpoint(tmp_path)
    assert found is not None
    resumed = defense(LEVELS[name])
    resumed.load_state_dict(found[1])
    expected = play(whole, range(5, 9))
    assert play(resumed, range(5, 9)) == expected
    assert same_tree(resumed.state_dict(), whole.state_dict())
    with pytest.raises(EvidenceError, match="after round 8"):
        resumed.assess(8, [])
    if name not in (
        "shadow",
    ):  # negative control: but for the level without memory, the state did matter
        assert play(defense(LEVELS[name]), range(5, 9)) != expected


def test_a_state_does_not_change_under_whoever_holds_it() -> None:
    for level in LEVELS.values():
        tested = defense(level)
        play(tested, range(1, 3))
        state = tested.state_dict()
        frozen = json.dumps(state)
        play(tested, range(3, 6))
        assert json.dumps(state) == frozen


def test_a_state_is_plain_data(tmp_path: Path) -> None:
    """JSON and `torch.load` as it is by default give back what was saved, and rounds go on."""
    for name, level in LEVELS.items():
        tested = defense(level)
        play(tested, range(1, 3))
        state = tested.state_dict()
        torch.save(state, tmp_path / name)
        ways = (json.loads(json.dumps(state)), torch.load(tmp_path / name))
        expected = play(tested, range(3, 5))
        for loaded in ways:
            resumed = defense(level)
            resumed.load_state_dict(loaded)
            assert play(resumed, range(3, 5)) == expected
        copied = pickle.loads(pickle.dumps(tested))
        assert copied.explain("c4") == tested.explain("c4")
        assert play(copied, range(5, 6)) == play(copy.deepcopy(tested), range(5, 6))


def test_states_of_other_levels_and_probes_are_refused() -> None:
    states = {name: defense(level).state_dict() for name, level in LEVELS.items()}
    for name, level in LEVELS.items():
        for other, state in states.items():
            tested = defense(level)
            if name == other:
                tested.load_state_dict(state)
            else:
                with pytest.raises(StateError, match="a state belongs to its level's parameters"):
                    tested.load_state_dict(state)
    equal = Defense(tiny_probe("linear", "all_b"), ShadowLevel(exponent=7.0))
    equal.load_state_dict(Defense(tiny_probe("linear", "all_b"), ShadowLevel()).state_dict())
    for probe in (tiny_probe("mlp", "all_b"), tiny_probe("linear", "paper")):
        with pytest.raises(StateError, match="another probe"):
            Defense(probe, LEVELS["cumulative"]).load_state_dict(states["cumulative"])


TAMPERED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no dict": lambda state: [1, 2],
    "nothing": lambda state: None,
    "version 9": lambda state: {**state, "version": 9},
    "version 1, of fedloop 0.1": lambda state: {**state, "version": 1},
    "version as text": lambda state: {**state, "version": "2"},
    "version true": lambda state: {**state, "version": True},
    "another level": lambda state: {**state, "level": "StepLevel()"},
    "round as text": lambda state: {**state, "round": "2"},
    "round NaN": lambda state: {**state, "round": math.nan},
    "round earlier": lambda state: {**state, "round": 1},
    "no memory of a client": lambda state: state["state"]["clients"].pop("c4") and state,
    "a client trusted": lambda state: state["state"]["clients"]["c4"].update(factor=1.0) or state,
    "no features": lambda state: {**state, "features": {}},
    "features of another": lambda state: (
        state["features"]["c4"].update(mean=state["features"]["c0"]["mean"]) or state
    ),
    "count": lambda state: state["features"]["c4"].update(count=10**9) or state,
    "an extra field": lambda state: {**state, "extra": 1},
    "no plain data": lambda state: {**state, "round": object()},
}


@pytest.mark.parametrize("case", TAMPERED)
def test_damaged_states_are_refused(case: str) -> None:
    tested = defense(LEVELS["cumulative"])
    play(tested, range(1, 3))
    fresh = defense(LEVELS["cumulative"])
    before = fresh.state_dict()
    with pytest.raises(StateError):
        fresh.load_state_dict(TAMPERED[case](tested.state_dict()))
    assert fresh.state_dict() == before


NANS = "<f8:" + base64.b64encode(np.full(3, np.nan).tobytes()).decode()
RESEALED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a mean of NaN": lambda state: state["features"]["c4"].update(mean=NANS),
    "a mean as a list": lambda state: state["features"]["c4"].update(mean=[0.1]),
    "no base64": lambda state: state["features"]["c4"].update(mean="<f8:?"),
    "no mean": lambda state: state["features"]["c4"].pop("mean"),
    "features as a list": lambda state: state.update(features=[1]),
    "no state": lambda state: state.update(state=None),
}


@pytest.mark.parametrize("case", RESEALED)
def test_a_hash_made_anew_does_not_carry_what_is_no_state(case: str) -> None:
    tested = defense(LEVELS["cumulative"])
    play(tested, range(1, 3))
    state = tested.state_dict()
    RESEALED[case](state)
    plain = {key: value for key, value in state.items() if key != "sha256"}
    seal = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    with pytest.raises(StateError, match="damaged"):
        defense(LEVELS["cumulative"]).load_state_dict({**plain, "sha256": seal})


def test_frozen_clients_need_no_evidence_and_keep_their_factor() -> None:
    level = EvidenceLevel(min_evidence=2, audit_interval=3)
    tested = defense(level)
    for number in (1, 2):
        assert tested.wanted(CLIENTS) == set(CLIENTS)
        tested.assess(number, list(updates(level, number, malicious=("c4",)).values()))
    assert tested.wanted([*CLIENTS, "new"]) == {"new"}
    record = tested.assess(
        3, [replace(one, steps=()) for one in updates(level, 3, malicious=("c4",)).values()]
    )
    assert record.scores == {}
    assert not record.reasons
    assert record.factors == {"c0": 1.0, "c1": 1.0, "c2": 1.0, "c3": 1.0, "c4": 0.0}
    assert record.status == {
        "c0": "benign",
        "c1": "benign",
        "c2": "benign",
        "c3": "benign",
        "c4": "malicious",
    }
    other = Adapter(
        dict(updates(level, 4)["c0"].adapter), kind="factor_delta", base_model="org/other"
    )
    trusted = tested.assess(4, [replace(update("c0", 400), adapter=other), update("c1", 401)])
    assert trusted.factors == {"c0": 0.0, "c1": 1.0}  # not scored, and checked all the same
    assert "base model 'org/other'" in trusted.reasons["c0"]


def test_without_a_defence_nobody_is_wanted_and_all_count_by_their_examples() -> None:
    tested = defense(None)
    assert tested.wanted(CLIENTS) == set()
    record = tested.assess(1, list(updates(None, malicious=("c1",)).values()))
    assert record.weights == {
        client: pytest.approx(n / 250)
        for client, n in zip(CLIENTS, (30, 40, 50, 60, 70), strict=True)
    }
    assert set(record.factors.values()) == {1.0}
