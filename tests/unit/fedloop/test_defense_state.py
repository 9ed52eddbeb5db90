"""What a Defense carries from round to round.

It can be saved, it is nobody else's, and it does not depend on how a round is cut.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedloop.defense.defense import Defense
from fedloop.defense.levels import CumulativeLevel, EvidenceLevel
from fedloop.defense.types import RoundRecord
from fedloop.errors import EvidenceError, StateError
from fedloop.run.checkpoint import load_checkpoint, save_checkpoint
from loraprobe.adapters.adapter import Adapter
from tests.helpers.federated import CLIENTS, LEVELS, same_tree, untimed, update, updates
from tests.unit.fedloop.test_defense import bent, defense


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
        frozen = json.dumps(state, default=lambda array: array.tolist())
        play(tested, range(3, 6))
        assert json.dumps(state, default=lambda array: array.tolist()) == frozen


def test_states_of_other_levels_and_damaged_ones_are_refused() -> None:
    states = {name: defense(level).state_dict() for name, level in LEVELS.items()}
    for name, level in LEVELS.items():
        for other, state in states.items():
            tested = defense(level)
            if name == other:
                tested.load_state_dict(state)
            else:
                with pytest.raises(StateError, match="a state belongs to its level's parameters"):
                    tested.load_state_dict(state)
    for change in ({"version": 9}, {"level": "StepLevel()"}):
        with pytest.raises(StateError):
            defense(LEVELS["step"]).load_state_dict({**states["step"], **change})
    for key in states["step"].keys() - {"rules"}:
        with pytest.raises(StateError, match=f"lacks \\['{key}'\\]"):
            defense(LEVELS["step"]).load_state_dict(
                {name: value for name, value in states["step"].items() if name != key}
            )


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


@pytest.mark.parametrize("relative", [False, True])
def test_blocks_of_clients_have_no_seams(relative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    level = CumulativeLevel(relative=relative)
    whole, parted = defense(level), defense(level)
    expected = play(whole, range(1, 4))
    monkeypatch.setattr("fedloop.defense.defense._BLOCK", 2)
    assert play(parted, range(1, 4)) == expected
    assert same_tree(parted.state_dict(), whole.state_dict())
