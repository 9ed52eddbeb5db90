"""One connection: uvicorn's HTTP/1.1 on h11, with the deadlines that uvicorn leaves to a proxy.

h11 and not the faster httptools: it bounds the size of headers, reads a hostile stranger's bytes in Python, and comes with
every uvicorn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtra
from .answers import Refusal
from .settings import Settings

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol


def guarded_protocol(settings: Settings, on_refused: Callable[[Refusal], None]) -> type[H11Protocol]:
    """The class of connections for uvicorn's `http` option.

    The headers of a request must be there `settings.timeout` seconds after its first byte or, for a new connection, after
    connecting; what is sent must be taken within the same time. A connection beyond `settings.max_connections` is turned
    away. A body's deadline is that of `upload`; an idle connection's between two requests is uvicorn's.

    Args:
        on_refused: told of every request that no application sees.

    Raises:
        MissingExtra: uvicorn is not installed.
    """
    try:
        import h11
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ImportError as error:
        raise MissingExtra(str(error.name), "serve", "The scoring service") from None

    class OneSegment:
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

    class GuardedProtocol(H11Protocol):
        """A connection that does not wait for its client for ever."""

        _headers_due: asyncio.TimerHandle | None = None
        _reading_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(OneSegment(transport, self.loop))  # type: ignore[arg-type]
            if len(self.connections) > settings.max_connections:
                self._refuse(Refusal(503, "Overloaded", "too many open connections; try again", headers={"Retry-After": "1"}))
            else:
                self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for timer in (self._headers_due, self._reading_due):
                if timer is not None:
                    timer.cancel()

        def _watch(self) -> None:
            """Set the deadline for headers while they are what is waited for; never move one that is set."""
            if self.cycle is not None and not self.cycle.response_complete:
                if self._headers_due is not None:
                    self._headers_due.cancel()
                    self._headers_due = None
            elif self._headers_due is None:
                self._headers_due = self.loop.call_later(settings.timeout, self._headers_late)

        def _headers_late(self) -> None:
            self._refuse(Refusal(408, "HeaderTimeout", "the headers of a request came in too slowly", expected=f"all within {settings.timeout:g} s"))

        def pause_writing(self) -> None:
            super().pause_writing()
            self._await_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._reading_due is not None:
                self._reading_due.cancel()
                self._reading_due = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.get_write_buffer_size():
                self._await_reader()

        def _await_reader(self) -> None:
            if self._reading_due is None:
                self._reading_due = self.loop.call_later(settings.timeout, self._reader_late)

        def _reader_late(self) -> None:
            self._reading_due = None
            if self.transport.get_write_buffer_size():
                self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            limit = self.config.h11_max_incomplete_event_size or 1 << 14
            expected = f"HTTP/1.1, with at most {limit} bytes of headers"
            self._refuse(Refusal(400, "BadRequest", "this is no valid HTTP request", expected=expected))

        def _refuse(self, refusal: Refusal) -> None:
            """Answer without asking the application, where there is still an answer to give, and close."""
            on_refused(refusal)
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                body = refusal.body()
                fields = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **refusal.headers}
                for event in (h11.Response(status_code=refusal.status, headers=list(fields.items())), h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return GuardedProtocol
