"""Probation: a fresh id counts little until it has played as long as the others.

A level that judges by what it remembers knows nothing of a newcomer, so whoever returns under a new
id each round would be new for ever, and trusted. What counts as a round played: a well-formed
update that the level did not reject.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple


class Tried(NamedTuple):
    """What is left of everybody's factor.

    Attributes:
        factors: None if nobody but newcomers is left, whose weights may sum to less than 1.
        reasons: newcomer -> why it counts less than fully.
    """

    factors: dict[str, float] | None
    reasons: dict[str, str]


def on_probation(
    factors: Mapping[str, float],
    counts: Mapping[str, int],
    played: Mapping[str, int],
    probation: int,
    newcomer_share: float | None,
    exempt: Collection[str] = (),
) -> Tried:
    """Lower the factors of a round's newcomers.

    Who played p rounds counts (p + 1) / (P + 1), P the longest that anybody played, at most
    `probation` rounds: in the first round nobody is new. Then all who are below P (or 1, without
    a probation) may have `newcomer_share` of the round's weight together.

    Args:
        factors: client -> factor in [0, 1], of the round's well-formed updates.
        counts: client -> examples that count, of the same clients.
        played: client -> rounds played before this one, of all clients ever seen.
        exempt: clients that are no newcomers whatever they played.

    Source: this project.
    """
    if not probation and newcomer_share is None:
        return Tried(dict(factors), {})
    longest = min(max(played.values(), default=0), max(probation, 1))
    new = {
        client: played.get(client, 0)
        for client, factor in factors.items()
        if factor > 0 and client not in exempt and played.get(client, 0) < longest
    }
    ramp = {
        client: (rounds + 1) / (longest + 1) if probation else 1.0 for client, rounds in new.items()
    }
    tried = {client: factor * ramp.get(client, 1.0) for client, factor in factors.items()}
    if newcomer_share is not None and new:
        weight = math.fsum(counts[client] * tried[client] for client in new)
        others = math.fsum(counts[client] * tried[client] for client in tried.keys() - new.keys())
        if not others:
            return Tried(None, {})
        cap = newcomer_share / (1 - newcomer_share) * others
        if weight > cap:
            ramp = {client: part * cap / weight for client, part in ramp.items()}
            tried = {client: factor * ramp.get(client, 1.0) for client, factor in factors.items()}
    reasons = {
        client: f"newcomer: {rounds} of {longest} rounds played; counts {ramp[client]:.3g} of its"
        " trust"
        for client, rounds in new.items()
        if ramp[client] < 1
    }
    return Tried(tried, reasons)
