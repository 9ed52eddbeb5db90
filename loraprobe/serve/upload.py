"""The body of a request.

Streamed up to a size, in time, within what memory there is, and the one its sender meant.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .answers import Refusal
from .settings import Settings

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

MEDIA_TYPE = "application/octet-stream"
WHOLE_BODY = "loraprobe.whole_body"
"""In scope["extensions"].

A function that returns the body if it is there already, None if it has to be received. Our own
connections have it.
"""
_OCTETS = MEDIA_TYPE.encode()
_USUAL_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")
_DIGEST = re.compile(r"([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/]*={0,2}):")


class Held:
    """How many bytes of bodies are in memory, of all requests together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0

    def take(self, count: int) -> None:
        """Count bytes that have come in.

        Raises:
            Refusal: together with the others they are more than the limit.
        """
        if self.bytes + count > self.limit:
            raise Refusal(
                503,
                "Overloaded",
                "too many bytes are being scored at this moment; try again",
                headers={"Retry-After": "1"},
            )
        self.bytes += count

    def give_back(self, count: int) -> None:
        """Bytes that are no longer in memory."""
        self.bytes -= count


class Upload:
    """One body on its way in. What it holds is counted in `held` until `release`.

    Attributes:
        received: how many bytes have come in.
    """

    def __init__(
        self, scope: MutableMapping[str, Any], receive: Receive, settings: Settings, held: Held
    ) -> None:
        self._headers = dict(reversed([*scope["headers"]]))  # of two with one name the first counts
        self._whole: Callable[[], bytes | None] = scope.get("extensions", {}).get(
            WHOLE_BODY, _not_yet
        )
        self._receive, self._settings, self._held = receive, settings, held
        self.received = 0

    async def read(self) -> tuple[bytes, str]:
        """The whole body and its sha256 in hexadecimal.

        Raises:
            Refusal: of another type or encoding (415), too large (413), too slow (408), not what
                Content-Digest says (422), not complete (499), or there is no room for it now (503).
        """
        expected = self._check_headers()
        body = self._whole()
        if body is None:
            body, digest = await self._received()
        else:
            self._count(len(body))
            digest = hashlib.sha256(body)
        if expected is not None and not hmac.compare_digest(expected, digest.digest()):
            raise Refusal(
                422,
                "DigestMismatch",
                "the body is not the one that Content-Digest was made of",
                got=digest.hexdigest(),
                expected=expected.hex(),
            )
        return body, digest.hexdigest()

    async def _received(self) -> tuple[bytes, hashlib._Hash]:
        """The body as its parts come in, in time."""
        parts, digest, more = [], hashlib.sha256(), True
        settings, now = self._settings, asyncio.get_running_loop().time
        step = settings.timeout * settings.min_rate
        try:
            async with asyncio.timeout(settings.timeout) as deadline:
                due = step  # bytes by the deadline, if the body is not complete by then
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(
                            499, "ClientGone", "the client left before its body was complete"
                        )  # nobody reads it but the log
                    part, more = message.get("body", b""), message.get("more_body", False)
                    self._count(len(part))
                    if self.received >= due:
                        due = self.received + step
                        deadline.reschedule(now() + settings.timeout)
                    digest.update(part)
                    parts.append(part)
        except TimeoutError:
            wanted = (
                f"the rest, or {settings.min_rate} bytes/s, within every {settings.timeout:g} s"
            )
            raise Refusal(
                408,
                "BodyTimeout",
                "the body came in too slowly",
                got=self.received,
                expected=wanted,
            ) from None
        return parts[0] if len(parts) == 1 else b"".join(parts), digest

    def release(self) -> None:
        """Give back what was counted."""
        self._held.give_back(self.received)
        self.received = 0

    def _count(self, count: int) -> None:
        if self.received + count > self._settings.max_body:
            raise _too_large(f"more than {self._settings.max_body}", self._settings)
        self._held.take(count)
        self.received += count

    def _check_headers(self) -> bytes | None:
        """Refuse what can be refused unread; the sha256 that the client announces, if it does."""
        kind = self._headers.get(b"content-type", _OCTETS)
        if kind != _OCTETS and kind.partition(b";")[0].strip().lower() != _OCTETS:
            shown = kind.decode("latin-1")[:100]
            raise Refusal(
                415,
                "UnsupportedMediaType",
                "send the safetensors file itself as the body",
                got=shown,
                expected=MEDIA_TYPE,
            )
        encoding = self._headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding != b"identity":
            shown = encoding.decode("latin-1")[:100]
            raise Refusal(
                415,
                "UnsupportedEncoding",
                "send the body as it is, not compressed",
                got=shown,
                expected="identity",
            )
        length = int(
            self._headers.get(b"content-length", 0)
        )  # digits, or the connection's parser would have refused it
        if length > self._settings.max_body:
            raise _too_large(length, self._settings)
        digest = self._headers.get(b"content-digest")
        return None if digest is None else announced_sha256(digest.decode("latin-1"))


def announced_sha256(header: str) -> bytes:
    """The sha-256 of a Content-Digest header; other algorithms beside it are not looked at.

    Raises:
        Refusal: it cannot be read or names no sha-256, or two.

    Source: RFC 9530, Sec. 2; RFC 8941, Sec. 3.2.
    """
    if usual := _USUAL_DIGEST.fullmatch(header):
        return base64.b64decode(usual[1])
    members = [_DIGEST.fullmatch(member.strip(" \t")) for member in header.split(",")]
    found = [member[2] for member in members if member and member[1] == "sha-256"]
    try:
        if None not in members and len(found) == 1:
            digest = base64.b64decode(found[0], validate=True)
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


def _not_yet() -> None:
    return None


def _too_large(got: int | str, settings: Settings) -> Refusal:
    return Refusal(
        413,
        "BodyTooLarge",
        "the body is larger than this service takes (--max-mib)",
        got=got,
        expected=f"at most {settings.max_body}",
    )
