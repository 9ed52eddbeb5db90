"""A connection of the service, without a socket.

Requests however they are cut, answers, and clients that leave or are late.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraprobe.serve.answers import Refusal
from loraprobe.serve.head import BLANK
from loraprobe.serve.protocol import GuardedProtocol, Timer
from loraprobe.serve.settings import Settings
from loraprobe.serve.upload import WHOLE_BODY
from tests.helpers import probes

# --- a connection
# -------------------------------------------------------------------------------------------------------


class Transport(asyncio.Transport):
    """What would be a socket: keeps what is written, and what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.closed, self.paused, self.waiting = b"", False, False, 0

    def write(self, data: Any) -> None:
        assert not self.closed
        self.sent += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False

    def get_write_buffer_size(self) -> int:
        return self.waiting


class Wire:
    """A protocol between a transport and an application that answers with the body it got, or does
    what it is told.
    """

    def __init__(self, application: Any = None, timeout: float = 10.0) -> None:
        self.transport, self.refused, self.bodies = Transport(), list[Refusal](), list[bytes]()
        server = SimpleNamespace(
            connections=set(), tasks=set(), total_requests=0, default_headers=[(b"date", b"now")]
        )
        config = SimpleNamespace(timeout_keep_alive=5, loaded_app=application or self._echo)
        options = Settings({"paper": probes.tiny_probe()}, timeout=timeout)
        self.protocol = GuardedProtocol(options, self.refused.append, config, server, {})
        self.server = server
        self.protocol.connection_made(self.transport)

    async def _echo(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def say(self, *parts: bytes) -> None:
        """Data comes in, and everybody does what there is to do."""
        for part in parts:
            self.protocol.data_received(part)
            await settled()

    def answers(self) -> list[bytes]:
        """The bodies of the answers, each of the length that its head says."""
        found, rest = [], self.transport.sent
        while rest:
            head, _, rest = rest.partition(BLANK)
            length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
            found.append(rest[:length])
            rest = rest[length:]
        return found


async def settled() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def request(body: bytes, *headers: bytes, method: bytes = b"POST") -> bytes:
    return (
        b"\r\n".join(
            [
                method + b" /echo HTTP/1.1",
                b"Host: x",
                b"Content-Length: %d" % len(body),
                *headers,
                b"",
                b"",
            ]
        )
        + body
    )


CHUNKED = (
    b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:"
    b" chunked\r\n\r\n5\r\nfirst\r\n1\r\n!\r\n0\r\n\r\n"
)
SEQUENCE = (
    request(b"one")
    + request(b"")
    + CHUNKED
    + request(b"x\r\n\r\ny" * 3, b"Connection: keep-alive, x")
    + request(b"last")
)
WANTED = [b"one", b"", b"first!", b"x\r\n\r\ny" * 3, b"last"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 60, 1000])
def test_requests_are_the_same_however_they_are_cut(size: int) -> None:
    async def run() -> Wire:
        wire = Wire()
        await wire.say(*(SEQUENCE[start : start + size] for start in range(0, len(SEQUENCE), size)))
        return wire

    wire = asyncio.run(run())
    assert wire.bodies == WANTED
    assert wire.answers() == WANTED
    assert (wire.refused, wire.server.total_requests, wire.transport.closed) == ([], 5, False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, len(SEQUENCE) - 1), max_size=6))
def test_requests_are_the_same_however_they_are_cut_at_random(cuts: list[int]) -> None:
    async def run() -> Wire:
        wire, edges = Wire(), [0, *sorted(set(cuts)), len(SEQUENCE)]
        for start, end in pairwise(edges):
            wire.protocol.data_received(
                SEQUENCE[start:end]
            )  # without a turn of the loop between them unless reading is paused
            if wire.transport.paused:
                await settled()
        await settled()
        await settled()
        return wire

    assert asyncio.run(run()).bodies == WANTED


def test_requests_behind_the_one_that_is_answered_wait_and_reading_stops() -> None:
    async def run() -> None:
        wire = Wire()
        wire.protocol.data_received(request(b"one") + request(b"two"))
        assert wire.transport.paused
        await settled()
        assert wire.bodies == [b"one", b"two"]
        assert not wire.transport.paused

    asyncio.run(run())


def test_a_body_that_nobody_takes_stops_the_reading() -> None:
    async def run() -> None:
        go = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await go.wait()
            await wire._echo(scope, receive, send)

        wire, body = Wire(slow), bytes(1_000_000)
        data = request(body)
        await wire.say(data[:200_000])
        assert wire.transport.paused
        go.set()
        await settled()
        assert not wire.transport.paused
        await wire.say(data[200_000:400_000], data[400_000:])
        assert wire.bodies == [body]

    asyncio.run(run())


def test_a_whole_body_is_there_at_once_and_only_once() -> None:
    got: list[bytes | None] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        whole = scope["extensions"][WHOLE_BODY]
        got.extend([whole(), whole()])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        got.append(whole())

    async def run() -> None:
        await Wire(application).say(request(b"body"))
        assert got == [b"body", None, None]
        got.clear()
        await Wire(application).say(request(b"body")[:-1], b"y")  # the answer does not wait for it
        assert got == [None, None, None]

    asyncio.run(run())


def test_after_an_answer_the_rest_of_the_body_is_dropped_and_the_next_request_read() -> None:
    async def refuses(scope: Any, receive: Any, send: Any) -> None:
        await send(
            {"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"2")]}
        )
        await send({"type": "http.response.body", "body": b"no"})

    async def run() -> Wire:
        wire, data = Wire(refuses), request(bytes(1000))
        await wire.say(data[:300], data[300:] + request(b"next"))
        return wire

    assert asyncio.run(run()).answers() == [b"no", b"no"]


@pytest.mark.parametrize(
    ("sent", "closes"),
    [
        (request(b""), False),
        (request(b"", b"Connection: close"), True),
        (request(b"", b"Connection: x, Close"), True),
        (request(b"").replace(b"HTTP/1.1", b"HTTP/1.0"), True),
    ],
)
def test_the_connection_is_closed_behind_the_answer_if_the_client_says_so(
    sent: bytes, closes: bool
) -> None:
    async def run() -> Wire:
        wire = Wire()
        await wire.say(sent)
        return wire

    wire = asyncio.run(run())
    assert wire.transport.closed is closes
    assert (b"connection: close" in wire.transport.sent) is closes


def test_head_is_answered_without_a_body_and_with_its_length() -> None:
    async def run() -> bytes:
        wire = Wire()
        await wire.say(request(b"body", method=b"HEAD"))
        return wire.transport.sent

    assert asyncio.run(run()) == b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 4\r\n\r\n"


def test_told_to_stop_it_closes_behind_the_answer_or_at_once() -> None:
    async def run() -> None:
        idle, busy = Wire(), Wire()
        await idle.say(request(b"one"))
        busy.protocol.data_received(request(b"one"))
        for wire in (idle, busy):
            wire.protocol.shutdown()
        assert (idle.transport.closed, busy.transport.closed) == (True, False)
        await settled()
        assert busy.transport.closed
        assert busy.answers() == [b"one"]

    asyncio.run(run())


def test_a_client_that_leaves_is_not_answered_and_the_application_hears_of_it() -> None:
    heard: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(2):
            heard.append((await receive())["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"too late"})

    async def run() -> Wire:
        wire = Wire(application)
        await wire.say(request(b"body")[:-1])
        wire.transport.close()
        wire.protocol.connection_lost(None)
        await settled()
        return wire

    wire = asyncio.run(run())
    assert heard == ["http.request", "http.disconnect"]
    assert (wire.transport.sent, wire.server.connections, wire.server.tasks) == (b"", set(), set())


# --- applications that fail
# ---------------------------------------------------------------------------------------------


async def raises(scope: Any, receive: Any, send: Any) -> None:
    raise ZeroDivisionError


async def starts_and_raises(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise ZeroDivisionError


async def says_nothing(scope: Any, receive: Any, send: Any) -> None:
    return None


async def begins_with_a_body(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.body", "body": b"x"})


@pytest.mark.parametrize(
    "application", [raises, starts_and_raises, says_nothing, begins_with_a_body]
)
def test_an_application_without_an_answer_gives_a_500(
    application: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> Wire:
        wire = Wire(application)
        await wire.say(request(b""))
        return wire

    wire = asyncio.run(run())
    assert wire.transport.sent.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert wire.transport.closed
    assert len(caplog.records) == 1


def test_an_answer_that_breaks_off_ends_the_connection() -> None:
    async def breaks_off(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async def run() -> Wire:
        wire = Wire(breaks_off)
        await wire.say(request(b""))
        return wire

    wire = asyncio.run(run())
    assert wire.transport.closed
    assert wire.transport.sent.endswith(
        b"connection: close\r\n\r\nhalf"
    )  # without a length: it could not be kept


# --- deadlines
# ----------------------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_is_waited_for_and_then_cut_off() -> None:
    async def run() -> None:
        wire = Wire(timeout=0.05)
        wire.protocol.pause_writing()
        wire.transport.waiting = 1
        await wire.say(request(b"one"))
        assert wire.transport.sent == b""
        await asyncio.sleep(0.15)
        assert wire.transport.closed
        caught_up = Wire(timeout=0.05)
        caught_up.protocol.pause_writing()
        await caught_up.say(request(b"one"))
        caught_up.protocol.resume_writing()
        await asyncio.sleep(0.15)
        assert caught_up.answers() == [b"one"]
        assert not caught_up.transport.closed

    asyncio.run(run())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """A loop whose time goes on when it is told; what is due then is called."""
    loop = asyncio.new_event_loop()
    now, due = [100.0], list[tuple[float, Callable[[], None]]]()
    monkeypatch.setattr(loop, "time", lambda: now[0])
    monkeypatch.setattr(
        loop,
        "call_at",
        lambda when, call: due.append((when, call)) or SimpleNamespace(cancel=due.clear),
    )

    def go_on(seconds: float) -> None:
        now[0] += seconds
        for entry in [entry for entry in due if entry[0] <= now[0]]:
            due.remove(entry)
            entry[1]()

    go_on.loop, go_on.due = loop, due  # type: ignore[attr-defined]
    yield go_on
    loop.close()


def test_a_deadline_that_is_lifted_or_set_anew_is_not_met_at_the_old_time(clock: Any) -> None:
    late: list[int] = []
    timer = Timer(clock.loop, 10, lambda: late.append(1))
    timer.start()
    clock(4)
    timer.start()  # set already: not moved
    timer.stop()
    timer.start()
    assert len(clock.due) == 1
    clock(7)
    assert late == []
    clock(2.9)
    assert late == []
    clock(0.2)
    assert (late, timer.is_running, clock.due) == ([1], False, [])
    timer.start()
    timer.stop()
    clock(20)
    assert (late, clock.due) == ([1], [])
    timer.start()
    timer.end()
    assert clock.due == []
