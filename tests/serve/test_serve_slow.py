"""Clients that take their time, hold what they get, or come in great numbers.

They are cut off, and nobody else waits for them.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from tests.helpers import serving
from tests.helpers.serving import assert_works, good, post

pytestmark = (
    pytest.mark.enable_socket
)  # on the loopback interface only: to a server that the test starts

TIMEOUT = 1.0  # seconds that this service gives its clients
LIMIT = 1 << 20  # bytes of one body; twice that of all together


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Service]:
    with serving.besieged(
        tmp_path_factory.mktemp("served"), "--max-mib", "1", "--timeout", str(TIMEOUT)
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(service: serving.Service) -> Iterator[None]:
    """After every test the service scores as before."""
    yield
    assert_works(service)


def closed_after(
    connection: socket.socket, drip: bytes, pause: float = 0.1, longest: float = 6 * TIMEOUT
) -> tuple[float, bytes]:
    """Send one byte after the other until the connection is closed.

    After how many seconds, and what was said.
    """
    begun, said = time.monotonic(), b""
    connection.settimeout(pause)
    for number in range(int(longest / pause)):
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(drip[number % len(drip) : number % len(drip) + 1])
        try:
            data = connection.recv(1 << 16)
        except TimeoutError:
            continue
        except ConnectionResetError:
            data = b""
        said += data
        if not data:
            return time.monotonic() - begun, said
    raise AssertionError(f"still open after {longest} s: {said!r}")


def test_headers_that_dribble_in_are_cut_off(service: serving.Service) -> None:
    with service.connect() as connection:
        seconds, said = closed_after(connection, b"GET /healthz HTTP/1.1\r\nX-Slow: " + b"a" * 1000)
    assert TIMEOUT * 0.8 < seconds < 4 * TIMEOUT
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b'"HeaderTimeout"' in said


def test_headers_that_dribble_in_behind_a_first_request_are_cut_off_too(
    service: serving.Service,
) -> None:
    with service.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: service\r\n\r\n")
        assert serving.read_answer(connection) is not None
        seconds, said = closed_after(connection, b"GET /healthz HTTP/1.1\r\nX-Slow: " + b"a" * 1000)
    assert TIMEOUT * 0.8 < seconds < 4 * TIMEOUT
    assert b'"HeaderTimeout"' in said


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_dribbles_in_is_cut_off(service: serving.Service, chunked: bool) -> None:
    begin = (
        post(b"", "", "Transfer-Encoding: chunked", length=-1)
        if chunked
        else post(b"", length=LIMIT)
    )
    with service.connect() as connection:
        connection.sendall(begin)
        seconds, said = closed_after(connection, b"1\r\nx\r\n" if chunked else b"x")
    assert TIMEOUT * 0.8 < seconds < 4 * TIMEOUT
    assert b'"BodyTimeout"' in said


def test_the_rest_of_a_refused_body_may_not_dribble_in_either(service: serving.Service) -> None:
    with service.connect() as connection:
        connection.sendall(post(b"", length=10 * LIMIT))
        seconds, said = closed_after(connection, b"x")
    assert seconds < 4 * TIMEOUT
    assert b'"BodyTooLarge"' in said


def test_a_body_that_comes_steadily_may_take_longer_than_the_deadline(
    service: serving.Service,
) -> None:
    """The negative control: a slow line is not an attack.

    120 KB/s is above the least rate, and the whole takes longer than the timeout.
    """
    body = bytes(200_000)
    with service.connect() as connection:
        begun = time.monotonic()
        connection.sendall(post(b"", "alpha=4", length=len(body)))
        for start in range(0, len(body), 20_000):
            time.sleep(0.16)
            connection.sendall(body[start : start + 20_000])
        answer = serving.read_answer(connection)
    assert time.monotonic() - begun > 1.3 * TIMEOUT
    assert answer is not None
    assert answer.error == "AdapterFormatError"  # it was read to its end, and holds no adapter


def test_two_hundred_idle_connections_hinder_nobody_and_are_closed(
    service: serving.Service,
) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(service.connect()) for _ in range(200)]
        assert_works(service)
        deadline = time.monotonic() + 5 * TIMEOUT
        for connection in idle:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            answer = serving.read_answer(connection)
            assert answer is not None
            assert answer.error == "HeaderTimeout"


def test_bodies_that_stand_still_leave_room_for_others(service: serving.Service) -> None:
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(service.connect()).sendall(post(bytes(10_000), length=LIMIT))
        for _ in range(5):
            assert_works(service)


def test_bodies_beyond_the_memory_there_is_are_put_off(service: serving.Service) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(service.connect()) for _ in range(4)]
        for connection in connections:
            connection.sendall(
                post(bytes(LIMIT - 100_000), length=LIMIT)
            )  # four of them are more than twice the limit
        refused, _, _ = select.select(connections, [], [], 10)
        answer = serving.read_answer(refused[0])
    assert answer is not None
    assert (answer.status, answer.error, answer.headers["retry-after"]) == (503, "Overloaded", "1")
    held_nothing(service)
    assert_works(service)


def held_nothing(service: serving.Service) -> None:
    """Wait until the service has forgotten all bodies."""
    deadline = time.monotonic() + 10
    while b"loraprobe_held_bytes 0.0" not in (text := service.ask("GET", "/metrics").body):
        assert time.monotonic() < deadline
    assert b"loraprobe_in_flight 1.0" in text


def test_a_body_that_came_quickly_and_then_stands_still_holds_its_memory_no_longer_than_the_deadline(
    service: serving.Service,
) -> None:
    with service.connect() as connection:
        connection.sendall(post(bytes(LIMIT - 1), length=LIMIT))
        begun = time.monotonic()
        answer = serving.read_answer(connection)
    assert answer is not None
    assert answer.error == "BodyTimeout"
    assert TIMEOUT * 0.5 < time.monotonic() - begun < 4 * TIMEOUT


def test_a_client_that_leaves_in_the_middle_is_forgotten(service: serving.Service) -> None:
    for number in range(30):
        with service.connect() as connection:
            connection.sendall(post(good()[: 10 + number], length=len(good())))
            if number % 2:
                connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )  # leaves with a reset
    held_nothing(service)


def test_a_client_that_asks_and_never_reads_is_cut_off(service: serving.Service) -> None:
    with service.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.2)
        begun = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012
            while time.monotonic() - begun < 30 * TIMEOUT:
                with suppress(TimeoutError):
                    connection.sendall(b"GET / HTTP/1.1\r\nHost: service\r\n\r\n" * 50)


def test_more_connections_than_there_may_be_are_turned_away(service: serving.Service) -> None:
    with ExitStack() as stack:
        opened = [stack.enter_context(service.connect()) for _ in range(530)]  # 512 may be open
        answer = serving.read_answer(opened[-1])
        assert answer is not None
        assert (answer.status, answer.error) == (503, "Overloaded")
    deadline = time.monotonic() + 10
    while True:
        try:
            return assert_works(service)
        except (AssertionError, OSError):
            assert time.monotonic() < deadline
