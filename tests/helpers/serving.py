"""The scoring service as the tests see it.

A real server in a process of its own, and plain HTTP to talk to it.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from loraprobe import fit_probe
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta, factor_delta
from loraprobe.adapters.load import save_adapter
from loraprobe.probe import Probe
from loraprobe.serve import ScoringClient
from loraprobe.serve.results import Result, Unchecked
from loraprobe.serve.slices import save_whole
from tests.helpers import make, probes

ROOT = Path(__file__).resolve().parents[2]
OCTETS = {"Content-Type": "application/octet-stream"}
ALPHA = 4.0  # of rank 2 and scaling 2
GROWTH_MIB = 64


class Answer(NamedTuple):
    """A response: status, headers by lower-case name, and its body, parsed if it is JSON."""

    status: int
    headers: dict[str, str]
    body: Any

    @property
    def error(self) -> str:
        """The type of the typed error; the body has to be one, with a message."""
        assert set(self.body) == {"error"}, self.body
        assert (
            {"type", "message"} <= set(self.body["error"]) <= {"type", "message", "got", "expected"}
        )
        assert self.body["error"]["message"]
        assert "Traceback" not in json.dumps(self.body)
        return str(self.body["error"]["type"])


class Service:
    """A running service."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log
        self.port = 0

    def lines(self) -> list[dict[str, Any]]:
        """Its log; every line has to be JSON."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def answered(self) -> list[dict[str, Any]]:
        """The log of the requests that were answered so far, but for those to /healthz.

        A line is written when its answer is on its way, and before any later request is looked at.
        """
        self.ask("GET", "/healthz")
        return [
            line
            for line in self.lines()
            if line["event"] == "request" and line["route"] != "/healthz"
        ]

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> Answer:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(
                method, path, body, {**(OCTETS if body is not None else {}), **(headers or {})}
            )
            response = connection.getresponse()
            return _answer(response)
        finally:
            connection.close()

    def score(self, body: bytes, query: str = "", **headers: str) -> Answer:
        """POST /v1/score; `content_digest` stands for the header Content-Digest."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", f"/v1/score?{query}" if query else "/v1/score", body, named)

    def client(self, token: str | None = None) -> ScoringClient:
        """The Python client of it."""
        return ScoringClient(f"http://127.0.0.1:{self.port}", token)

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def raw(self, *parts: bytes) -> Answer | None:
        """Send bytes as they are; what comes back, None if the connection is closed unanswered."""
        with self.connect() as connection:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough
                for part in parts:
                    connection.sendall(part)
            return read_answer(connection)

    def resident_mib(self) -> float:
        """Its memory now."""
        [line] = [
            line
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            if line.startswith("VmRSS")
        ]
        return int(line.split()[1]) / 1024


def read_answer(connection: socket.socket) -> Answer | None:
    """The next response on a connection, None if it is closed without one."""
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
        return _answer(response)
    except (http.client.RemoteDisconnected, ConnectionResetError, http.client.IncompleteRead):
        return None
    finally:
        response.close()


def _answer(response: http.client.HTTPResponse) -> Answer:
    data = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(
        response.status,
        headers,
        json.loads(data) if headers.get("content-type") == "application/json" else data,
    )


@contextmanager
def running(log: Path, *options: str, **environment: str) -> Iterator[Service]:
    """`loraprobe serve` with these options, on a free port, until the end of the block."""
    command = [sys.executable, "-m", "loraprobe.cli.main", "serve", "--port", "0", *options]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    service = Service(process, log)
    try:
        deadline = time.monotonic() + 60
        while b'"serving"' not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        service.port = service.lines()[0]["port"]
        yield service
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


class Files(NamedTuple):
    """What a service is started with."""

    start: Path
    probes: dict[str, Path]

    def options(self, *names: str) -> list[str]:
        """--probe for some of them (all if none is named), and --base."""
        return [
            option
            for name in names or self.probes
            for option in ("--probe", str(self.probes[name]))
        ] + ["--base", str(self.start)]


def start() -> Adapter:
    """The adapter that training started from."""
    return make.adapter(r=2, seed=77, base_model=probes.BASE)


def delta(seed: int = 0, malicious: bool = True) -> Adapter:
    """A client's factor delta, close enough to the cut that no score is saturated."""
    return probes.labelled_adapter(9000 + seed, malicious, signal=0.4)


def uploaded(seed: int = 0, malicious: bool = True) -> Adapter:
    """The trained adapter that this delta leads to."""
    return add_delta(start(), delta(seed, malicious))


@cache
def served_probes() -> dict[str, Probe]:
    """One probe of each sort.

    Of flattened B, of all B, of pooled spectra, and one that scores weights.
    """
    weights = probes.labelled(16, 2, kind="weights")
    return {
        "paper": probes.tiny_probe("linear", "paper"),
        "all_b": probes.tiny_probe("mlp", "all_b"),
        "spectral": probes.tiny_probe("linear", "spectral"),
        "of_weights": fit_probe(
            weights.adapters, weights.labels, recipe="all_b", groups=weights.groups
        ),
    }


def expected(name: str, adapter: Adapter, *unchecked: Unchecked) -> Result:
    """What the library itself says of an adapter of the kind that a probe scores."""
    probe = served_probes()[name]
    [verdict] = probe.verdicts([adapter])
    return Result(
        name,
        None,
        verdict.score,
        verdict.label,
        verdict.reason,
        probe.threshold,
        unchecked or ("config", "start"),
    )


def shown(result: Result) -> dict[str, Any]:
    """A result as JSON has it."""
    return {**vars(result), "unchecked": list(result.unchecked)}


def of_upload(name: str, adapter: Adapter) -> Result:
    """What the library says of a trained adapter, after the delta that a probe needs was taken."""
    delta = adapter if name == "of_weights" else factor_delta(adapter, start())
    return expected(name, delta, "config")


def written(folder: Path) -> Files:
    """The start and the probes in folders."""
    save_adapter(start(), folder / "start")
    return Files(
        folder / "start",
        {name: probe.save_pretrained(folder / name) for name, probe in served_probes().items()},
    )


def good() -> bytes:
    """A body that is scored."""
    return save_whole(uploaded())


def post(body: bytes, query: str = "", *headers: str, length: int | None = None) -> bytes:
    """A whole request, with a Content-Length of its own choice or, below 0, none."""
    lines = [
        f"POST /v1/score{query and '?' + query} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/octet-stream",
        *headers,
    ]
    if length is None or length >= 0:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def assert_works(service: Service) -> None:
    """The service answers, and says of a good body what the library says."""
    assert service.ask("GET", "/healthz", timeout=5).body == {"status": "ok"}
    answer = service.score(good(), "probe=paper")
    assert answer.body["results"] == [shown(of_upload("paper", uploaded()))]


@contextmanager
def besieged(folder: Path, *options: str) -> Iterator[Service]:
    """A service that works before and after, and has neither grown nor failed inside by then."""
    with running(folder / "log", *written(folder).options("paper", "all_b"), *options) as service:
        assert_works(service)
        before = service.resident_mib()
        yield service
        assert_works(service)
        assert service.resident_mib() - before < GROWTH_MIB
        lines = service.lines()
    assert service.process.returncode == 0
    assert [line for line in lines if line.get("status") == 200]
    assert [line for line in lines if line.get("status") == 500 or "exception" in line] == []


class Response(NamedTuple):
    """An answer of an application that was called without a connection."""

    status: int
    body: Any


async def call(
    app: Any,
    path: str,
    body: bytes = b"",
    method: str = "POST",
    client: str = "127.0.0.1",
) -> Response:
    """One request; the body comes in two parts."""
    path, _, query = path.partition("?")
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope(path, query, method, client), receive, send)
    text = b"".join(message.get("body", b"") for message in sent[1:])
    return Response(sent[0]["status"], json.loads(text))


def scope(
    path: str,
    query: str = "",
    method: str = "POST",
    client: str = "127.0.0.1",
) -> dict[str, Any]:
    """What ASGI says of a request before its body."""
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/octet-stream")],
        "client": (client, 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
