"""One request and its answer: the application's end of a connection, in ASGI's terms."""

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from .upload import WHOLE_BODY

Header = tuple[bytes, bytes]
Message = MutableMapping[str, Any]

_LOGGER = logging.getLogger("uvicorn.error")
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
    for status in http.HTTPStatus
}
_CLOSE: Header = (b"connection", b"close")
_WITHOUT_BODY = (204, 304)


def head_of(status: int, headers: Sequence[Header]) -> bytes:
    """The head of an answer.

    Raises:
        RuntimeError: a name or value would begin another line.
    """
    lines = [_STATUS_LINES[status], *[b"%b: %b\r\n" % header for header in headers], b"\r\n"]
    head = b"".join(lines)
    if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
        raise RuntimeError("a header of the answer holds a line break")
    return head


class Exchange:
    """What an application is given of one request, and what it answers.

    Args:
        scope: the request.
        transport: where the answer goes.
        writable: set while the client takes what it is sent.
        default_headers: of every answer.
        is_last: whether the client wants the connection closed behind the answer.
        is_asked_first: whether the client waits for a 100 before it sends the body.
        on_read: called when everything that came in was taken.
        on_answered: called when the answer is complete and on its way.

    Attributes:
        waiting: how many bytes of the body came in and were not taken yet.
        keep_alive: whether the connection goes on behind the answer.
        started, complete: how far the answer is.
        gone: the client has left.
    """

    def __init__(
        self,
        scope: dict[str, Any],
        transport: asyncio.Transport,
        writable: asyncio.Event,
        default_headers: list[Header],
        *,
        is_last: bool,
        is_asked_first: bool,
        on_read: Callable[[], None],
        on_answered: Callable[[], None],
    ) -> None:
        scope["extensions"] = {WHOLE_BODY: self.whole}
        self.scope, self._transport, self._writable, self._default_headers = (
            scope,
            transport,
            writable,
            default_headers,
        )
        self.keep_alive, self._is_asked_first = not is_last, is_asked_first
        self._on_read, self._on_answered = on_read, on_answered
        self._parts: list[bytes] = []
        self.waiting, self._is_whole, self._is_begun = 0, False, False
        self._begun: tuple[int, list[Header]] | None = None
        self.started = self.complete = self.gone = False
        self._changed = asyncio.Event()

    # --- what the connection says ---

    def feed(self, data: bytes) -> None:
        """A part of the body has come in. Nobody wants it any more once the answer is complete."""
        if not self.complete:
            self._parts.append(data)
            self.waiting += len(data)
            self._changed.set()

    def end(self) -> None:
        """The body is whole."""
        self._is_whole = True
        self._changed.set()

    def leave(self) -> None:
        """The client has left."""
        self.gone = not self.complete
        self._changed.set()

    # --- what the application asks for ---

    async def run(self, application: Callable[..., Awaitable[None]]) -> None:
        """Let an application answer.

        Log what it raises, and answer in its place where it has not.
        """
        try:
            await application(self.scope, self.receive, self.send)
            if not self._is_over():
                _LOGGER.error("ASGI application without a complete answer")
        except BaseException as error:  # the task ends here: whatever it was, the log has it
            _LOGGER.error("Exception in ASGI application", exc_info=error)
        if self._is_over():
            return
        if self.started:
            self._transport.close()
            return
        self._begun = None
        await self.send(
            {
                "type": "http.response.start",
                "status": 500,
                "headers": [(b"content-type", b"text/plain"), _CLOSE],
            }
        )
        await self.send({"type": "http.response.body", "body": b"Internal Server Error"})

    def _is_over(self) -> bool:
        return self.gone or self.complete or self._transport.is_closing()

    async def receive(self) -> Message:
        """The next part of the body, or that nothing more is to be expected."""
        if (
            self._is_asked_first
            and not self._parts
            and not self.started
            and not self._transport.is_closing()
        ):
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._is_asked_first = False
        if not self._changed.is_set():
            await self._changed.wait()
        self._changed.clear()
        if self.gone or self.complete:
            return {"type": "http.disconnect"}
        body = self._taken()
        if not self._is_whole:
            self._on_read()
        return {"type": "http.request", "body": body, "more_body": not self._is_whole}

    def whole(self) -> bytes | None:
        """The body, if all of it has come in and none of it was taken.

        Nobody has to wait for it, or to mind how long that takes.
        """
        if not self._is_whole or self.gone or self.complete or self._is_begun:
            return None
        self._changed.clear()
        return self._taken()

    def _taken(self) -> bytes:
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts, self.waiting, self._is_begun = [], 0, True
        return body

    async def send(self, message: Message) -> None:
        """Head and body of the answer; a body in one part goes out together with the head."""
        if not self._writable.is_set():
            await self._writable.wait()
        if self.gone or self._transport.is_closing():
            return
        if message["type"] == "http.response.start" and self._begun is None:
            self._begun = message["status"], [*self._default_headers, *message.get("headers", ())]
            return
        if message["type"] != "http.response.body" or self._begun is None or self.complete:
            raise RuntimeError(
                f"got the ASGI message {message['type']!r}; expected a start, then bodies up to the"
                " last one"
            )
        body, more = message.get("body", b""), message.get("more_body", False)
        if not self.started:
            self.started = True
            self._transport.write(
                self._head(len(body), more) + (b"" if self._has_no_body() else body)
            )
        elif not self._has_no_body():
            self._transport.write(body)
        if not more:
            self.complete = True
            self._parts, self.waiting = [], 0
            self._changed.set()
            self._on_answered()

    def _head(self, size: int, more: bool) -> bytes:
        assert self._begun is not None
        status, headers = self._begun
        names = {name for name, _ in headers}
        if b"content-length" not in names and not more and status not in _WITHOUT_BODY:
            headers.append((b"content-length", b"%d" % size))
        elif b"content-length" not in names and more:
            self.keep_alive = False  # where the answer ends is told by the end of the connection
        if _CLOSE in headers:
            self.keep_alive = False
        elif not self.keep_alive:
            headers.append(_CLOSE)
        return head_of(status, headers)

    def _has_no_body(self) -> bool:
        return self.scope["method"] == "HEAD" or (
            self._begun is not None and self._begun[0] in _WITHOUT_BODY
        )
