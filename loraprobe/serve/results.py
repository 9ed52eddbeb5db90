"""What goes back to a client: a probe's result, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Shown = str | int | float | None
Unchecked = Literal["base_model", "config", "other_modules", "start"]


@dataclass(frozen=True)
class Result:
    """What one probe says of one adapter.

    Attributes:
        probe: the name it is served under.
        commit: the Hub commit it was loaded from, None if it came from a folder.
        score: P(malicious), in [0, 1]; in tenths where the service rounds, None where it gives
            verdicts only.
        verdict: "benign", "malicious" or "inconclusive".
        reason: why, where that is not plain from the score.
        threshold: a score of at least this is malicious; None where scores are not given exactly.
        unchecked: what nobody compared. "base_model": the adapter or the probe names none, or the
            service takes any. "config": adapter_config.json, which is never sent. "other_modules":
            of a slice, the rest of the adapter. "start": of a delta, that it was taken from the
            adapter that training started from.
    """

    probe: str
    commit: str | None
    score: float | None
    verdict: Literal["benign", "malicious", "inconclusive"]
    reason: str
    threshold: float | None
    unchecked: tuple[Unchecked, ...] = ()


class Refusal(Exception):
    """A request that is answered with an error; all of it goes to the client.

    Attributes:
        status: the HTTP status.
        type: what is wrong, in one word that programs can compare. Errors of the library keep the
            name of their class.
        got: the value in question, where there is one.
        expected: what was expected instead.
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
        self.status = status
        self.type = type
        self.got = got
        self.expected = expected
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """{"error": {"type", "message", "got"?, "expected"?}} as JSON."""
        error = {
            "type": self.type,
            "message": str(self),
            "got": self.got,
            "expected": self.expected,
        }
        return json.dumps(
            {"error": {name: value for name, value in error.items() if value is not None}}
        ).encode()
