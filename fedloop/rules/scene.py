"""What attackers see of a round, and what every attack's options have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import Checked, Validity, integer, number, or_none
from ..errors import AggregationError, ConfigError
from .updates import Floats

# Field -> what is valid; a name means the same in every attack that has it.
VALID: Mapping[str, Validity] = {
    **dict.fromkeys(("scale", "factor", "tau", "times"), number()),
    **dict.fromkeys(("z", "target"), or_none(number())),
    **dict.fromkeys(("std", "max_norm"), or_none(number(at_least=0))),
    "index": or_none(integer(0)),
}


@dataclass(frozen=True)
class Scene:
    """What attackers see of a round, all float64.

    Attributes:
        honest: (h, d), what the honest clients send.
        attackers: how many there are (n).
        rng: what random attacks draw from.
        own: (n, d), what the attackers trained.
        direction: (d,), the probe's weights in the space of the updates, of any length.
    """

    honest: Floats
    attackers: int
    rng: np.random.Generator | None = None
    own: Floats | None = None
    direction: Floats | None = None


class AttackOptions(Checked):
    """Options of an attack, checked when they are made."""

    valid = VALID


def own_or(scene: Scene, otherwise: Floats) -> Floats:
    """The attackers' own updates (n, d); n copies of another row if they are not given."""
    return copies(otherwise, scene.attackers) if scene.own is None else scene.own


def copies(row: Floats, n: int) -> Floats:
    """A row (d,) n times, (n, d)."""
    return np.repeat(row[None, :], n, axis=0)  # (n, d)


def check_possible(
    attack: Callable[..., Any], honest: int, attackers: int, sampled: int | None
) -> None:
    """Try an attack on updates of next to no length, in every number of attackers of a round.

    Args:
        honest, attackers: clients of the federation.
        sampled: clients a round; None for all.

    Raises:
        ConfigError: no round can have the attack, whatever clients send.
    """
    chosen = sampled or honest + attackers
    reason = "got no round of attackers and honest clients; attacks are made from honest updates"
    for n in range(max(1, chosen - honest), min(attackers, chosen - 1) + 1):
        rng = np.random.default_rng(0)
        try:
            attack(1e-9 * rng.standard_normal((chosen - n, 8)), n, rng=rng)
        except AggregationError as error:
            reason = str(error)
        else:
            return
    raise ConfigError(f"update_attack: {reason}")
