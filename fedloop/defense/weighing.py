"""From a level's factors to weights: caps on counts and lengths, and the safety gate.

Whoever the level rejects has no part in it: medians are over the clients that count at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, NamedTuple

from ..checks import check_names, checked_options, is_integer, is_share
from ..errors import ConfigError, EvidenceError
from .probation import on_probation
from .screening import Checked
from .types import client_name
from .weights import aggregation_weights, check_ratio, checked_examples, counted_examples


@dataclass(frozen=True)
class Limits:
    """How far a claim, a length or a round of little trust counts; see `Defense`.

    Raises:
        ConfigError: a value is out of range.
    """

    min_mean_factor: float = 0.2
    max_count_ratio: float | None = 3.0
    max_norm_ratio: float | None = None
    registered: Mapping[str, int] | None = None
    max_steps: int = 1024
    forget_after: int | None = None
    probation: int = 0
    newcomer_share: float | None = None
    score_aggregate: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Limits:
        """From a dict of some of the fields.

        Raises:
            ConfigError: it is no dict, a field is unknown, or its value is out of range.
        """
        options = checked_options("defense_options", options)
        check_names("a defence has no option", options, [field.name for field in fields(cls)])
        return cls(**options)

    def __post_init__(self) -> None:
        share = self.min_mean_factor
        if not isinstance(share, Real) or isinstance(share, bool) or not 0 <= share <= 1:
            raise ConfigError(f"min_mean_factor: got {share!r}; expected a number in [0, 1]")
        for name in ("max_count_ratio", "max_norm_ratio"):
            if getattr(self, name) is not None:
                check_ratio(name, getattr(self, name))
        if self.registered is not None:
            object.__setattr__(self, "registered", _registered(self.registered))
        if not is_integer(self.max_steps, 1):
            raise ConfigError(f"max_steps: got {self.max_steps!r}; expected a whole number >= 1")
        if self.forget_after is not None and not is_integer(self.forget_after, 1):
            raise ConfigError(
                f"forget_after: got {self.forget_after!r}; expected a number of rounds, or None"
            )
        if not is_integer(self.probation, 0):
            raise ConfigError(f"probation: got {self.probation!r}; expected a number of rounds")
        share = self.newcomer_share
        if share is not None and not (is_share(share) and share < 1):
            raise ConfigError(
                f"newcomer_share: got {share!r}; expected a number in [0, 1), or None for no cap"
            )
        if not isinstance(self.score_aggregate, bool):
            raise ConfigError(
                f"score_aggregate: got {self.score_aggregate!r}; expected True or False"
            )

    @property
    def knows_newcomers(self) -> bool:
        """Whether rounds played have to be counted."""
        return self.probation > 0 or self.newcomer_share is not None

    def counts(self, sound: Mapping[str, Checked]) -> dict[str, int]:
        """How many examples count for each of these clients."""
        claims = {client: update.num_examples for client, update in sound.items()}
        return counted_examples(claims, self.max_count_ratio, self.registered) if claims else {}


class Weighed(NamedTuple):
    """What everybody counts in a round.

    Attributes:
        weights: None if the round is skipped; `note` then says why.
    """

    factors: dict[str, float]
    counts: dict[str, int]
    reasons: dict[str, str]
    weights: dict[str, float] | None
    note: str


def weigh(
    judged: Mapping[str, float],
    sound: Mapping[str, Checked],
    allowed: Mapping[str, str],
    limits: Limits,
    played: Mapping[str, int] | None = None,
) -> Weighed:
    """Weigh the well-formed updates of a round.

    Args:
        judged: client -> the level's factor.
        sound: the same clients' updates.
        allowed: client -> why it counts fully whatever the level says.
        played: client -> rounds played before this one, where newcomers are on probation.
    """
    if not judged:
        return Weighed({}, {}, {}, None, "skipped: no well-formed update")
    factors = {client: 1.0 if client in allowed else judged[client] for client in sorted(judged)}
    trusted = {client: sound[client] for client in factors if factors[client] > 0}
    counts = {**limits.counts(sound), **limits.counts(trusted)}
    reasons = {client: allowed[client] for client in factors if client in allowed}
    if aggregation_weights(factors, counts, limits.min_mean_factor) is None:
        return Weighed(factors, counts, reasons, None, _gated(factors, limits.min_mean_factor))
    norms = {client: update.norm for client, update in trusted.items()}
    shares, long = _shares(norms, limits.max_norm_ratio)
    factors = {client: factor * shares.get(client, 1.0) for client, factor in factors.items()}
    tried, new = on_probation(
        factors, counts, played or {}, limits.probation, limits.newcomer_share, allowed
    )
    if tried is None:
        note = f"skipped: nobody but newcomers, who may weigh {limits.newcomer_share:g} together"
        return Weighed(factors, counts, reasons | long, None, note)
    for client, why in new.items():
        long[client] = f"{long[client]}; {why}" if client in long else why
    weights = aggregation_weights(tried, counts, 0.0)
    return Weighed(tried, counts, reasons | long, weights, "")


def _gated(factors: Mapping[str, float], least: float) -> str:
    mean = math.fsum(factors.values()) / len(factors)
    below = f"is below {least:g}" if mean < least else "leaves nobody to count"
    return f"skipped by the safety gate: mean factor {mean:.3g} of {len(factors)} updates {below}"


def _shares(
    norms: Mapping[str, float], max_norm_ratio: float | None
) -> tuple[dict[str, float], dict[str, str]]:
    """What is left of the factor of an update that is too long, and a reason that says so."""
    if max_norm_ratio is None or not norms:
        return {}, {}
    longest = max_norm_ratio * sorted(norms.values())[(len(norms) - 1) // 2]
    long = {client: norm for client, norm in norms.items() if norm > longest}
    return (
        {client: longest / norm for client, norm in long.items()},
        {
            client: f"long: its norm is {norm:.3g}; up to {longest:.3g} counts in this round"
            for client, norm in long.items()
        },
    )


def _registered(counts: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(counts, Mapping):
        raise ConfigError(
            f"registered: got a {type(counts).__name__}; expected client id -> example count"
        )
    try:
        return checked_examples({client_name(client): count for client, count in counts.items()})
    except EvidenceError as error:
        raise ConfigError(f"registered: {error}") from None
