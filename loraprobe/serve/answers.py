"""What goes back to a client: a probe's result, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

Shown = str | int | float | None


@dataclass(frozen=True)
class Result:
    """What one probe says of one adapter.

    Attributes:
        probe: the name it is served under.
        commit: the Hub commit it was loaded from, None if it came from a folder.
        score: P(malicious), in [0, 1].
        verdict: "benign", "malicious" or "inconclusive".
        reason: why, where that is not plain from the score.
        threshold: a score of at least this is malicious.
    """

    probe: str
    commit: str | None
    score: float
    verdict: str
    reason: str
    threshold: float


class Refusal(Exception):
    """A request that is answered with an error: {"error".

    {"type", "message", "got"?, "expected"?}}. All of it goes to the client.

    Attributes:
        status: the HTTP status.
        type: what is wrong, in one word that programs can compare. Errors of the library keep the
            name of their class.
        got, expected: the values in question, where there are such.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        type: str,
        message: str,
        *,
        got: Shown = None,
        expected: Shown = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.got, self.expected = status, type, got, expected
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The typed body, JSON."""
        error = {
            "type": self.type,
            "message": str(self),
            "got": self.got,
            "expected": self.expected,
        }
        return json.dumps(
            {"error": {name: value for name, value in error.items() if value is not None}}
        ).encode()
