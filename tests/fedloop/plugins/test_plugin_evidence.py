"""Evidence in a loop of one's own, and updates that come late."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedloop import Defense
from fedloop.defense.levels import ShadowLevel, StepLevel
from fedloop.plugins import Late, Reply, defend_round
from tests.helpers import plugged

START = plugged.global_state()


@pytest.mark.parametrize("level", [StepLevel(), ShadowLevel()], ids=["step", "shadow"])
def test_levels_that_read_evidence_get_it(level: Any) -> None:
    """The way to the update, or shadow steps of the client's class."""
    sent, evidence = {}, {}
    for client in plugged.CLIENTS:
        change = plugged.delta(10 * int(client), client == "5")
        sent[client] = (40, {key: START[key] + change[key] for key in START})
        way = [{key: share * value for key, value in change.items()} for share in (0.5, 1.0)]
        shadows = [plugged.delta(900 + 10 * int(client) + n, client == "5") for n in range(2)]
        evidence[client] = way if isinstance(level, StepLevel) else shadows

    def judged(evidence: Any) -> Any:
        options: dict[str, Any] = {"alpha": plugged.ALPHA, "evidence": evidence}
        return defend_round(plugged.defense(level), 1, sent, START, **options).record

    record = judged(evidence)
    assert not record.reasons
    assert record.factors["5"] < 0.1 < 0.9 < record.factors["1"]
    assert all(len(scores) == 2 for scores in record.scores.values())
    del evidence["1"]
    assert "missing evidence" in judged(evidence).reasons["1"]


UNUSABLE: dict[str, tuple[Any, str]] = {
    "number": (5, "steps of type int"),
    "none": (None, "steps of type NoneType"),
    "nothing": ([None], "state dict of type NoneType"),
    "text": ("ab", "state dict of type str"),
    "other keys": ([{"a": np.ones((2, 2))}], "not a LoRA factor"),
    "too many": ([plugged.delta(3)] * 4, "got 4 steps of evidence; expected at most 3"),
    "far too many": ([plugged.delta(3)] * 5000, "got 4 steps of evidence; expected at most 3"),
    "another trajectory": ([plugged.delta(3)], "the last step is not the submitted update"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_evidence_that_cannot_be_used_is_a_reason(name: str) -> None:
    steps, why = UNUSABLE[name]
    state = {key: START[key] + change for key, change in plugged.delta(60).items()}
    sent = [*plugged.as_replies(plugged.replies(START)), Reply("6", 40, state, steps)]
    defense = plugged.defense(StepLevel(), max_steps=3)
    record = defend_round(defense, 1, sent, START, alpha=plugged.ALPHA).record
    assert why in record.reasons["6"]


@pytest.mark.parametrize("late_updates", ["refuse", "count"])
def test_a_late_update_is_refused_or_counts_as_the_change_that_it_was(late_updates: Any) -> None:
    later = {key: value + 1 for key, value in START.items()}
    sent = plugged.replies(later, clients=("a", "slow"))
    early, slow = (plugged.replies(START, seed, ("x",))["x"] for seed in (0, 500))
    cut = {key: value[:1] for key, value in slow[1].items()}  # would be as wide as the start
    arrays = {key: value.numpy() for key, value in START.items()}
    done = defend_round(
        Defense(None),
        7,
        {"a": sent["a"]},
        later,
        alpha=plugged.ALPHA,
        expected=["a"],
        late={"a": Late(*early, START), "slow": Late(*slow, arrays), "cut": Late(1, cut, START)},
        late_updates=late_updates,
    )
    if late_updates == "refuse":
        assert "late: an update of an earlier round" in done.record.reasons["slow"]
        assert dict(done.weights) == {"a": 1.0, "cut": 0.0, "slow": 0.0}
        return
    assert "expected (4, " in done.record.reasons["cut"]
    assert dict(done.weights) == {"a": 0.5, "cut": 0.0, "slow": 0.5}
    for key, value in later.items():
        changes = sent["a"][1][key] - value, slow[1][key] - START[key]
        assert torch.allclose(done.state[key], value + sum(changes) / 2, atol=1e-6)
