"""What a page is written of, checked, and what its parts read off it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..defense.types import RoundRecord
from ..errors import StateError
from .drawing import ROLE_WORDS, ROLES

_NUMBERS = ("factors", "weights", "num_examples", "losses", "seconds", "bytes", "metrics", "cuts")
_TEXTS = ("note", "level", "evidence", "rule")


@dataclass(frozen=True)
class ReportedRun:
    """What a page is written of. `roles`.

    Client -> one of ROLES, in that order, also for clients that only the records know.
    """

    config: Config
    about: Mapping[str, Mapping[str, Any]]
    roles: Mapping[str, str]
    records: Sequence[RoundRecord]

    @property
    def skipped(self) -> list[int]:
        """The numbers of the skipped rounds."""
        return [record.round for record in self.records if record.skipped]

    def series(
        self, values: Callable[[RoundRecord], Mapping[str, float]]
    ) -> dict[str, list[float]]:
        """Client -> one value a round, NaN where it has none."""
        rounds = [values(record) for record in self.records]
        return {client: [row.get(client, math.nan) for row in rounds] for client in self.roles}


def checked_run(
    run: Path, config: Config, about: Any, records: Sequence[RoundRecord]
) -> ReportedRun:
    """The run, once everything that the page reads of it has the type it should have."""
    if not isinstance(about, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("role"), str) for entry in about.values()
    ):
        raise StateError(
            f"{run / 'clients.json'}: expected an object of clients, each with its role; got"
            " something else. Restore the file."
        )
    rounds = [record.round for record in records]
    if rounds != list(range(1, len(rounds) + 1)):
        raise StateError(
            f"{run / 'records.jsonl'}: got records of rounds {rounds}; expected 1 to {len(rounds)},"
            " one each. Restore the file."
        )
    for record in records:
        groups = {
            name: getattr(record, name) for name in (*_NUMBERS, "scores", "reasons", "status")
        } | {name: {"": getattr(record, name)} for name in _TEXTS}
        for name, values in groups.items():
            if not isinstance(values, dict) or not all(
                fits(name, value) for value in values.values()
            ):
                kind = "finite numbers" if name in (*_NUMBERS, "scores") else "texts"
                raise StateError(
                    f"{run / 'records.jsonl'}, round {record.round}: {name} is not an object of"
                    f" {kind}. Restore the file."
                )
    clients = sorted(
        {*about, *(client for record in records for client in (*record.factors, *record.reasons))}
    )
    roles = {client: about.get(client, {}).get("role") for client in clients}
    ordered = [
        (client, role)
        for role in ROLES
        for client, recorded in roles.items()
        if (recorded if recorded in ROLES else "unknown") == role
    ]
    return ReportedRun(config, about, dict(ordered), records)


def fits(name: str, value: Any) -> bool:
    """Whether a value of a record has the type that it should have."""
    if name in ("reasons", "status", *_TEXTS):
        return isinstance(value, str)
    if name == "scores":
        return isinstance(value, tuple) and value != () and all(fits("score", s) for s in value)
    # NaN and infinity fail, and so does an integer beyond any float.
    return isinstance(value, int | float) and -1e300 < value < 1e300


def malicious_share(
    run: ReportedRun, values: Callable[[RoundRecord], Mapping[str, float]]
) -> list[float]:
    """The malicious clients' share of the sum of these values, one a round, NaN for a round that
    was not aggregated.
    """
    shares = []
    for record in run.records:
        by_client = values(record)
        total = math.fsum(by_client.values()) if record.weights else 0.0
        theirs = math.fsum(
            value for client, value in by_client.items() if run.roles.get(client) == "malicious"
        )
        shares.append(theirs / total if total > 0 else math.nan)
    return shares


def by_role(run: ReportedRun, series: Mapping[str, Sequence[float]]) -> str:
    """Each role's mean over its clients of their last values, in words."""
    means = {
        role: mean_of(last_of(series[client]) for client in run.roles if run.roles[client] == role)
        for role in ROLES
    }
    words = [
        f"{mean:.2f} for {ROLE_WORDS[role]}" for role, mean in means.items() if math.isfinite(mean)
    ]
    return f"{', '.join(words)} clients (means)"


def shaded(run: ReportedRun) -> str:
    """What a figure says of skipped rounds."""
    return " Shaded rounds were skipped." if run.skipped else ""


def is_refused(record: RoundRecord, client: str) -> bool:
    """Whether a client was refused with a reason."""
    return client in record.reasons and not record.factors.get(client)


def last_of(values: Iterable[float]) -> float:
    """The last finite value; NaN without one."""
    return next((value for value in reversed([*values]) if math.isfinite(value)), math.nan)


def mean_of(values: Iterable[float]) -> float:
    """The mean of the finite values; NaN without one."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
