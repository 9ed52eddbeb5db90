"""What every request passes on its way in and out.

`Guard` decides who may enter; `Requests` turns typed errors into answers, counts, times and logs.
"""

from __future__ import annotations

import hmac
import time
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from ..errors import LoraprobeError, MissingExtra, ServiceError, quoted
from .logs import log
from .results import Refusal
from .settings import Settings, is_address

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .prometheus import Metrics

SCORE_PATH = "/v1/score"
MAX_HEADER_BYTES = 1 << 14
JSON_HEADERS = {
    "content-type": "application/json",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
}
_OPEN = frozenset({"/", "/healthz", "/openapi.json"})  # what needs no token
_METHODS = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"})
_OWN_SITES = (None, "same-origin", "none")


class Requests:
    """Counts, times and logs every request, and answers typed errors.

    Args:
        app: what answers.
        metrics: what is counted.
        routes: the paths that are counted and logged by name.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = 0
        received = 0
        error: str | None = None

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight += 1
        try:
            try:
                await self._app(scope, counted, watched)
            except (Refusal, LoraprobeError) as raised:
                refusal = _refusal(raised)
                error = refusal.type
                await _refuse(watched, refusal)
        finally:
            self._metrics.in_flight -= 1
            self._record(scope, status or 500, error, time.perf_counter() - begun, received)

    def _record(
        self, scope: Scope, status: int, error: str | None, seconds: float, received: int
    ) -> None:
        """One request in the metrics and the log; one without an answer is an internal error."""
        route = scope["path"] if scope["path"] in self._routes else "other"
        if error is None and status == 500:
            error = "InternalError"
        self._metrics.count_request(route, status, error)
        fields = {
            "method": scope["method"] if scope["method"] in _METHODS else "other",
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            "bytes": received,
        }
        log("request", fields if error is None else {**fields, "error": error})


def _refusal(error: Refusal | LoraprobeError) -> Refusal:
    return error if isinstance(error, Refusal) else Refusal(422, type(error).__name__, str(error))


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = refusal.body()
    headers = {**JSON_HEADERS, **refusal.headers, "content-length": str(len(body))}
    raw = [
        (name.lower().encode("latin-1"), text.encode("latin-1")) for name, text in headers.items()
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class Guard:
    """Lets in what names this service, comes from its own page, has the token and keeps the rate.

    Starlette's TrustedHostMiddleware is not used: it takes the Host `[::1]:8080` for `[`, and its
    refusals have no type.

    Args:
        app: what answers those who may enter.
        settings: names, and the token if one is needed.
        spend: counts one score of an address, and refuses it if it is one too many.
    """

    def __init__(
        self, app: ASGIApp, *, settings: Settings, spend: Callable[[str], None] | None
    ) -> None:
        self._app = app
        self._hosts = frozenset(name.lower() for name in settings.hosts)
        self._token = None if settings.token is None else settings.token.encode()
        self._spend = spend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request.

        Raises:
            Refusal: it may not enter.
        """
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            _check_size(headers)
            self._check_host(headers)
            _check_origin(headers, scope["method"])
            if self._token is not None and scope["path"] not in _OPEN:
                self._check_token(headers)
            if self._spend is not None and scope["path"] == SCORE_PATH:
                self._spend((scope.get("client") or ("nobody", 0))[0])
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        """A name that somebody else let point here is not ours; an address cannot be let point."""
        hosts = headers.getlist("host")
        name = _name_in(hosts[0]) if len(hosts) == 1 else None
        if name is None:
            raise Refusal(400, "BadRequest", "the Host header is missing, twice or no host")
        if name not in self._hosts and "*" not in self._hosts and not is_address(name):
            raise Refusal(
                421,
                "UnknownHost",
                "this service is not known by that name (--allow-host)",
                got=quoted(name),
                expected=", ".join(sorted(self._hosts)) + ", or an address",
            )

    def _check_token(self, headers: Headers) -> None:
        credentials = [value.partition(" ") for value in headers.getlist("authorization")]
        if (
            len(credentials) != 1
            or credentials[0][0].lower() != "bearer"
            or not hmac.compare_digest(credentials[0][2].encode("latin-1"), self._token or b"")
        ):
            raise Refusal(
                401,
                "Unauthorized",
                "this needs the service's token: Authorization: Bearer ...",
                headers={"WWW-Authenticate": "Bearer"},
            )


@lru_cache(64)  # requests mostly name the same host
def _name_in(host: str) -> str | None:
    """The name or address in a Host header; None if it holds none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _check_size(headers: Headers) -> None:
    size = sum(len(name) + len(value) for name, value in headers.raw)
    if size > MAX_HEADER_BYTES:
        raise Refusal(
            431,
            "HeadersTooLarge",
            "the headers are too large",
            got=size,
            expected=f"at most {MAX_HEADER_BYTES} bytes",
        )


def _check_origin(headers: Headers, method: str) -> None:
    """Whether a browser says that a page of another origin asks.

    A link from elsewhere may still be followed: that is a GET which navigates.
    """
    origin = headers.get("origin")
    site = headers.get("sec-fetch-site")
    follows_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    if origin is not None and origin.partition("://")[2] != headers["host"]:
        raise _foreign("Origin", origin)
    if site not in _OWN_SITES and not follows_link:
        raise _foreign("Sec-Fetch-Site", str(site))


def _foreign(name: str, value: str) -> Refusal:
    return Refusal(
        403,
        "ForeignOrigin",
        "a browser sent this from a page of another origin, and only the service's own may ask",
        got=quoted(f"{name}: {value}", 200),
        expected="this service's own origin",
    )


def rate_limit(rate: str) -> Callable[[str], None]:
    """A function that counts one score of an address, and refuses it if it is one too many.

    Raises:
        ServiceError: the rate cannot be read.
        MissingExtra: limits is not installed.
    """
    try:
        import limits
        from limits.storage import MemoryStorage
        from limits.strategies import MovingWindowRateLimiter
    except ModuleNotFoundError:
        raise MissingExtra("limits", "serve", "A rate limit") from None
    try:
        item = limits.parse(rate)
    except ValueError:
        raise ServiceError(
            f"got the rate {rate!r}; expected a number and a time, such as 100/minute"
        ) from None
    limiter = MovingWindowRateLimiter(MemoryStorage())

    def spend(address: str) -> None:
        if not limiter.hit(item, address):
            wait = limiter.get_window_stats(item, address).reset_time - time.time()
            raise Refusal(
                429,
                "RateLimited",
                "this address has had its share of scores for now; try again later",
                expected=f"at most {item}",
                headers={"Retry-After": str(max(1, round(wait)))},
            )

    return spend
