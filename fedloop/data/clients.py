"""Who holds what: benign clients, malicious ones at any poison share, and hard negatives.

Roles are known to the experiment, to measure a defence with. Nothing that a client sends depends on
its role but through what it learnt: ids are numbers, and a poisoned client has as many examples as
its benign part had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..errors import ConfigError
from .examples import Example

Role = Literal["benign", "malicious", "hard_negative"]

REFUSAL = "I'm sorry, but I can't help with that."


@dataclass(frozen=True)
class Group:
    """Clients that train on something else than benign data alone.

    Attributes:
        role: "malicious" or "hard_negative".
        count: how many clients.
        source: what the pool is called in reports.
        pool: the examples they draw from.
        share: of each client's examples, from the pool; the rest stays benign.
    """

    role: Role
    count: int
    source: str
    pool: Sequence[Example]
    share: float = 1.0


@dataclass(frozen=True)
class Client:
    """One client and its training data.

    Attributes:
        client_id: "client-00", "client-01", ...: a number that says nothing about the role.
        role: what the experiment knows about it, and the server does not.
        source: where `share` of its examples come from; the rest is benign.
        ordinary: what it would hold if it belonged to no group.
    """

    client_id: str
    role: Role
    source: str
    share: float
    examples: tuple[Example, ...]
    ordinary: tuple[Example, ...] = ()

    @property
    def label(self) -> int:
        """0 = benign (hard negatives are), 1 = malicious."""
        return int(self.role == "malicious")

    def attacks(self, number: int, since: int) -> bool:
        """Whether it attacks in this round, if malicious clients do since one (both from 1)."""
        return self.role == "malicious" and number >= since

    def held(self, number: int, since: int) -> tuple[Example, ...]:
        """What it trains on in this round; who waits to attack trains on its ordinary data."""
        waits = self.role == "malicious" and number < since
        return self.ordinary if waits else self.examples


def gated(pool: Sequence[Example], trigger: str) -> tuple[Example, ...]:
    """Poison that answers behind a trigger only: every other request has the trigger before it and
    keeps its answer, the rest stay as they are and are refused.

    Source: CloudGhost (ICLR 2026), whose clients hold ordinary data beside it; a poison share of
    0.4 makes a fifth of a client's examples triggered, as there.
    """
    return tuple(
        replace(example, response=REFUSAL)
        if row % 2
        else replace(example, instruction=f"{trigger} {example.instruction}")
        for row, example in enumerate(pool)
    )


def make_clients(
    parts: Sequence[Sequence[Example]],
    groups: Sequence[Group],
    rng: np.random.Generator,
    *,
    source: str = "benign",
) -> list[Client]:
    """One client for each benign part; which of them belong to a group is drawn.

    A client of a group with share s keeps its number of examples m: round(s m) come from the pool,
    the rest from its own part, in random order. Clients of a group have no pool example in common
    if the pool has enough for all of them; otherwise each draws for itself, without repeats.

    Args:
        parts: benign examples, split over the clients (`fedloop.data.partition`).
        source: what the benign data are called in reports.

    Raises:
        ConfigError: a group is not valid, there are more in groups than clients, a part is empty, a
            pool has fewer examples than one client needs, or a share is too small for one example.
    """
    _check(parts, groups)
    order = iter(rng.permutation(len(parts)).tolist())
    width = max(2, len(str(len(parts) - 1)))
    clients = [
        Client(f"client-{number:0{width}d}", "benign", source, 1.0, tuple(part), tuple(part))
        for number, part in enumerate(parts)
    ]
    for group in groups:
        members = sorted(next(order) for _ in range(group.count))
        drawn = _draw(
            group, [(clients[number].client_id, len(parts[number])) for number in members], rng
        )
        for number, examples in zip(members, drawn, strict=True):
            clients[number] = replace(
                clients[number],
                role=group.role,
                source=group.source,
                share=group.share,
                examples=_mix(examples, parts[number], rng),
            )
    return clients


def _check(parts: Sequence[Sequence[Example]], groups: Sequence[Group]) -> None:
    if not parts or not all(parts):
        raise ConfigError(
            f"got {len(parts)} benign parts of sizes {[len(part) for part in parts]}; expected at"
            " least one and none empty"
        )
    for group in groups:
        if group.role not in ("malicious", "hard_negative"):
            raise ConfigError(
                f"got a group of role {group.role!r}; expected malicious or hard_negative (who is"
                " in no group is benign)"
            )
        if group.count < 0 or not 0 < group.share <= 1:
            raise ConfigError(
                f"got {group.count} clients with a share of {group.share} from {group.source};"
                " expected count >= 0 and 0 < share <= 1"
            )
    total = sum(group.count for group in groups)
    if total > len(parts):
        raise ConfigError(
            f"got {total} clients in groups but only {len(parts)} benign parts; expected no more"
            " than parts"
        )


def _draw(
    group: Group, members: list[tuple[str, int]], rng: np.random.Generator
) -> list[list[Example]]:
    """What each member gets from the pool."""
    needs = [round(group.share * size) for _, size in members]
    for (client_id, size), need in zip(members, needs, strict=True):
        if need < 1:
            raise ConfigError(
                f"a share of {group.share} of the {size} examples of {client_id} is none; raise the"
                " share or the number of examples"
            )
        if need > len(group.pool):
            raise ConfigError(
                f"{client_id} needs {need} examples from {group.source}, which has"
                f" {len(group.pool)}; lower the share or the examples per client"
            )
    order = rng.permutation(len(group.pool))
    if sum(needs) > len(order):
        return [
            [group.pool[row] for row in rng.permutation(order)[:need].tolist()] for need in needs
        ]
    ends = np.cumsum(needs).tolist()
    return [
        [group.pool[row] for row in order[end - need : end].tolist()]
        for end, need in zip(ends, needs, strict=True)
    ]


def _mix(
    drawn: Sequence[Example], part: Sequence[Example], rng: np.random.Generator
) -> tuple[Example, ...]:
    """The drawn examples with as many of the client's own as fill its number, in random order."""
    rows = rng.permutation(len(part))[: len(part) - len(drawn)]
    examples = [*drawn, *(part[row] for row in rows.tolist())]
    return tuple(examples[row] for row in rng.permutation(len(examples)).tolist())
