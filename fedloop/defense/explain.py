"""Why a client counted as it did in a round: all of it stands in the round's record."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import EvidenceError
from .types import RoundRecord


@dataclass(frozen=True)
class Explanation:
    """Why a client counted as it did in a round.

    Attributes:
        level: who judged; "" for nobody.
        evidence: what the level read of the client; "" for nothing.
        scores: P(malicious) of that evidence; empty if it was not scored.
        cut: the score from which it spoke against the client; None if it was not scored.
        reason: why it counted less than fully, or the operator's word; "" if it counted in full.
        status: the level's standing verdict, for levels that have one.
        rule: what aggregated the accepted updates.
        overruled: the operator's word that stands for the client; "" for none.
    """

    client: str
    round: int
    level: str
    evidence: str
    factor: float
    weight: float
    scores: tuple[float, ...]
    cut: float | None
    reason: str
    status: str
    rule: str
    overruled: str = ""

    def __str__(self) -> str:
        """One line."""
        read = f" on {self.evidence}" if self.evidence else ""
        parts = [
            f"round {self.round}, {self.client}",
            f"factor {self.factor:.3g}, weight {self.weight:.3g}",
            f"level {self.level or 'none'}{read}, aggregated by {self.rule or 'the caller'}",
        ]
        if self.scores:
            at = "" if self.cut is None else f", cut {self.cut:.3f}"
            parts.append(f"score {self.scores[-1]:.3f}{at}")
        verdict = (self.status, self.reason)
        word = f"overruled: {self.overruled}" if self.overruled else ""
        return "; ".join(part for part in (*parts, *verdict, word) if part)


def explanation(record: RoundRecord, client: str, overruled: str = "") -> Explanation:
    """Why a client counted as it did in a round.

    Args:
        overruled: the operator's word that stands for the client.

    Raises:
        EvidenceError: the client had no part in it.
    """
    if client not in record.factors:
        raise EvidenceError(
            f"got client {client!r}; expected one of round {record.round}:"
            f" {', '.join(record.factors)[:500] or 'nobody took part'}"
        )
    return Explanation(
        client,
        record.round,
        record.level,
        record.evidence,
        record.factors[client],
        record.weights.get(client, 0.0),
        record.scores.get(client, ()),
        record.cuts.get(client),
        why(record, client) or (record.note if record.skipped else ""),
        record.status.get(client, ""),
        record.rule,
        overruled,
    )


def why(record: RoundRecord, client: str) -> str:
    """Why a client counted less than fully in a round, as far as its record says; "" if it did."""
    reason = record.reasons.get(client, "")
    if reason or record.factors[client] > 0:
        return reason
    by = f" by level {record.level!r}" if record.level else ""
    scores = record.scores.get(client)
    if not scores:
        return f"judged malicious in a former round{by}"
    cut = record.cuts.get(client)
    at = "" if cut is None else f"; the cut is {cut:.3f}"
    read = f" on {record.evidence}" if record.evidence else ""
    return f"judged malicious{by}{read}: score {scores[-1]:.3f}{at}"


def rejected(record: RoundRecord) -> dict[str, str]:
    """Client -> why, for every client that counts nothing in this round, those that the level
    judged malicious included.
    """
    return {client: why(record, client) for client, factor in record.factors.items() if not factor}
