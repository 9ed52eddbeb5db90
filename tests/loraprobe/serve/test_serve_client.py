"""The Python client: whatever it is given goes over as what it is, and no other server's answer is
believed.
"""

from __future__ import annotations

import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta, weight_delta
from loraprobe.adapters.load import save_adapter
from loraprobe.errors import KindMismatch, LayoutMismatch, ServiceError
from loraprobe.serve import ScoringClient
from loraprobe.serve.slices import save_whole
from loraprobe.serve.upload import content_digest
from tests.helpers import make, serving

pytestmark = pytest.mark.enable_socket  # on the loopback interface only


@pytest.fixture
def client(service: serving.Service) -> ScoringClient:
    return service.client()


def test_the_client_scores_folders_adapters_and_deltas(
    client: ScoringClient, tmp_path: Path
) -> None:
    adapter = serving.uploaded(5)
    wanted = [serving.of_upload(name, adapter) for name in serving.served_probes()]
    folder = save_adapter(adapter, tmp_path / "adapter")
    assert client.score(folder) == client.score(str(folder)) == client.score(adapter) == wanted
    assert client.score(folder / "adapter_model.safetensors", "paper") == wanted[:1]
    delta = serving.delta(5)
    a_slice = ("config", "other_modules", "start")
    for name in ("paper", "all_b"):
        assert client.score(delta, name) == [serving.expected(name, delta, *a_slice)]
    assert client.score(delta, "spectral") == [serving.expected("spectral", delta)]
    since_fresh = factor_delta(adapter, None)
    wanted = [serving.expected("paper", since_fresh, *a_slice)]
    assert client.score(since_fresh, "paper") == wanted
    assert [probe["name"] for probe in client.probes()] == list(serving.served_probes())


def test_scalings_that_differ_by_module_survive_the_way(client: ScoringClient) -> None:
    odd = make.with_pairs(
        serving.uploaded(), {make.module("v_proj", 1): make.pair(6, 12, 2, scaling=0.5)}
    )
    with pytest.raises(
        LayoutMismatch, match=re.escape(f"{make.module('v_proj', 1)}: got scaling 0.5")
    ):
        client.score(odd, "of_weights")


def test_the_client_refuses_to_cut_a_slice_of_an_adapter_that_changes_more(
    client: ScoringClient,
) -> None:
    larger = make.with_pairs(serving.delta(), {"model.layers.0.mlp.up_proj": make.pair(r=2)})
    with pytest.raises(
        LayoutMismatch, match="changes 1 modules that the training adapters did not"
    ):
        client.score(larger, "paper")
    smaller = Adapter(
        {name: pair for name, pair in serving.delta().items() if ".0." not in name},
        kind="factor_delta",
    )
    with pytest.raises(LayoutMismatch, match="lacks 2 that the probe 'paper' reads"):
        client.score(smaller, "paper")


def test_the_client_raises_what_the_service_says(client: ScoringClient) -> None:
    with pytest.raises(KindMismatch, match="probe 'paper'"):
        client.score(weight_delta(serving.uploaded(), serving.start()))
    with pytest.raises(
        ServiceError, match="serves all_b, of_weights, paper, spectral; got the probe 'nope'"
    ):
        client.score(serving.delta(), "nope")
    with pytest.raises(ServiceError) as unknown:
        client.score(serving.uploaded(), "nope")
    assert (unknown.value.type, unknown.value.status) == ("UnknownProbe", 422)
    with pytest.raises(ServiceError) as large:
        # 42 MB and a limit of 1 MiB
        client.score(make.adapter(r=64, dims={"q_proj": (40_960, 40_960)}))
    assert (large.value.type, large.value.status) == ("BodyTooLarge", 413)


def test_the_client_says_where_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        ServiceError, match=rf"no answer from http://127.0.0.1:{port} \(ConnectionRefusedError"
    ):
        ScoringClient(f"http://127.0.0.1:{port}").score(serving.uploaded())
    for url in (
        "127.0.0.1:8080",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://user@host",
        "http://host/?a=b",
        "http://[::1",
    ):
        with pytest.raises(ServiceError, match="got the address"):
            ScoringClient(url)
    with pytest.raises(ServiceError, match="got a token") as caught:
        ScoringClient("http://host", "secret\n")  # as a file holds it
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "another form"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", "no JSON object"),
        (
            b'HTTP/1.1 200 OK\r\ncontent-length: 29\r\n\r\n{"results":[],"sha256":"abcd"}',
            "no JSON object",
        ),
        (
            b'HTTP/1.1 200 OK\r\ncontent-length: 30\r\n\r\n{"results":[],"sha256":"abcd"}',
            "not the one that was sent",
        ),
        (
            b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
            "status 302 and no typed error",
        ),
        (
            b"HTTP/1.1 422 X\r\ncontent-length: 44\r\n\r\n"
            b'{"error":{"type":"SystemExit","message":"x"}',
            "no typed error",
        ),
        (
            (
                b"HTTP/1.1 422 X\r\ncontent-length:"
                b' 45\r\n\r\n{"error":{"type":"SystemExit","message":"x"}}'
            ),
            "SystemExit: x",
        ),
        (b"nonsense\r\n\r\n", "no answer"),
        (b"", "no answer"),
    ],
)
def test_the_client_believes_no_other_server(reply: bytes, message: str) -> None:
    whole = save_whole(serving.uploaded())
    seen = bytearray()

    def answer(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            while whole[-100:] not in seen:
                seen.extend(connection.recv(1 << 16))
            connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        done = pool.submit(answer, listening)
        with pytest.raises(ServiceError, match=message):
            ScoringClient(
                f"http://127.0.0.1:{listening.getsockname()[1]}", "secret", timeout=20
            ).score(serving.uploaded())
        done.result(20)
    head, _, body = bytes(seen).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v1/score?kind=weights HTTP/1.1"
    assert f"Content-Digest: {content_digest(whole)}" in lines
    assert "Authorization: Bearer secret" in lines
    assert body == whole
