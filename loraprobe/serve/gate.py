"""What every request passes on its way in and out: whether it may enter, and what is counted and logged of it."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..errors import LoraprobeError
from .answers import Refusal
from .logs import LOGGER
from .metrics import Metrics

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Any, Send], Awaitable[None]]

MAX_HEADER_BYTES = 1 << 14  # the parser minds only those that do not come at once
_ERROR = "loraprobe.error"  # in a request's scope: the type of its error
_OPEN = frozenset({"/", "/healthz", "/openapi.json"})  # what needs no token
_METHODS = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"})
JSON_HEADERS = {"content-type": "application/json", "cache-control": "no-store", "x-content-type-options": "nosniff"}


class Gate:
    """ASGI middleware: refuses ambiguous framing and wrong tokens; counts, times and logs everything."""

    def __init__(self, app: App, *, token: str | None, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun, status = time.perf_counter(), 0

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight.inc()
        try:
            refusal = self._refused(scope) or await self._passed(scope, receive, watched)
            if refusal is not None and not status:
                scope[_ERROR] = refusal.type
                await _send(refusal, watched)
        finally:
            self._metrics.in_flight.dec()
            self._record(scope, status or 500, time.perf_counter() - begun)

    async def _passed(self, scope: Scope, receive: Any, send: Send) -> Refusal | None:
        """Let a request in; why it was refused there, if it was."""
        try:
            await self._app(scope, receive, send)
        except Refusal as refusal:
            return refusal
        except LoraprobeError as error:
            return Refusal(422, type(error).__name__, str(error))
        return None

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """One request in the metrics and in the log. An answer that is missing is that of an internal error."""
        route = scope["path"] if scope["path"] in self._routes else "other"
        error = scope.get(_ERROR) or ("InternalError" if status == 500 else None)
        self._metrics.count_request(route, status, error)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        fields = {"method": method, "route": route, "status": status, "seconds": round(seconds, 6), "bytes": scope.get("loraprobe.bytes", 0)}
        if error:
            fields["error"] = error
        LOGGER.info("request", extra={"fields": fields})

    def _refused(self, scope: Scope) -> Refusal | None:
        names = [name for name, _ in scope["headers"]]
        size = sum(map(len, names)) + sum(len(value) for _, value in scope["headers"])
        if size > MAX_HEADER_BYTES:
            return Refusal(431, "HeadersTooLarge", "the headers are too large", got=size, expected=f"at most {MAX_HEADER_BYTES} bytes")
        if b"transfer-encoding" in names and b"content-length" in names:
            # Two lengths of one body: whoever is in front of this service may have read the other one (RFC 9112, Sec. 6.1).
            return Refusal(400, "BadRequest", "got Content-Length and Transfer-Encoding; expected one of them", headers={"Connection": "close"})
        if self._token is None or scope["path"] in _OPEN:
            return None
        given = [value.partition(b" ") for name, value in scope["headers"] if name == b"authorization"]
        if len(given) == 1 and given[0][0].lower() == b"bearer" and hmac.compare_digest(given[0][2], self._token):
            return None
        return Refusal(401, "Unauthorized", "this needs the service's token: Authorization: Bearer ...", headers={"WWW-Authenticate": "Bearer"})


async def _send(refusal: Refusal, send: Send) -> None:
    """Answer with a typed error body."""
    body = refusal.body()
    headers = {**JSON_HEADERS, "content-length": str(len(body)), **refusal.headers}
    raw = [(name.lower().encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
