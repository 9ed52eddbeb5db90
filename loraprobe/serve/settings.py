"""What a scoring service is told at its start; checked before anything listens."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ServiceError

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..probe import Probe

MIB = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOKEN = re.compile(r"[!-~]{1,1024}")


@dataclass(frozen=True)
class Settings:
    """What is served, to whom, and how much of it at once.

    Attributes:
        probes: the probes by the names that requests, results and metrics use.
        base: the adapter that training started from, "fresh" if its B was zero, None if that is not
            known: then a probe that scores deltas can only be sent deltas.
        any_base: score adapters that name another base model than the probe's.
        token: what requests must bring as `Authorization: Bearer ...`; None lets everybody in.
        max_body: bytes of one request.
        max_held: bytes of all bodies in memory at one time. Scoring takes a few times the body on
            top, two bodies at a time.
        timeout: seconds that a client may take for the headers of a request, and to read what it is
            sent.
        min_rate: bytes a second that a body must come in at, within every `timeout` seconds anew,
            until it is complete.
        max_connections: open connections; another one is turned away.
        inline: bodies up to this many bytes are scored at once, larger ones in a thread, so that
            the rest is answered meanwhile.

    Raises:
        ServiceError: a value is not valid.
    """

    probes: Mapping[str, Probe]
    base: Adapter | str | None = None
    any_base: bool = False
    token: str | None = None
    max_body: int = 256 * MIB
    max_held: int = 512 * MIB
    timeout: float = 10.0
    min_rate: int = 1 << 16
    max_connections: int = 512
    inline: int = 1 << 18

    def __post_init__(self) -> None:
        if not self.probes:
            raise ServiceError("got no probe; expected at least one to serve")
        for name in self.probes:
            if not _NAME.fullmatch(name):
                raise ServiceError(
                    f"got the probe name {name!r}; expected at most 64 letters, digits, '.', '_'"
                    " and '-': write --probe NAME=PATH"
                )
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise ServiceError(
                "got a token that is empty, too long or no plain ASCII; expected 1 to 1024 visible"
                " characters without a space"
            )
        if isinstance(self.base, str) and self.base != "fresh":
            raise ServiceError(f"got base {self.base!r}; expected an Adapter, 'fresh' or None")
        for name in ("max_body", "max_held", "timeout", "min_rate", "max_connections", "inline"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ServiceError(f"got {name} {getattr(self, name)}; expected a number above 0")
        if self.max_held < self.max_body:
            raise ServiceError(
                f"got max_held {self.max_held} below max_body {self.max_body}; a body of the"
                " largest size would never be taken"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    A name other than localhost counts as reachable.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
