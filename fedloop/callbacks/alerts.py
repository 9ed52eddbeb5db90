"""What an operator wants to hear of at once."""

from __future__ import annotations

from collections.abc import Callable

from ..defense.explain import rejected
from ..defense.types import RoundRecord


class Alerts:
    """Sends a line for a skipped round, for every client that begins to count nothing, with the
    reason, and for one that counts again. A client that did not come back is not news.

        simulate(config, callbacks=[Alerts(post_to_chat)])

    Args:
        send: called with each line; what it raises ends the run.
    """

    def __init__(self, send: Callable[[str], object]) -> None:
        self._send = send
        self._out: set[str] = set()

    def __call__(self, record: RoundRecord) -> None:
        """Tell what is new in a round."""
        if record.skipped:
            self._send(f"round {record.round}: {record.note or 'skipped'}")
        out = rejected(record)
        for client, why in out.items():
            if client not in self._out:
                self._send(f"round {record.round}: {client} counts nothing: {why}")
        for client in sorted(self._out & record.factors.keys() - out.keys()):
            self._send(f"round {record.round}: {client} counts again")
        self._out = (self._out - record.factors.keys()) | out.keys()
