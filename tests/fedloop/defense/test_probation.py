"""A fresh id counts little until it has played as long as the others, at every level."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloop.defense.defense import Defense
from fedloop.defense.probation import on_probation
from fedloop.defense.types import ClientUpdate, RoundRecord
from fedloop.errors import ConfigError
from tests.fedloop.defense.test_defense import defense
from tests.helpers.federated import CLIENTS, LEVELS, untimed, updates

OTHERS = CLIENTS[:4]


def play(of: Defense, rounds: range, fresh: str = "c4") -> list[RoundRecord]:
    """Rounds in which one client comes under this id; {} is the round."""
    records = []
    for number in rounds:
        sent: dict[str, ClientUpdate] = updates(of.level, number)
        new = replace(sent["c4"], client_id=fresh.format(number))
        whole = [sent[client] for client in OTHERS] + [new]
        records.append(untimed(of.assess(number, whole)))
    return records


@pytest.mark.parametrize("name", [None, *LEVELS])
def test_who_comes_back_under_a_new_id_never_gets_past_its_probation(name: str | None) -> None:
    level = LEVELS[name] if name else None
    plain, tried = (defense(level, probation=rounds) for rounds in (0, 3))
    without, records = (play(one, range(1, 7), "new-{}") for one in (plain, tried))
    for old, now in zip(without, records, strict=True):
        fresh = f"new-{now.round}"
        share = 1 / min(now.round, 4)
        assert now.factors[fresh] == pytest.approx(share * old.factors[fresh])
        assert {c: now.factors[c] for c in OTHERS} == {c: old.factors[c] for c in OTHERS}
    assert records[0] == without[0]  # nobody is new where everybody is
    assert "newcomer: 0 of 3 rounds" in tried.explain("new-6").reason
    staying = play(defense(level, probation=3), range(1, 7))
    assert staying == play(defense(level), range(1, 7))


def test_newcomers_together_have_a_share_and_no_round_of_their_own() -> None:
    tested = defense(None, newcomer_share=0.1)
    play(tested, range(1, 3))
    sent = updates(None, 3)
    both = [replace(sent["c0"], client_id="x"), replace(sent["c1"], client_id="y")]
    record = tested.assess(3, [sent["c2"], sent["c3"], *both])
    assert record.weights["x"] + record.weights["y"] == pytest.approx(0.1)
    assert record.factors["c2"] == 1.0
    only = [replace(update, client_id=f"{client}-again") for client, update in sent.items()]
    alone = tested.assess(4, only)
    assert alone.skipped
    assert "nobody but newcomers" in alone.note
    assert not tested.assess(5, [replace(one, adapter=one.adapter) for one in only]).skipped


def test_an_operators_word_ends_a_probation_and_a_rejection_is_no_round_played() -> None:
    level = LEVELS["client"]
    tested = defense(level, probation=3)
    sent = updates(level, 1, malicious=("c4",))
    tested.assess(1, list(sent.values()))
    state = tested.state_dict()
    rejected = {client for client, factor in tested.assess(2, []).factors.items() if not factor}
    assert not rejected
    assert state["played"] == {c: 1 for c in CLIENTS if trust_of(state, c) > 0}
    play(tested, range(3, 5))
    tested.allow("new", why="known from another project")
    record = play(tested, range(5, 6), "new")[0]
    assert record.factors["new"] == 1.0


def trust_of(state: dict[str, Any], client: str) -> float:
    return float(state["state"]["clients"][client]["factor"])


def test_states_keep_what_was_played() -> None:
    tested = defense(LEVELS["cumulative"], probation=3, forget_after=2)
    play(tested, range(1, 3), "gone")
    state = json.loads(json.dumps(tested.state_dict()))
    resumed = defense(LEVELS["cumulative"], probation=3, forget_after=2)
    resumed.load_state_dict(state)
    assert play(resumed, range(3, 7), "new-{}") == play(tested, range(3, 7), "new-{}")
    assert "gone" not in resumed.state_dict()["played"]


@pytest.mark.parametrize(
    "options", [{"probation": -1}, {"probation": True}, {"newcomer_share": 1.0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        defense(None, **options)


def test_weights_are_those_of_the_definition() -> None:
    """(p + 1) / (P + 1) of n, and a share s of what is left after it."""
    rng = torch.Generator().manual_seed(0)
    for probation in (0, 1, 4):
        played = {f"{n}": int(torch.randint(6, (1,), generator=rng)) for n in range(8)}
        counts = {client: 10 + int(client) for client in played}
        found = on_probation(dict.fromkeys(played, 1.0), counts, played, probation, 0.2).factors
        longest = min(max(played.values()), max(probation, 1))
        new = [client for client in played if played[client] < longest]
        ramp = {
            c: (min(played[c], longest) + 1) / (longest + 1) if probation else 1 for c in played
        }
        old = sum(counts[c] for c in played if c not in new)
        heavy = sum(counts[c] * ramp[c] for c in new)
        cut = min(1.0, 0.25 * old / heavy) if new else 1.0
        expected = {c: ramp[c] * cut if c in new else 1.0 for c in played}
        assert found == pytest.approx(expected)
