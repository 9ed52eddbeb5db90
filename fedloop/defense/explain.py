"""Why a client counted as it did: from a record, and from the defence that wrote it."""

from __future__ import annotations

from dataclasses import dataclass

from .types import RoundRecord


@dataclass(frozen=True)
class Explanation:
    """Why a client counted as it did in the last round.

    Attributes:
        level: the level's name; None without one.
        evidence: what the level reads of a client.
        scores: P(malicious) of that evidence; empty if it was not scored.
        cut: the score from which it spoke against the client; None if it was not scored.
        reason: as in the record, or the verdict.
        overruled: the operator's word that stands for the client; "" for none.
    """

    client: str
    round: int
    level: str | None
    evidence: str | None
    factor: float
    weight: float
    scores: tuple[float, ...]
    cut: float | None
    reason: str
    status: str
    overruled: str


def why(record: RoundRecord, client: str) -> str:
    """Why a client counted less than fully in a round, as far as its record says; "" if it did."""
    reason = record.reasons.get(client, "")
    if reason or record.factors[client] > 0:
        return reason
    scores = record.scores.get(client)
    if not scores:
        return "judged malicious in a former round"
    cut = record.cuts.get(client)
    at = "" if cut is None else f"; the cut is {cut:.3f}"
    return f"judged malicious: score {scores[-1]:.3f}{at}"


def rejected(record: RoundRecord) -> dict[str, str]:
    """Client -> why, for every client that counts nothing in this round, those that the level
    judged malicious included.
    """
    return {client: why(record, client) for client, factor in record.factors.items() if not factor}
