"""What a scoring service is told at its start; checked before anything listens."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

from ..adapters.strict_json import is_finite_number
from ..errors import ServiceError

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..probe import Probe

MIB = 1 << 20
Detail = Literal["scores", "rounded", "verdicts"]
LOCAL_NAMES = ("localhost",)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOKEN = re.compile(r"[!-~]{1,1024}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")


@dataclass(frozen=True)
class Settings:
    """What is served, to whom, and how much of it at once.

    Attributes:
        probes: the probes by the names that requests, results and metrics use.
        base: the adapter that training started from, "fresh" if its B was zero, None if that is not
            known: then a probe that scores deltas can only be sent deltas.
        any_base: score adapters that name another base model than the probe's.
        token: what requests must bring as `Authorization: Bearer ...`; None lets everybody in.
        hosts: the names that requests may call the service by in their Host header; "*" for any.
            An address instead of a name is always taken.
        detail: what is told of a score: "scores" all of it, "rounded" tenths and no threshold,
            "verdicts" nothing but the verdict.
        rate: how many bodies one address may have scored in what time, as "100/minute"; None for
            no limit.
        max_body: bytes of one request.
        max_held: bytes of all bodies in memory at one time. Scoring takes a few times the body on
            top, two bodies at a time.
        timeout: seconds within which a body must be complete or have come in at `min_rate`, within
            every `timeout` seconds anew; and for which an idle connection is kept.
        min_rate: bytes a second.
        max_connections: open connections; requests on another one are turned away.
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
    hosts: tuple[str, ...] = LOCAL_NAMES
    detail: Detail = "scores"
    rate: str | None = None

    def __post_init__(self) -> None:
        from ..adapters.adapter import Adapter

        self._check_names()
        check_token(self.token)
        if not isinstance(self.any_base, bool):
            raise ServiceError(f"got any_base {self.any_base!r}; expected True or False")
        if self.base not in (None, "fresh") and not isinstance(self.base, Adapter):
            raise ServiceError(f"got base {self.base!r}; expected an Adapter, 'fresh' or None")
        if self.detail not in get_args(Detail):
            raise ServiceError(
                f"got detail {self.detail!r}; expected one of {', '.join(get_args(Detail))}"
            )
        for name in ("max_body", "max_held", "timeout", "min_rate", "max_connections", "inline"):
            value = getattr(self, name)
            if not is_finite_number(value) or value <= 0:
                raise ServiceError(f"got {name} {value!r}; expected a number above 0")
        if self.max_held < self.max_body:
            raise ServiceError(
                f"got max_held {self.max_held} below max_body {self.max_body}; a body of the"
                " largest size would never be taken"
            )

    def _check_names(self) -> None:
        from ..probe import Probe  # with the numerical libraries: a client does without

        if not self.probes:
            raise ServiceError("got no probe; expected at least one to serve")
        if not isinstance(self.probes, Mapping) or not all(
            isinstance(probe, Probe) for probe in self.probes.values()
        ):
            raise ServiceError(f"got probes {self.probes!r:.80}; expected name -> Probe")
        for name in self.probes:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ServiceError(
                    f"got the probe name {name!r}; expected at most 64 letters, digits, '.', '_'"
                    " and '-': write --probe NAME=PATH"
                )
        if isinstance(self.hosts, str):
            raise ServiceError(f"got hosts {self.hosts!r}; expected names, such as ('localhost',)")
        for host in self.hosts:
            if host != "*" and not _HOST.fullmatch(host):
                raise ServiceError(
                    f"got the host name {host!r}; expected a name without a port, or '*' for any"
                )


def check_token(token: str | None) -> None:
    """Raise ServiceError, which does not show it, for a token that no header can hold."""
    if token is not None and not (isinstance(token, str) and _TOKEN.fullmatch(token)):
        raise ServiceError(
            "got a token that is empty, too long or no plain ASCII; expected 1 to 1024 visible"
            " characters without a space or a line's end"
        )


@lru_cache(64)
def is_address(host: str) -> bool:
    """Whether this is an IP address and no name.

    >>> is_address("127.0.0.1"), is_address("::1"), is_address("localhost")
    (True, True, False)
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; of names, localhost alone.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    >>> is_loopback("localhost"), is_loopback("example.org")
    (True, False)
    """
    return ipaddress.ip_address(host).is_loopback if is_address(host) else host == "localhost"
