"""One connection: HTTP/1.1 with deadlines, for uvicorn to run.

h11 reads unusual heads (`head`) and bodies in chunks: in Python, strictly, and with a bound on
their size. It has a new state for every request, and is told neither of a body whose length is
known, which is cut off what comes in and copied once, nor of answers, which are our own
(`exchange`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import h11

from .answers import Refusal
from .exchange import Exchange, head_of
from .head import BLANK, Head, parsed_head, usual_head
from .settings import Settings

MAX_HEAD = 1 << 14
"""Bytes of a head, or of what is around a chunk, that may come in before it is whole."""
HIGH_WATER = 1 << 17
"""Bytes of a body that may wait for the application; then the client has to."""


class GuardedProtocol(asyncio.Protocol):
    """A connection that does not wait for its client for ever.

    The headers of a request must be there `settings.timeout` seconds after its first byte or, on a
    new connection, after connecting; what is sent must be taken within the same time. A connection
    beyond `settings.max_connections` is turned away. A body's deadline is that of `upload`; an idle
    connection's between two requests is uvicorn's.

    Args:
        settings: the limits.
        on_refused: told of every request that no application sees.
        config, server_state, app_state: uvicorn's own.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        settings: Settings,
        on_refused: Callable[[Refusal], None],
        config: Any,
        server_state: Any,
        app_state: Any,
        _loop: Any = None,
    ) -> None:
        self._settings, self._on_refused, self._config, self._server, self._app_state = (
            settings,
            on_refused,
            config,
            server_state,
            app_state,
        )
        self._loop: asyncio.AbstractEventLoop = _loop or asyncio.get_running_loop()
        self._conn, self._is_within_head = h11.Connection(h11.SERVER, MAX_HEAD), False
        self._exchange: Exchange | None = None
        self._left: int | None = (
            0  # bytes of the body that are still to come; None where chunks say it
        )
        self._ahead = b""  # what came in behind the request that is being answered
        self._is_paused = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._headers_due = Timer(self._loop, settings.timeout, self._headers_late)
        self._reading_due = Timer(self._loop, settings.timeout, self._reader_late)
        self._idle_due = Timer(self._loop, config.timeout_keep_alive, self._close)
        self._addresses: dict[str, Any] = {}

    # --- asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._server.connections.add(self)
        for name, what in (("client", "peername"), ("server", "sockname")):
            address = transport.get_extra_info(what)
            self._addresses[name] = tuple(address[:2]) if isinstance(address, tuple) else None
        if len(self._server.connections) > self._settings.max_connections:
            self._refuse(
                Refusal(
                    503,
                    "Overloaded",
                    "too many open connections; try again",
                    headers={"Retry-After": "1"},
                )
            )
        else:
            self._headers_due.start()

    def data_received(self, data: bytes) -> None:
        """Something has come in."""
        self._idle_due.stop()
        self._take(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._server.connections.discard(self)
        self._writable.set()
        if self._exchange is not None:
            self._exchange.leave()
        for timer in (self._headers_due, self._reading_due, self._idle_due):
            timer.end()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is sent to."""
        self._writable.clear()
        self._reading_due.start()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._writable.set()
        self._reading_due.stop()

    def shutdown(self) -> None:
        """The server stops: close now, or behind the answer that is being made."""
        if self._exchange is None or self._exchange.complete:
            self._close()
        else:
            self._exchange.keep_alive = False

    # --- what comes in ---

    def _take(self, data: bytes) -> None:
        """Use up what has come in, as far as its turn has come."""
        try:
            while data and not self.transport.is_closing():
                if self._left != 0:
                    data = self._body(data)
                elif self._exchange is None or self._exchange.complete:
                    data = self._head(data)
                else:
                    self._ahead += data
                    data = b""
                    self._pause()
        except h11.RemoteProtocolError:
            expected = f"HTTP/1.1, with at most {MAX_HEAD} bytes of headers"
            self._refuse(
                Refusal(400, "BadRequest", "this is no valid HTTP request", expected=expected)
            )
        self._watch()

    def _head(self, data: bytes) -> bytes:
        """Take the head of a request, or a part of it; what is left."""
        end = data.find(BLANK) + len(BLANK)
        if end < len(BLANK):
            end = len(data)
        start, data = data[:end], data[end:]
        head = None if self._is_within_head or end > MAX_HEAD else usual_head(start)
        if head is None:
            self._conn.receive_data(start)
            event = self._conn.next_event()
            if not isinstance(event, h11.Request):
                self._is_within_head = True
                return data
            head = parsed_head(event, self._conn)
            if head.length is not None:
                data = self._conn.trailing_data[0] + data
                self._renew()
        self._begin(head)
        self._left = head.length
        return self._body(data) if self._left is None else data if self._left else self._end(data)

    def _renew(self) -> None:
        """Be ready for another head."""
        self._conn, self._is_within_head = h11.Connection(h11.SERVER, MAX_HEAD), False

    def _begin(self, head: Head) -> None:
        """Have the application answer a request."""
        raw_path, _, query = head.target.partition(b"?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.version,
            "scheme": "http",
            "method": head.method,
            "root_path": "",
            "path": unquote(raw_path.decode("ascii")),
            "raw_path": raw_path,
            "query_string": query,
            "headers": head.headers,
            "state": self._app_state.copy(),
            **self._addresses,
        }
        self._exchange = Exchange(
            scope,
            self.transport,
            self._writable,
            self._server.default_headers,
            is_last=head.is_last,
            is_asked_first=head.is_asked_first,
            on_read=self._resume,
            on_answered=self._answered,
        )
        task = self._loop.create_task(self._exchange.run(self._config.loaded_app))
        task.add_done_callback(self._server.tasks.discard)
        self._server.tasks.add(task)

    def _body(self, data: bytes) -> bytes:
        """Take what belongs to the body; what is left."""
        assert self._exchange is not None
        if self._left is None:
            return self._chunks(data)
        part = data if len(data) <= self._left else data[: self._left]
        self._left -= len(part)
        self._exchange.feed(part)
        if not self._left:
            return self._end(data[len(part) :])
        if self._exchange.waiting > HIGH_WATER:
            self._pause()
        return b""

    def _chunks(self, data: bytes) -> bytes:
        assert self._exchange is not None
        if data:
            self._conn.receive_data(data)
        while (event := self._conn.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.EndOfMessage):
                data, _ = self._conn.trailing_data
                self._left = 0
                self._renew()
                return self._end(data)
            assert isinstance(event, h11.Data)
            self._exchange.feed(bytes(event.data))
        if self._exchange.waiting > HIGH_WATER:
            self._pause()
        return b""

    def _end(self, data: bytes) -> bytes:
        """The body is whole; what is left belongs to the next request."""
        assert self._exchange is not None
        self._exchange.end()
        return data

    # --- what goes out ---

    def _answered(self) -> None:
        """The application has answered, and some of it may still wait for the client."""
        assert self._exchange is not None
        self._server.total_requests += 1
        self._await_reader()
        if not self._exchange.keep_alive:
            self._close()
            return
        self._idle_due.start()
        self._resume()
        data, self._ahead = self._ahead, b""
        self._take(data)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer without asking the application, where there is still an answer to give, and
        close.
        """
        self._on_refused(refusal)
        if (
            self._exchange is None
            or not self._exchange.started
            or (self._exchange.complete and self._left == 0)
        ):
            body = refusal.body()
            fields = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                **refusal.headers,
            }
            raw = [
                (name.lower().encode("ascii"), value.encode("latin-1"))
                for name, value in fields.items()
            ]
            self.transport.write(head_of(refusal.status, raw) + body)
        self._close()

    def _close(self) -> None:
        self._await_reader()
        self.transport.close()

    # --- deadlines ---

    def _watch(self) -> None:
        """Set the deadline for headers while they are what is waited for.

        Never move one that is set.
        """
        if self.transport.is_closing() or (
            self._exchange is not None and not self._exchange.complete
        ):
            self._headers_due.stop()
        elif not self._idle_due.is_running:
            self._headers_due.start()

    def _headers_late(self) -> None:
        expected = f"all within {self._settings.timeout:g} s"
        self._refuse(
            Refusal(
                408,
                "HeaderTimeout",
                "the headers of a request came in too slowly",
                expected=expected,
            )
        )

    def _await_reader(self) -> None:
        if self.transport.get_write_buffer_size():
            self._reading_due.start()
        else:
            self._reading_due.stop()

    def _reader_late(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _pause(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            self.transport.pause_reading()

    def _resume(self) -> None:
        if self._is_paused and not self.transport.is_closing():
            self._is_paused = False
            self.transport.resume_reading()


class Timer:
    """A deadline that is set and lifted with every request, and hardly ever met.

    One entry in the loop's queue serves many of them.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, late: Callable[[], None]
    ) -> None:
        self._loop, self._seconds, self._late = loop, seconds, late
        self._due: float | None = None
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_running(self) -> bool:
        """Whether it is set."""
        return self._due is not None

    def start(self) -> None:
        """Set it, unless it is set already."""
        if self._due is None:
            self._due = self._loop.time() + self._seconds
            if self._handle is None:
                self._handle = self._loop.call_at(self._due, self._fire)

    def stop(self) -> None:
        """Lift it."""
        self._due = None

    def end(self) -> None:
        """Lift it for ever."""
        self._due = None
        if self._handle is not None:
            self._handle.cancel()

    def _fire(self) -> None:
        self._handle = None
        if self._due is None:
            return
        if self._due > self._loop.time():
            self._handle = self._loop.call_at(self._due, self._fire)
        else:
            self._due = None
            self._late()
