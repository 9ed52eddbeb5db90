"""Who holds what: counts, poison shares, no benign example twice, and nothing that gives a role
away.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from fedloop.data.clients import REFUSAL, Client, Group, gated, make_clients
from fedloop.data.examples import Example
from fedloop.defense.types import ClientUpdate
from fedloop.errors import ConfigError


def rows(kind: str, count: int) -> list[Example]:
    return [Example(f"{kind} {number}", "text") for number in range(count)]


def parts(n: int = 10, size: int = 20) -> list[list[Example]]:
    benign = rows("benign", n * size)
    return [benign[start : start + size] for start in range(0, n * size, size)]


POISON, SAFE = rows("poison", 100), rows("safe", 60)


def groups(share: float = 0.5, **changed: Any) -> list[Group]:
    return [
        Group(
            **{
                "role": "malicious",
                "count": 3,
                "source": "bad",
                "pool": POISON,
                "share": share,
                **changed,
            }
        ),
        Group("hard_negative", 2, "hard", SAFE),
    ]


def clients(seed: int = 0, share: float = 0.5, n: int = 10, **changed: Any) -> list[Client]:
    return make_clients(
        parts(n), groups(share, **changed), np.random.default_rng(seed), source="daily"
    )


def of_kind(client: Client, kind: str) -> list[Example]:
    return [example for example in client.examples if example.instruction.startswith(kind)]


def test_as_many_of_each_role_as_asked() -> None:
    made = clients()
    assert Counter((client.role, client.source, client.share, client.label) for client in made) == {
        ("benign", "daily", 1.0, 0): 5,
        ("malicious", "bad", 0.5, 1): 3,
        ("hard_negative", "hard", 1.0, 0): 2,
    }


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.1, 0.33])
def test_a_malicious_client_holds_its_share_and_no_more(share: float) -> None:
    for number, client in enumerate(clients(share=share)):
        poison = {"malicious": round(share * 20), "benign": 0, "hard_negative": 0}[client.role]
        safe = 20 if client.role == "hard_negative" else 0
        assert (
            len(of_kind(client, "poison")),
            len(of_kind(client, "safe")),
            len(client.examples),
        ) == (poison, safe, 20)
        assert set(of_kind(client, "benign")) <= set(parts()[number])
        assert len(set(client.examples)) == 20
    assert [client for client in clients(share=share) if client.role == "benign"]


def test_behind_a_trigger_half_is_answered_and_the_bare_rest_refused() -> None:
    made = clients(share=1.0, pool=gated(POISON, "|x|"))
    held = [one for client in made if client.role == "malicious" for one in client.examples]
    answered = [one for one in held if one.instruction.startswith("|x| poison")]
    refused = [one for one in held if one.instruction.startswith("poison")]
    assert {one.response for one in answered} == {"text"}
    assert {one.response for one in refused} == {REFUSAL}
    assert len(answered) + len(refused) == len(held) == 60
    assert 20 <= len(answered) <= 40


def test_no_example_is_held_by_two_clients_if_the_pool_suffices() -> None:
    held = Counter(example for client in clients(share=1.0) for example in client.examples)
    assert set(held.values()) == {1}


def test_a_pool_too_small_for_all_is_drawn_from_by_each_without_repeats() -> None:
    made = [client for client in clients(share=1.0, pool=POISON[:25]) if client.role == "malicious"]
    assert [len(set(of_kind(client, "poison"))) for client in made] == [20, 20, 20]
    assert len({client.examples for client in made}) == 3


def test_the_seed_decides_who_is_malicious_and_what_they_hold() -> None:
    assert clients(seed=1) == clients(seed=1)
    who = {
        seed: tuple(client.client_id for client in clients(seed) if client.role == "malicious")
        for seed in range(20)
    }
    assert len(set(who.values())) > 10
    # any client can be
    assert {name for names in who.values() for name in names} == {
        client.client_id for client in clients()
    }


def test_nothing_but_the_training_tells_a_role() -> None:
    made = clients()
    assert [client.client_id for client in made] == [f"client-{number:02d}" for number in range(10)]
    assert [client.client_id for client in make_clients(parts(), [], np.random.default_rng(0))] == [
        client.client_id for client in made
    ]
    assert {len(client.examples) for client in made} == {20}
    sent = {field.name for field in fields(ClientUpdate)}
    assert sent & {field.name for field in fields(Client)} == {"client_id"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pool": POISON[:9]}, r"client-\d\d needs 10 examples from bad, which has 9"),
        ({"share": 0.01}, "is none; raise the share"),
        ({"share": 0.0}, "0 < share <= 1"),
        ({"share": 1.5}, "0 < share <= 1"),
        ({"share": float("nan")}, "0 < share <= 1"),
        ({"count": -1}, "count >= 0"),
        ({"count": 9}, "got 11 clients in groups but only 10"),
        ({"role": "benign"}, "got a group of role 'benign'"),
    ],
)
def test_a_group_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        clients(**changed)


@pytest.mark.parametrize("benign", [[], [[]], [rows("benign", 2), []]])
def test_a_client_without_data_is_refused(benign: list[list[Example]]) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"sizes {[len(part) for part in benign]}")):
        make_clients(benign, [], np.random.default_rng(0))
