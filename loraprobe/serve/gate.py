"""What every request passes on its way in and out.

Whether it may enter, and what is counted and logged of it.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from ..errors import LoraprobeError
from .answers import Refusal
from .logs import log
from .metrics import Metrics
from .upload import Receive

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_HEADER_BYTES = 1 << 14  # the parser minds only those that do not come at once
_ERROR = "loraprobe.error"  # in a request's scope: the type of its error
_OPEN = frozenset({"/", "/healthz", "/openapi.json"})  # what needs no token
_FRAMING = {b"transfer-encoding": 1, b"content-length": 2}
_BOTH = 3
_METHODS = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"})
JSON_HEADERS = {
    "content-type": "application/json",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
}


class Gate:
    """ASGI middleware: refuses ambiguous framing and wrong tokens.

    Counts, times and logs everything.

    Args:
        app: asked where nothing in `direct` is meant.
        token: what requests must bring, if anything.
        routes: the paths that are counted and logged by name.
        direct: (method, path) -> the application behind it, which needs no other to find it.
    """

    def __init__(
        self,
        app: App,
        *,
        token: str | None,
        metrics: Metrics,
        routes: frozenset[str],
        direct: Mapping[tuple[str, str], App],
    ) -> None:
        self._app, self._metrics, self._routes, self._direct = app, metrics, routes, direct
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun, status = time.perf_counter(), 0

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight += 1
        try:
            refusal = self._refused(scope) or await self._passed(scope, receive, watched)
            if refusal is not None and not status:
                scope[_ERROR] = refusal.type
                await reply(
                    watched, refusal.body(), {**JSON_HEADERS, **refusal.headers}, refusal.status
                )
        finally:
            self._metrics.in_flight -= 1
            self._record(scope, status or 500, time.perf_counter() - begun)

    async def _passed(self, scope: Scope, receive: Receive, send: Send) -> Refusal | None:
        """Let a request in; why it was refused there, if it was."""
        try:
            await self._direct.get((scope["method"], scope["path"]), self._app)(
                scope, receive, send
            )
        except Refusal as refusal:
            return refusal
        except LoraprobeError as error:
            return Refusal(422, type(error).__name__, str(error))
        return None

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """One request in the metrics and in the log.

        An answer that is missing is that of an internal error.
        """
        route = scope["path"] if scope["path"] in self._routes else "other"
        error = scope.get(_ERROR) or ("InternalError" if status == 500 else None)
        self._metrics.count_request(route, status, error)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        fields = {
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            "bytes": scope.get("loraprobe.bytes", 0),
        }
        if error:
            fields["error"] = error
        log("request", fields)

    def _refused(self, scope: Scope) -> Refusal | None:
        size, framings = 0, 0
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            framings |= _FRAMING.get(name, 0)
        if size > MAX_HEADER_BYTES:
            return Refusal(
                431,
                "HeadersTooLarge",
                "the headers are too large",
                got=size,
                expected=f"at most {MAX_HEADER_BYTES} bytes",
            )
        if framings == _BOTH:
            # Two lengths of one body: whoever is in front of this service may have read the other
            # one (RFC 9112, Sec. 6.1).
            return Refusal(
                400,
                "BadRequest",
                "got Content-Length and Transfer-Encoding; expected one of them",
                headers={"Connection": "close"},
            )
        if self._token is None or scope["path"] in _OPEN:
            return None
        given = [
            value.partition(b" ") for name, value in scope["headers"] if name == b"authorization"
        ]
        if (
            len(given) == 1
            and given[0][0].lower() == b"bearer"
            and hmac.compare_digest(given[0][2], self._token)
        ):
            return None
        return Refusal(
            401,
            "Unauthorized",
            "this needs the service's token: Authorization: Bearer ...",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def reply(
    send: Send, body: bytes, headers: Mapping[str, str] = JSON_HEADERS, status: int = 200
) -> None:
    """Send an answer that is complete."""
    raw = _RAW_JSON if headers is JSON_HEADERS else _raw(headers)
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [*raw, (b"content-length", b"%d" % len(body))],
        }
    )
    await send({"type": "http.response.body", "body": body})


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [
        (name.lower().encode("ascii"), value.encode("latin-1")) for name, value in headers.items()
    ]


_RAW_JSON = _raw(JSON_HEADERS)
