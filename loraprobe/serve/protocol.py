"""One connection: uvicorn's HTTP/1.1 on h11, with the deadlines that uvicorn leaves to a proxy.

h11 and not the faster httptools: it bounds the size of headers, reads a stranger's bytes in Python, and comes with every
uvicorn. This module is imported by who starts uvicorn, and by nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .answers import Refusal
from .settings import Settings


class GuardedProtocol(H11Protocol):
    """A connection that does not wait for its client for ever.

    The headers of a request must be there `settings.timeout` seconds after its first byte or, on a new connection, after
    connecting; what is sent must be taken within the same time. A connection beyond `settings.max_connections` is turned
    away. A body's deadline is that of `upload`; an idle connection's between two requests is uvicorn's.

    Args:
        settings: the limits.
        on_refused: told of every request that no application sees.
        kwargs: uvicorn's own.
    """

    def __init__(self, settings: Settings, on_refused: Callable[[Refusal], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._settings, self._on_refused = settings, on_refused
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(_OneSegment(transport, self.loop))  # type: ignore[arg-type]
        if len(self.connections) > self._settings.max_connections:
            self._refuse(Refusal(503, "Overloaded", "too many open connections; try again", headers={"Retry-After": "1"}))
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Something has come in."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        for timer in (self._headers_due, self._reading_due):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is sent to."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None

    def on_response_complete(self) -> None:
        """The application has answered, and some of it may still wait for the client."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._await_reader()

    def send_400_response(self, msg: str) -> None:
        """The bytes that came in are no request."""
        limit = self.config.h11_max_incomplete_event_size or 1 << 14
        expected = f"HTTP/1.1, with at most {limit} bytes of headers"
        self._refuse(Refusal(400, "BadRequest", "this is no valid HTTP request", expected=expected))

    def _watch(self) -> None:
        """Set the deadline for headers while they are what is waited for; never move one that is set."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._headers_due is not None:
                self._headers_due.cancel()
                self._headers_due = None
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(self._settings.timeout, self._headers_late)

    def _headers_late(self) -> None:
        expected = f"all within {self._settings.timeout:g} s"
        self._refuse(Refusal(408, "HeaderTimeout", "the headers of a request came in too slowly", expected=expected))

    def _await_reader(self) -> None:
        if self._reading_due is None:
            self._reading_due = self.loop.call_later(self._settings.timeout, self._reader_late)

    def _reader_late(self) -> None:
        self._reading_due = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, refusal: Refusal) -> None:
        """Answer without asking the application, where there is still an answer to give, and close."""
        self._on_refused(refusal)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = refusal.body()
            fields = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **refusal.headers}
            for event in (h11.Response(status_code=refusal.status, headers=list(fields.items())), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _OneSegment:
    """A transport that sends what is written in one turn of the loop at once: the head of an answer and its body are two writes."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop, self._parts = transport, loop, list[bytes]()

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size() + sum(map(len, self._parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._parts and not self._transport.is_closing():
            self._transport.write(b"".join(self._parts))
        self._parts.clear()
