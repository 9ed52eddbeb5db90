"""What scoring costs a request.

The service against a bare FastAPI echo of the same bytes, and its memory over ten thousand
requests.

    python -m benchmarks.serving            # results/serving.json, and its table in docs/serve.md
    python -m benchmarks.serving --page     # the table alone, from the results that are there

The body is a delta slice of Llama-3.1-8B's shape (B of the first layer's q_proj and v_proj, r = 8,
float32: 160 KB of random numbers, on which the time does not depend), sent as the Python client
sends it, with its digest. The echo is a FastAPI endpoint that reads the body and returns it, served
by uvicorn on httptools and uvloop as the service is. Both are asked in turn within every round;
quoted are medians over rounds. The goal is about the processor time that the server spends on a
request, which other work on the machine changes little; waiting times are quoted beside it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loraprobe import Adapter, LoRAPair, Probe
from loraprobe.serve import Settings
from loraprobe.serve.header_cache import MAX_KNOWN
from loraprobe.serve.scoring import Question, Scorer
from loraprobe.serve.slices import save_slice
from loraprobe.serve.upload import content_digest
from zoo.program import documented

from . import common
from .common import ROOT, fill, random_probe, write
from .serving_table import table

RESULTS = common.RESULTS / "serving.json"
PAGE = ROOT / "docs/serve.md"
MODULES = {"q_proj": (4096, 4096), "v_proj": (1024, 4096)}  # (d_out, d_in) of Llama-3.1-8B
RANK = 8
BASE = "meta-llama/Llama-3.1-8B"
GOAL = 2.5  # the processor time of a scored request over that of an echoed one
MEMORY_REQUESTS = 10_000


def main() -> None:
    """Measure, print and save."""
    parser = documented(__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--requests", type=int, default=400, help="of each server in each round")
    parser.add_argument(
        "--echo", action="store_true", help="be the echo server (what the benchmark starts)"
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "--page",
        action="store_true",
        help="write the table of docs/serve.md anew, and measure nothing",
    )
    options = parser.parse_args()
    if options.echo:
        echo(options.port)
    elif options.page:
        write_page(json.loads(RESULTS.read_text()))
    else:
        measure(options.rounds, options.requests)


def measure(rounds: int, requests: int) -> None:
    """Start the servers, compare them, print and save."""
    delta = random_delta()
    probe = random_probe(delta, base_model=BASE)
    body = save_slice(probe.featurizer, delta)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        probe.save_pretrained(Path(name) / "paper")
        echo_command = [sys.executable, "-m", "benchmarks.serving", "--echo", "--port"]
        serve = [sys.executable, "-m", "loraprobe.cli.main", "serve", "--max-mib", "1"]
        score = [*serve, "--probe", str(Path(name) / "paper"), "--port"]
        servers = {
            "score": stack.enter_context(running(score)),
            "echo": stack.enter_context(running(echo_command)),
        }
        measured = {
            f"{connections} connections": compare(servers, body, connections, rounds, requests)
            for connections in (4, 1)
        }
        memory = memory_over_time(servers["score"], body)
    result = {
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[1], 1),
            "python": platform.python_version(),
        },
        "body_bytes": len(body),
        "rounds": rounds,
        "requests_per_round": requests,
        "goal": GOAL,
        **measured,
        "parts_ms": parts(body, probe),
        "memory": memory,
    }
    print(json.dumps(result, indent=2))
    write(RESULTS, result, indent=2)
    write_page(json.loads(RESULTS.read_text()))


def random_delta() -> Adapter:
    """A factor delta of two layers; the probe reads the first."""
    rng = np.random.default_rng(0)
    pairs = {
        f"model.layers.{layer}.self_attn.{name}": LoRAPair(
            0.02 * rng.standard_normal((RANK, d_in), np.float32),
            0.01 * rng.standard_normal((d_out, RANK), np.float32),
            2.0,
        )
        for layer in range(2)
        for name, (d_out, d_in) in MODULES.items()
    }
    return Adapter(pairs, kind="factor_delta", base_model=BASE)


def echo(port: int) -> None:
    """A FastAPI application that returns what it is sent, and nothing else."""
    import uvicorn
    from fastapi import FastAPI, Request, Response

    app = FastAPI()

    async def returned(request: Request) -> Response:
        return Response(await request.body(), media_type="application/octet-stream")

    returned.__annotations__ = {
        "request": Request,
        "return": Response,
    }  # FastAPI cannot look up names that are local to this function
    app.add_api_route("/v1/score", returned, methods=["POST"])
    uvicorn.run(
        app,
        port=port,
        http="httptools",
        loop="uvloop",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
    )


class Server:
    """A running server: where it listens, and its process."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port, self.process = port, process

    def processor_ms(self) -> float:
        """The processor time of its main thread, which answers the requests."""
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0]) / 1e6

    def resident_mib(self) -> float:
        """Its memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return round(int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024, 1)  # type: ignore[union-attr]


@contextmanager
def running(command: list[str]) -> Iterator[Server]:
    """Start a server on a free port and wait until it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*command, str(port)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        yield Server(port, process)
    finally:
        process.terminate()
        process.wait()


def compare(
    servers: dict[str, Server], body: bytes, connections: int, rounds: int, requests: int
) -> dict[str, Any]:
    """Requests a second and latencies of both servers, asked in turn, and their ratio."""
    sent = request(body)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for number in range(rounds + 1):  # the first warms up and is not counted
        for name, server in servers.items():
            measured = load(server, sent, connections, requests)
            if number:
                taken[name].append(measured)
    summary: dict[str, Any] = {
        name: {
            key: round(statistics.median(one[key] for one in all_rounds), 4)
            for key in all_rounds[0]
        }
        for name, all_rounds in taken.items()
    }
    ratios = {
        key: [a[key] / b[key] for a, b in zip(taken["score"], taken["echo"], strict=True)]
        for key in taken["echo"][0]
    }
    summary["score / echo"] = {
        key: {
            "median": round(statistics.median(values), 3),
            "lowest": round(min(values), 3),
            "highest": round(max(values), 3),
        }
        for key, values in ratios.items()
    }
    return summary


def request(body: bytes, path: str = "/v1/score?kind=factor_delta") -> bytes:
    """One request as the Python client sends it, on a connection that stays open."""
    head = {
        "Host": "127.0.0.1",
        "Accept-Encoding": "identity",
        "Content-Length": str(len(body)),
        "Content-Type": "application/octet-stream",
        "Content-Digest": content_digest(body),
    }
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def load(server: Server, sent: bytes, connections: int, requests: int) -> dict[str, float]:
    """Send a request again and again over some connections, each waiting for its answer."""
    seconds: list[float] = []
    threads = [
        threading.Thread(target=_ask, args=(server.port, sent, requests // connections, seconds))
        for _ in range(connections)
    ]
    spent = server.processor_ms()
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - begun
    spent = server.processor_ms() - spent
    if len(seconds) != requests // connections * connections:
        raise RuntimeError("a request was not answered with status 200")
    ordered = sorted(1000 * second for second in seconds)
    return {
        "processor_ms": spent / len(seconds),
        "requests_per_s": len(seconds) / elapsed,
        "p50_ms": ordered[len(ordered) // 2],
        "p99_ms": ordered[int(len(ordered) * 0.99)],
    }


def _ask(port: int, sent: bytes, count: int, seconds: list[float]) -> None:
    buffer = memoryview(bytearray(1 << 20))
    with _connected(port) as connection:
        for _ in range(count):
            begun = time.perf_counter()
            connection.sendall(sent)
            if _status(connection, buffer) != 200:
                return
            seconds.append(time.perf_counter() - begun)


def _connected(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _status(connection: socket.socket, buffer: memoryview) -> int:
    """Read one whole answer; its status."""
    got = 0
    needed = -1
    while needed < 0 or got < needed:
        count = connection.recv_into(buffer[got:])
        if not count:
            return 0
        got += count
        if needed < 0:
            head, blank, _ = bytes(buffer[:got]).partition(b"\r\n\r\n")
            if blank:
                needed = (
                    len(head) + 4 + int(re.search(rb"(?i)content-length: (\d+)", head).group(1))
                )  # type: ignore[union-attr]
    return int(bytes(buffer[9:12]))


def parts(body: bytes, probe: Probe) -> dict[str, float]:
    """Median milliseconds of what a scored request has and an echo has not, each alone and warm.

    Scoring a slice is measured twice: with the header that every slice for a probe mostly has, and
    with one that was not read before.
    """
    scorer = Scorer(Settings({"paper": probe}))
    question = Question(("paper",), "factor_delta")
    others = itertools.cycle(
        [with_longer_header(body, spaces) for spaces in range(8, 8 * 2 * MAX_KNOWN, 8)]
    )
    tasks: dict[str, Callable[[], object]] = {
        "sha256": lambda: hashlib.sha256(body).digest(),
        "scoring": lambda: scorer(body, question),
    }
    taken: dict[str, list[float]] = {name: [] for name in (*tasks, "scoring, header not known")}
    for _ in range(1000):
        for name, task in tasks.items():
            taken[name].append(timed(task))
    for _ in range(1000):
        other = next(others)
        taken["scoring, header not known"].append(
            timed(lambda other=other: scorer(other, question))
        )  # type: ignore[misc]
    return {name: round(statistics.median(values), 4) for name, values in taken.items()}


def timed(task: Callable[[], object]) -> float:
    """Milliseconds that it takes once."""
    begun = time.perf_counter()
    task()
    return 1000 * (time.perf_counter() - begun)


def with_longer_header(body: bytes, spaces: int) -> bytes:
    """The same safetensors file with spaces behind its header."""
    length = int.from_bytes(body[:8], "little")
    header, rest = body[8 : 8 + length], body[8 + length :]
    return (length + spaces).to_bytes(8, "little") + header + b" " * spaces + rest


def memory_over_time(server: Server, body: bytes) -> dict[str, Any]:
    """Resident memory after one and ten thousand requests, one in five of which is refused."""
    nan = body[:-4] + b"\xff\xff\xff\xff"
    other = [request(body, path) for path in ("/v1/score?kind=weights", "/nothing")]
    refused = [request(body[:-4]), request(nan), *other]
    buffer = memoryview(bytearray(1 << 20))
    statuses = dict.fromkeys((200, 404, 422), 0)
    resident = {}
    with _connected(server.port) as connection:
        for number in range(1, MEMORY_REQUESTS + 1):
            connection.sendall(refused[number // 5 % 4] if number % 5 == 0 else request(body))
            statuses[_status(connection, buffer)] += 1
            if number in (1000, MEMORY_REQUESTS):
                resident[number] = server.resident_mib()
    return {
        "resident_mib_after": resident,
        "grown_mib": round(resident[MEMORY_REQUESTS] - resident[1000], 1),
        "answers_by_status": statuses,
    }


def write_page(result: dict[str, Any]) -> None:
    """Put the results between the marks of docs/serve.md."""
    fill(PAGE, "serving cost", table(result), "benchmarks.serving")


if __name__ == "__main__":
    main()
