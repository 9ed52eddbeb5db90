"""The body of a request: streamed up to a size, in time, within what memory there is."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from .results import Refusal
from .settings import Settings

if TYPE_CHECKING:
    from starlette.requests import Request

MEDIA_TYPE = "application/octet-stream"
_DIGEST = re.compile(r"([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/]*={0,2}):")


class Body(NamedTuple):
    """A whole body and its sha256 in hexadecimal."""

    data: bytes
    sha256: str


class Held:
    """How many bytes of bodies are in memory, of all requests together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0

    def take(self, count: int) -> None:
        """Count bytes that have come in.

        Raises:
            Refusal: together with the others they are more than the limit.
        """
        if self.bytes + count > self.limit:
            words = "too many bytes are being scored at this moment; try again"
            raise Refusal(503, "Overloaded", words, headers={"Retry-After": "1"})
        self.bytes += count


@asynccontextmanager
async def received_body(request: Request, settings: Settings, held: Held) -> AsyncIterator[Body]:
    """The whole body of a request, counted in `held` until the block ends.

    Raises:
        Refusal: of another type or encoding (415), too large (413), too slow (408), not what
            Content-Digest says (422), not complete (499), or there is no room for it now (503).
    """
    announced = _check_headers(request, settings)
    parts: list[bytes] = []
    try:
        digest = await _receive(request, settings, held, parts)
        if announced is not None and not hmac.compare_digest(announced, digest.digest()):
            raise Refusal(
                422,
                "DigestMismatch",
                "the body is not the one that Content-Digest was made of",
                got=digest.hexdigest(),
                expected=announced.hex(),
            )
        yield Body(b"".join(parts), digest.hexdigest())
    finally:
        held.bytes -= sum(map(len, parts))


async def _receive(
    request: Request, settings: Settings, held: Held, parts: list[bytes]
) -> hashlib._Hash:
    """Add what comes in, at least at the lowest rate, to `parts` and to `held`; its hash."""
    from starlette.requests import ClientDisconnect

    now = asyncio.get_running_loop().time
    step = settings.timeout * settings.min_rate
    due = step  # bytes by the deadline, if the body is not complete by then
    received = 0
    digest = hashlib.sha256()
    try:
        async with asyncio.timeout(settings.timeout) as deadline:
            async for part in request.stream():
                received += len(part)
                if received > settings.max_body:
                    raise _too_large(f"more than {settings.max_body}", settings)
                held.take(len(part))
                parts.append(part)
                digest.update(part)
                if received >= due:
                    due = received + step
                    deadline.reschedule(now() + settings.timeout)
    except ClientDisconnect:  # nobody reads the answer but the log
        raise Refusal(499, "ClientGone", "the client left before its body was complete") from None
    except TimeoutError:
        raise Refusal(
            408,
            "BodyTimeout",
            "the body came in too slowly",
            got=received,
            expected=f"all of it, or {settings.min_rate} bytes/s in every {settings.timeout:g} s",
        ) from None
    return digest


def _check_headers(request: Request, settings: Settings) -> bytes | None:
    """Refuse what can be refused unread; the sha256 that the client announces, if it does."""
    headers = request.headers
    kind = headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != MEDIA_TYPE:
        raise Refusal(
            415,
            "UnsupportedMediaType",
            "send the safetensors file itself as the body, and say so",
            got=kind[:100] or "no Content-Type",
            expected=f"Content-Type: {MEDIA_TYPE}",
        )
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Refusal(
            415,
            "UnsupportedEncoding",
            "send the body as it is, not compressed",
            got=encoding[:100],
            expected="identity",
        )
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18:
        raise Refusal(400, "BadRequest", "Content-Length is no length", got=length[:100])
    if int(length) > settings.max_body:
        raise _too_large(int(length), settings)
    digest = headers.get("content-digest")
    return None if digest is None else announced_sha256(digest)


def announced_sha256(header: str) -> bytes:
    """The sha-256 of a Content-Digest header; other algorithms beside it are not looked at.

    Raises:
        Refusal: it cannot be read or names no sha-256, or two.

    Source: RFC 9530, Sec. 2; RFC 8941, Sec. 3.2.
    """
    members = [_DIGEST.fullmatch(member.strip(" \t")) for member in header.split(",")]
    digests = [member[2] for member in members if member and member[1] == "sha-256"]
    try:
        if None not in members and len(digests) == 1:
            digest = base64.b64decode(digests[0], validate=True)
            if len(digest) == 32:
                return digest
    except binascii.Error:
        pass
    raise Refusal(
        400,
        "BadDigest",
        "the Content-Digest header cannot be read",
        got=header[:200],
        expected="sha-256=:<base64 of 32 bytes>:",
    )


def content_digest(body: bytes) -> str:
    """The value of a Content-Digest header for a body."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def _too_large(got: int | str, settings: Settings) -> Refusal:
    return Refusal(
        413,
        "BodyTooLarge",
        "the body is larger than this service takes (--max-mib)",
        got=got,
        expected=f"at most {settings.max_body}",
    )
