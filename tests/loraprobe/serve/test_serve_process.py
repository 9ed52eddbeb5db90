"""The service as a process: its metrics, its log, its page's policy, and its end."""

from __future__ import annotations

import json
import signal as signals
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraprobe.serve.slices import save_whole
from tests.helpers import probes, serving

pytestmark = pytest.mark.enable_socket  # on the loopback interface only


def measured(service: serving.Service, token: str = "") -> dict[str, float]:
    text = service.ask(
        "GET", "/metrics", headers={"Authorization": f"Bearer {token}"}
    ).body.decode()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }


def test_metrics_count_requests_verdicts_bytes_and_errors(service: serving.Service) -> None:
    before, body = measured(service), save_whole(serving.uploaded())
    verdict = serving.of_upload("paper", serving.uploaded()).verdict
    for query in ("probe=paper", "probe=paper", "probe=nope"):
        service.score(body, query)
    service.ask("GET", "/secret/path/of/a/client")
    after = measured(service)
    grown = {
        name: value - before.get(name, 0)
        for name, value in after.items()
        if name.startswith("loraprobe") and value != before.get(name, 0)
    }
    wanted = {
        'loraprobe_requests_total{route="/v1/score",status="200"}': 2,
        'loraprobe_requests_total{route="/v1/score",status="422"}': 1,
        'loraprobe_requests_total{route="other",status="404"}': 1,
        'loraprobe_errors_total{type="UnknownProbe"}': 1,
        'loraprobe_errors_total{type="NotFound"}': 1,
        f'loraprobe_verdicts_total{{probe="paper",verdict="{verdict}"}}': 2,
        "loraprobe_scoring_seconds_count": 2,
        "loraprobe_body_bytes_count": 2,
        "loraprobe_body_bytes_sum": 2 * len(body),
    }
    assert {name: grown.get(name) for name in wanted} == wanted
    # this very request
    assert (after["loraprobe_in_flight"], after["loraprobe_held_bytes"]) == (1, 0)
    assert after["process_resident_memory_bytes"] > 0
    assert "secret" not in str(after)


def test_every_request_is_one_line_of_json_that_tells_nothing_of_its_content(
    service: serving.Service,
) -> None:
    count = len(service.answered())
    body = save_whole(serving.uploaded())
    service.score(body, f"probe=paper&base_model={probes.BASE}")
    service.ask("GET", "/private-path?private=1", headers={"X-Private": "private"})
    [scored, missed] = service.answered()[count:]
    assert set(scored) == {*"time level event method route status seconds bytes".split()}
    assert [scored[name] for name in ("event", "method", "route", "status", "bytes")] == [
        "request",
        "POST",
        "/v1/score",
        200,
        len(body),
    ]
    assert [missed[name] for name in ("method", "route", "status", "bytes", "error")] == [
        "GET",
        "other",
        404,
        0,
        "NotFound",
    ]
    for word in ("private", probes.BASE, "q_proj"):
        assert word not in json.dumps([scored, missed])


def test_the_page_allows_nothing_but_itself(service: serving.Service) -> None:
    answer = service.ask("GET", "/")
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert (
        policy["default-src"]
        == policy["base-uri"]
        == policy["form-action"]
        == policy["frame-ancestors"]
        == "'none'"
    )
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-")
    assert "unsafe" not in str(policy)
    text = answer.body.decode()
    # nothing is fetched from anywhere
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert " style=" not in text
    assert "innerHTML" not in text


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_told_to_stop_it_finishes_what_it_began_refuses_the_rest_and_exits_with_0(
    files: serving.Files, tmp_path: Path, signal: str
) -> None:
    body = save_whole(serving.uploaded())
    head = (
        "POST /v1/score?probe=paper HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
        f" application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    )
    with (
        serving.running(tmp_path / "log", *files.options("paper")) as service,
        service.connect() as begun,
        service.connect() as idle,
    ):
        begun.sendall(head + body[:1000])
        deadline = time.monotonic() + 20
        while measured(service)["loraprobe_held_bytes"] < 1000:
            assert time.monotonic() < deadline
        service.process.send_signal(getattr(signals, signal))
        assert idle.recv(1) == b""  # nothing was asked on it
        with pytest.raises(ConnectionRefusedError):
            service.connect().close()
        assert service.process.poll() is None
        begun.sendall(body[1000:])
        answer = serving.read_answer(begun)
        assert answer is not None
        assert answer.body["results"] == [
            serving.shown(serving.of_upload("paper", serving.uploaded()))
        ]
        assert service.process.wait(20) == 0
    assert all(line["level"] == "info" for line in service.lines())


def test_answers_are_not_held_back_until_the_client_acknowledges(service: serving.Service) -> None:
    """The head and the body of an answer in two segments would cost 40 ms a request, the time
    after which a client acknowledges the first.
    """
    with service.connect() as connection:
        begun = time.monotonic()
        for _ in range(60):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert serving.read_answer(connection) is not None
        assert time.monotonic() - begun < 60 * 0.03


def test_requests_beside_each_other_get_their_own_answers(service: serving.Service) -> None:
    adapters = [serving.uploaded(seed, bool(seed % 2)) for seed in range(8)]
    wanted = [serving.of_upload("all_b", adapter) for adapter in adapters]
    client = service.client()
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda number: client.score(adapters[number % 8], "all_b"), range(80))
        )
    assert answers == [[wanted[number % 8]] for number in range(80)]
    assert len({result.score for result in wanted}) == 8
