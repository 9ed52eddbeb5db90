"""What scoring costs a request: the service against a bare FastAPI echo of the same bytes, and its memory over ten thousand requests.

    python -m benchmarks.serving            # table and benchmarks/results/serving.json

The body is a delta slice of Llama-3.1-8B's shape (B of the first layer's q_proj and v_proj, r = 8, float32: 160 KB of random
numbers, on which the time does not depend), sent as the Python client sends it, with its digest. The echo reads the body and
returns it, under the same uvicorn settings (h11, asyncio), and again under those that uvicorn chooses by itself where they are
installed (httptools, uvloop). Servers are asked in turn within every round; quoted are medians over rounds.
"""

from __future__ import annotations

import argparse
import hashlib
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraprobe import Adapter, FeatureRecipe, Featurizer, LoRAPair, Probe
from loraprobe.heads import LinearHead
from loraprobe.serve.scoring import Question, Scorer
from loraprobe.serve.settings import Settings
from loraprobe.serve.upload import content_digest
from loraprobe.slices import save_slice

RESULTS = Path(__file__).parent / "results/serving.json"
ROOT = Path(__file__).resolve().parent.parent
MODULES = {"q_proj": (4096, 4096), "v_proj": (1024, 4096)}  # (d_out, d_in) of Llama-3.1-8B
RANK = 8
GOAL = 1.3  # the time of a scored request over that of an echoed one
MEMORY_REQUESTS = 10_000


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--requests", type=int, default=400, help="of each server in each round")
    parser.add_argument("--echo", metavar="HTTP,LOOP", help="be the echo server (what the benchmark starts)")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    if options.echo:
        echo(options.port, *options.echo.split(","))
    else:
        measure(options.rounds, options.requests)


def measure(rounds: int, requests: int) -> None:
    """Start the servers, compare them, print and save."""
    delta = random_delta()
    probe = paper_probe(delta)
    body = save_slice(probe.featurizer, delta)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        probe.save_pretrained(Path(name) / "paper")
        score = [sys.executable, "-m", "loraprobe.cli", "serve", "--probe", str(Path(name) / "paper"), "--max-mib", "1", "--port"]
        servers = {"score": stack.enter_context(running(score)), "echo": stack.enter_context(running(echo_command("h11", "asyncio")))}
        if find_spec("httptools") and find_spec("uvloop"):
            servers["echo, uvicorn's own choice"] = stack.enter_context(running(echo_command("httptools", "uvloop")))
        measured = {f"{connections} connections": compare(servers, body, connections, rounds, requests) for connections in (4, 1)}
        memory = memory_over_time(servers["score"], body)
    result = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()},
        "body_bytes": len(body),
        "rounds": rounds,
        "requests_per_round": requests,
        "goal": GOAL,
        **measured,
        "parts_ms": parts(body, probe),
        "memory": memory,
    }
    print(json.dumps(result, indent=2))
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def random_delta() -> Adapter:
    """A factor delta of two layers; the probe reads the first."""
    rng = torch.Generator().manual_seed(0)
    pairs = {
        f"model.layers.{layer}.self_attn.{name}": LoRAPair(
            torch.randn(RANK, d_in, generator=rng) * 0.02, torch.randn(d_out, RANK, generator=rng) * 0.01, 2.0
        )
        for layer in range(2)
        for name, (d_out, d_in) in MODULES.items()
    }
    return Adapter(pairs, kind="factor_delta")


def paper_probe(delta: Adapter) -> Probe:
    """The paper's recipe with a linear head of random weights."""
    featurizer = Featurizer.fit(FeatureRecipe.paper(), [delta])
    return Probe(featurizer, LinearHead(np.random.default_rng(0).standard_normal(featurizer.num_features).astype(np.float32), 0.0))


def echo(port: int, http: Any, loop: Any) -> None:
    """A FastAPI application that returns what it is sent, and nothing else."""
    import uvicorn
    from fastapi import FastAPI, Request, Response

    app = FastAPI()

    async def returned(request: Request) -> Response:
        return Response(await request.body(), media_type="application/octet-stream")

    returned.__annotations__ = {"request": Request, "return": Response}  # FastAPI cannot look up names that are local to this function
    app.add_api_route("/v1/score", returned, methods=["POST"])
    uvicorn.run(app, port=port, http=http, loop=loop, ws="none", lifespan="off", log_level="warning", access_log=False, server_header=False)


def echo_command(http: str, loop: str) -> list[str]:
    """The command line of an echo server, but for its port."""
    return [sys.executable, "-m", "benchmarks.serving", "--echo", f"{http},{loop}", "--port"]


class Server:
    """A running server: where it listens, and its process."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port, self.process = port, process

    def resident_mib(self) -> float:
        """Its memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return round(int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024, 1)  # type: ignore[union-attr]


@contextmanager
def running(command: list[str]) -> Iterator[Server]:
    """Start a server on a free port and wait until it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, str(port)], cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
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


def compare(servers: dict[str, Server], body: bytes, connections: int, rounds: int, requests: int) -> dict[str, Any]:
    """Requests a second and latencies of every server, asked in turn, and the scoring one over the others."""
    sent = request(body)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for number in range(rounds + 1):  # the first warms up and is not counted
        for name, server in servers.items():
            measured = load(server, sent, connections, requests)
            if number:
                taken[name].append(measured)
    summary: dict[str, Any] = {
        name: {key: round(statistics.median(one[key] for one in all_rounds), 4) for key in all_rounds[0]} for name, all_rounds in taken.items()
    }
    for name in [name for name in servers if name != "score"]:
        ratios = {key: [a[key] / b[key] for a, b in zip(taken["score"], taken[name], strict=True)] for key in taken[name][0]}
        summary[f"score / {name}"] = {
            key: {"median": round(statistics.median(values), 3), "lowest": round(min(values), 3), "highest": round(max(values), 3)}
            for key, values in ratios.items()
        }
    return summary


def request(body: bytes, path: str = "/v1/score?kind=factor_delta") -> bytes:
    """One request as the Python client sends it, on a connection that stays open."""
    head = {
        "Host": "127.0.0.1", "Accept-Encoding": "identity", "Content-Length": str(len(body)), "Content-Type": "application/octet-stream",
        "Content-Digest": content_digest(body),
    }  # fmt: skip
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def load(server: Server, sent: bytes, connections: int, requests: int) -> dict[str, float]:
    """Send a request again and again over some connections, each waiting for its answer."""
    seconds: list[float] = []
    threads = [threading.Thread(target=_ask, args=(server.port, sent, requests // connections, seconds)) for _ in range(connections)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - begun
    if len(seconds) != requests // connections * connections:
        raise RuntimeError("a request was not answered with status 200")
    ordered = sorted(1000 * second for second in seconds)
    return {"requests_per_s": len(seconds) / elapsed, "p50_ms": ordered[len(ordered) // 2], "p99_ms": ordered[int(len(ordered) * 0.99)]}


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
    got, needed = 0, -1
    while needed < 0 or got < needed:
        count = connection.recv_into(buffer[got:])
        if not count:
            return 0
        got += count
        if needed < 0:
            head, blank, _ = bytes(buffer[:got]).partition(b"\r\n\r\n")
            if blank:
                needed = len(head) + 4 + int(re.search(rb"(?i)content-length: (\d+)", head).group(1))  # type: ignore[union-attr]
    return int(bytes(buffer[9:12]))


def parts(body: bytes, probe: Probe) -> dict[str, float]:
    """Median milliseconds of the two parts of a scored request that an echo does not have, each alone and with warm caches."""
    scorer, question = Scorer(Settings({"paper": probe})), Question(("paper",), "factor_delta")
    tasks: dict[str, Callable[[], object]] = {"sha256": lambda: hashlib.sha256(body).digest(), "scoring": lambda: scorer(body, question)}
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(1000):
        for name, task in tasks.items():
            begun = time.perf_counter()
            task()
            taken[name].append(1000 * (time.perf_counter() - begun))
    return {name: round(statistics.median(values), 4) for name, values in taken.items()}


def memory_over_time(server: Server, body: bytes) -> dict[str, Any]:
    """Resident memory after the first thousand and after ten thousand requests, one in five of which is refused."""
    nan = body[:-4] + b"\xff\xff\xff\xff"
    refused = [request(body[:-4]), request(nan), request(body, "/v1/score?kind=weights"), request(body, "/nothing")]
    buffer, statuses, resident = memoryview(bytearray(1 << 20)), dict.fromkeys((200, 404, 422), 0), {}
    with _connected(server.port) as connection:
        for number in range(1, MEMORY_REQUESTS + 1):
            connection.sendall(refused[number // 5 % 4] if number % 5 == 0 else request(body))
            statuses[_status(connection, buffer)] += 1
            if number in (1000, MEMORY_REQUESTS):
                resident[number] = server.resident_mib()
    return {
        "resident_mib_after": resident, "grown_mib": round(resident[MEMORY_REQUESTS] - resident[1000], 1), "answers_by_status": statuses,
    }  # fmt: skip


if __name__ == "__main__":
    main()
