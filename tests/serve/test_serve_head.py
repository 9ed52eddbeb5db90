"""Heads of requests: the usual form is read as h11 reads it, and any other is left to h11."""

from __future__ import annotations

from typing import Any

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraprobe.serve.exchange import head_of
from loraprobe.serve.head import BLANK, parsed_head, usual_head
from loraprobe.serve.protocol import MAX_HEAD

USUAL = (
    b"POST /v1/score?kind=weights HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nConnection:"
    b" keep-alive\r\nX-Y:\t a b \t\r\n\r\n"
)


def by_h11(data: bytes) -> Any:
    """What h11 makes of a head; None if it is not whole or no head."""
    conn = h11.Connection(h11.SERVER, MAX_HEAD)
    try:
        conn.receive_data(data)
        event = conn.next_event()
    except h11.RemoteProtocolError:
        return None
    return (
        parsed_head(event, conn)
        if isinstance(event, h11.Request) and not conn.trailing_data[0]
        else None
    )


def test_the_usual_form_is_read_as_h11_reads_it() -> None:
    head = usual_head(USUAL)
    assert head is not None
    assert head == by_h11(USUAL)
    assert (head.method, head.target, head.length, head.is_last, head.is_asked_first) == (
        "POST",
        b"/v1/score?kind=weights",
        10,
        False,
        False,
    )
    assert head.headers == [
        (b"host", b"x"),
        (b"content-length", b"10"),
        (b"connection", b"keep-alive"),
        (b"x-y", b"a b"),
    ]


OTHER_FORMS = {
    "no host": USUAL.replace(b"Host: x\r\n", b""),
    "two hosts": USUAL.replace(b"Host: x", b"Host: x\r\nHost: y"),
    "two lengths": USUAL.replace(b"Length: 10", b"Length: 10\r\nContent-Length: 10"),
    "a sign": USUAL.replace(b"Length: 10", b"Length: +10"),
    "an underscore": USUAL.replace(b"Length: 10", b"Length: 1_0"),
    "a digit that is not ASCII": USUAL.replace(b"Length: 10", b"Length: \xb2"),
    "many digits": USUAL.replace(b"Length: 10", b"Length: " + b"1" * 5000),
    "chunks": USUAL.replace(b"Content-Length: 10", b"Transfer-Encoding: chunked"),
    "chunks and a length": USUAL.replace(b"Host: x", b"Host: x\r\nTransfer-Encoding: chunked"),
    "asks first": USUAL.replace(b"X-Y", b"Expect"),
    "an upgrade": USUAL.replace(b"X-Y", b"Upgrade"),
    "the last one": USUAL.replace(b"keep-alive", b"close"),
    "the last one, among others": USUAL.replace(b"keep-alive", b"keep-alive, close"),
    "HTTP/1.0": USUAL.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "a folded line": USUAL.replace(b"X-Y:", b"X-Y:\r\n "),
    "a space before the colon": USUAL.replace(b"Host:", b"Host :"),
    "a zero byte": USUAL.replace(b"a b", b"a\0b"),
    "a line feed alone": USUAL.replace(b"a b", b"a\nContent-Length: 3"),
    "a carriage return alone": USUAL.replace(b"a b", b"a\rb"),
    "a name that is none": USUAL.replace(b"X-Y", b"X(Y"),
    "an empty value": USUAL.replace(b"a b", b""),
    "two spaces": USUAL.replace(b"POST ", b"POST  "),
    "nothing": BLANK,
    "a blank line first": b"\r\n" + USUAL,
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_any_other_form_is_left_to_h11(name: str) -> None:
    assert OTHER_FORMS[name] != USUAL
    assert usual_head(OTHER_FORMS[name]) is None


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, len(USUAL) - 5),
    st.integers(0, 4),
    st.sampled_from([bytes([byte]) for byte in range(256)] + [b"\r\n", b"\r\nHost: y", b": "]),
)
@example(0, 0, b"")
def test_a_damaged_head_is_read_as_h11_reads_it_or_left_to_it(
    at: int, cut: int, new: bytes
) -> None:
    data = USUAL[:at] + new + USUAL[at + cut :]
    head = usual_head(data) if data.find(BLANK) + len(BLANK) == len(data) else None
    if head is not None:
        assert head == by_h11(data)


def test_a_header_of_an_answer_cannot_begin_another_line() -> None:
    assert head_of(200, [(b"a", b"b")]) == b"HTTP/1.1 200 OK\r\na: b\r\n\r\n"
    for value in (b"x\r\nSet-Cookie: y", b"x\ny", b"x\ry"):
        with pytest.raises(RuntimeError, match="line break"):
            head_of(200, [(b"a", value)])
