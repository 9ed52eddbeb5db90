"""The head of a request.

Read at once where it has the usual form, and by h11 where it has any other.

h11 goes over every line several times, which is a good part of what a small request costs. The
usual form is a part of what h11 accepts, read with the same result (`tests/test_serve_head.py`);
what is outside of it is not refused here, but left to h11.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import h11

BLANK = b"\r\n\r\n"
_TOKEN = rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]+"
_REQUEST_LINE = re.compile(rb"(%b) ([!-~]+) HTTP/1\.1" % _TOKEN)
_FIELD = re.compile(rb"(%b):[ \t]*([!-~](?:[\t -~]*[!-~])?)[ \t]*" % _TOKEN)
_MAX_DIGITS = 18
_UNUSUAL = frozenset({b"transfer-encoding", b"expect", b"upgrade"})


class Head(NamedTuple):
    """What a head says.

    Attributes:
        version: "1.1", as in the request line.
        headers: names in lower case.
        length: bytes of the body; None if it comes in chunks.
        is_last: the client wants the connection closed behind the answer, or would not understand
            that it is not.
        is_asked_first: the client waits for a 100 before it sends the body.
    """

    method: str
    target: bytes
    version: str
    headers: list[tuple[bytes, bytes]]
    length: int | None
    is_last: bool = False
    is_asked_first: bool = False


def usual_head(data: bytes) -> Head | None:
    """A head in the usual form, from its first byte to the end of its blank line.

    None if it has another form, or is none.
    """
    first, *lines = data[: -len(BLANK)].split(b"\r\n")
    request = _REQUEST_LINE.fullmatch(first)
    if request is None or not data.endswith(BLANK):
        return None
    headers, hosts, length = [], 0, None
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            return None
        name, value = field[1].lower(), field[2]
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            if length is not None or not value.isdigit() or len(value) > _MAX_DIGITS:
                return None
            length = int(value)
        elif name in _UNUSUAL or (name == b"connection" and value.lower() != b"keep-alive"):
            return None
        headers.append((name, value))
    return (
        Head(request[1].decode("ascii"), request[2], "1.1", headers, length or 0)
        if hosts == 1
        else None
    )


def parsed_head(event: h11.Request, conn: h11.Connection) -> Head:
    """A head that h11 has read; `conn` is the connection that read it and nothing after it."""
    headers = list(event.headers)
    named = dict(headers)
    length = None if b"transfer-encoding" in named else int(named.get(b"content-length", 0))
    closes = any(
        b"close" in [token.strip() for token in value.lower().split(b",")]
        for name, value in headers
        if name == b"connection"
    )
    is_last = closes or event.http_version < b"1.1"
    version = event.http_version.decode("ascii")
    return Head(
        event.method.decode("ascii"),
        event.target,
        version,
        headers,
        length,
        is_last,
        conn.they_are_waiting_for_100_continue,
    )
