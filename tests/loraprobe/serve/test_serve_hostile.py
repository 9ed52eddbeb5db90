"""Clients that mean no good.

Every one is refused with a typed error or cut off, and the service goes on scoring as before.
"""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from collections.abc import Callable, Iterator

import pytest
import safetensors.torch
import torch

from loraprobe.serve.slices import save_whole
from tests.helpers import make, probes, serving
from tests.helpers.serving import chunk, good, post

pytestmark = pytest.mark.enable_socket  # on the loopback interface only

MIB = 1 << 20
LIMIT = MIB  # of one body


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Service]:
    with serving.besieged(tmp_path_factory.mktemp("served"), "--max-mib", "1") as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(service: serving.Service) -> Iterator[None]:
    """After every test the service scores as before."""
    yield
    serving.assert_works(service)


def container(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def tensors(count: int, name: str) -> bytes:
    """As many tensors of one number."""
    entries = {
        name.format(number): {
            "dtype": "F32",
            "shape": [1, 1],
            "data_offsets": [4 * number, 4 * number + 4],
        }
        for number in range(count)
    }
    return container(json.dumps(entries).encode(), bytes(4 * count))


def zip_bomb() -> bytes:
    """A kilobyte that would unpack to 64 MiB."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(64 * MIB))
    return packed.getvalue()


def with_scalings(scalings: dict[str, float]) -> bytes:
    """An adapter that says something else of its scalings."""
    said = {
        "format": "adapter",
        "version": 1,
        "kind": "weights",
        "base_model": None,
        "scalings": scalings,
    }
    data: bytes = safetensors.torch.save(
        make.tensors(serving.uploaded()), {"loraprobe": json.dumps(said)}
    )
    return data


# --- bodies ---

BODIES: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "a header that does not come": lambda: struct.pack("<Q", 100_000_000) + good()[8:],
    "a header of nothing but spaces": lambda: container(b" " * (LIMIT - 100)),
    "objects in objects": lambda: container(b'{"a":' * 150_000),
    "a name twice among fifty thousand": lambda: container(
        b"{" + b",".join(b'"%d":1' % number for number in range(50_000)) + b',"49999":1}'
    ),
    "metadata that nest": lambda: container(
        json.dumps({"__metadata__": {"loraprobe": "[" * 400_000}}).encode()
    ),
    "fifty thousand scalings": lambda: with_scalings(dict.fromkeys(map(str, range(50_000)), 1.0)),
    "six thousand tiny tensors": lambda: tensors(6000, "t{}"),
    "six thousand half modules": lambda: tensors(6000, "base_model.model.m{}.lora_A.weight"),
    "a name with control characters": lambda: safetensors.torch.save(
        {"\x1b[2J\r\n.lora_A.weight": torch.ones(1, 1)}
    ),
    "a pickle": lambda: (
        b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R."
    ),
    "a zip bomb": zip_bomb,
    "a thousand layers": lambda: save_whole(make.adapter(r=2, layers=1000, base_model=probes.BASE)),
}
# of the others, AdapterFormatError
ERRORS = {
    "fifty thousand scalings": "LayoutMismatch",
    "six thousand tiny tensors": "UnsupportedAdapterError",
    "a thousand layers": "LayoutMismatch",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_adapter_is_refused_quickly(service: serving.Service, name: str) -> None:
    body, error = BODIES[name](), ERRORS.get(name, "AdapterFormatError")
    begun = time.monotonic()
    answer = service.score(body, "" if b"loraprobe" in body else "alpha=4")
    assert (answer.status, answer.error) == (422, error), answer
    assert len(json.dumps(answer.body)) < 1500  # what is quoted of a body is short
    assert time.monotonic() - begun < 5


def test_no_cut_of_an_adapter_is_scored(service: serving.Service) -> None:
    for length in range(0, len(good()), 97):
        assert service.score(good()[:length]).error == "AdapterFormatError", length


# --- HTTP ---

CHUNKED = "Transfer-Encoding: chunked"
HOST = "HTTP/1.1\r\nHost: localhost\r\n"
OTHER = f"POST /v1/score {HOST}"
HTTP: dict[str, tuple[bytes, int, str]] = {
    "ten times too large, announced": (post(bytes(10 * LIMIT)), 413, "BodyTooLarge"),
    "ten times too large, announced only": (post(b"", length=10 * LIMIT), 413, "BodyTooLarge"),
    "a length beyond any disk": (post(b"", length=10**17), 413, "BodyTooLarge"),
    "ten times too large, in chunks": (
        post(chunk(bytes(LIMIT)) * 10 + b"0\r\n\r\n", "", CHUNKED, length=-1),
        413,
        "BodyTooLarge",
    ),
    "one byte too large, in chunks": (
        post(chunk(bytes(LIMIT + 1)) + b"0\r\n\r\n", "", CHUNKED, length=-1),
        413,
        "BodyTooLarge",
    ),
    "compressed": (post(good(), "", "Content-Encoding: gzip"), 415, "UnsupportedEncoding"),
    "what curl sends unasked": (
        post(good()).replace(b"application/octet-stream", b"application/x-www-form-urlencoded"),
        415,
        "UnsupportedMediaType",
    ),
    "more than one encoding": (
        f"{OTHER}Transfer-Encoding: gzip, chunked\r\n\r\n".encode(),
        415,
        "UnsupportedMediaType",
    ),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400, "BadRequest"),
    "two hosts": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "BadRequest"),
    "a target that is no path": (f"OPTIONS * {HOST}\r\n".encode(), 404, "NotFound"),
    "a path upwards": (f"GET /../../etc/passwd {HOST}\r\n".encode(), 404, "NotFound"),
    "a path with a zero byte": (f"GET /%00 {HOST}\r\n".encode(), 404, "NotFound"),
    "a web socket": (
        f"GET /v1/score {HOST}Connection: upgrade\r\nUpgrade: websocket\r\n\r\n".encode(),
        405,
        "MethodNotAllowed",
    ),
    "a query that is no ASCII": (post(good(), "alpha=%ff%fe"), 422, "QueryError"),
}

# Of what uvicorn's parser refuses, in its own words, and hangs up: where two readers could differ.
NO_HTTP: dict[str, bytes] = {
    "two lengths of one body": post(chunk(good()) + b"0\r\n\r\n", "", CHUNKED),
    "two lengths around a hidden request": post(
        f"0\r\n\r\nGET /healthz {HOST}\r\n".encode(), "", CHUNKED
    ),
    "two Content-Lengths": post(good(), "", "Content-Length: 5"),
    "a length below zero": post(b"", length=0).replace(b"Length: 0", b"Length: -1"),
    "a space before the colon": f"{OTHER}Content-Length : 5\r\n\r\nhello".encode(),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
}


@pytest.mark.parametrize("name", HTTP)
def test_a_request_that_is_not_right_gets_a_typed_answer(
    service: serving.Service, name: str
) -> None:
    sent, status, error = HTTP[name]
    answer = service.raw(sent)
    assert answer is not None
    assert (answer.status, answer.error) == (status, error)


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_ends_the_connection(service: serving.Service, name: str) -> None:
    with service.connect() as connection:
        connection.sendall(NO_HTTP[name])
        answer = serving.read_answer(connection)
        assert answer is not None
        assert (answer.status, answer.headers["connection"]) == (400, "close")
        assert serving.read_answer(connection) is None  # a hidden request was not answered


@pytest.mark.parametrize(
    "headers",
    [b"X: " + b"a" * 100_000, b"X: a\r\n" * 10_000 + b"Y: b"],
    ids=["one", "ten thousand"],
)
def test_headers_beyond_what_a_request_needs_are_refused(
    service: serving.Service, headers: bytes
) -> None:
    answer = service.raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n\r\n")
    assert answer is not None
    assert (answer.status, answer.error) == (431, "HeadersTooLarge")


def test_a_client_that_asks_first_is_told_before_it_sends(service: serving.Service) -> None:
    with service.connect() as connection:
        connection.sendall(post(b"", "probe=paper", "Expect: 100-continue", length=10 * LIMIT))
        answer = serving.read_answer(connection)
        assert answer is not None
        assert answer.error == "BodyTooLarge"
    with service.connect() as connection:
        connection.sendall(post(b"", "probe=paper", "Expect: 100-continue", length=len(good())))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(good())
        answer = serving.read_answer(connection)
        assert answer is not None
        assert answer.status == 200


def test_a_connection_goes_on_after_a_refusal(service: serving.Service) -> None:
    """The rest of a body that nobody read is not taken for the next request."""
    with service.connect() as connection:
        for path, status in (
            ("/v1/score?probe=nope", 422),
            ("/nothing", 404),
            ("/v1/score?probe=paper", 200),
        ):
            connection.sendall(post(good()).replace(b"/v1/score", path.encode(), 1))
            answer = serving.read_answer(connection)
            assert answer is not None
            assert answer.status == status
