"""Who may ask: the token, the service's names, a browser's origin, the rate, and what is told."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from loraprobe.adapters.adapter import Adapter
from loraprobe.errors import BaseModelMismatch, DataError, ServiceError
from loraprobe.serve import Settings, create_app
from loraprobe.serve.slices import save_slice, save_whole
from tests.helpers import probes, serving

pytestmark = pytest.mark.enable_socket  # on the loopback interface only

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def guarded(
    files: serving.Files, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[serving.Service]:
    """One probe, no start, and a token."""
    options = ["--probe", f"mine={files.probes['paper']}", "--token-env", "THE_TOKEN", "--any-base"]
    with serving.running(
        tmp_path_factory.mktemp("log") / "log", *options, THE_TOKEN=TOKEN
    ) as running:
        yield running


def test_a_token_guards_scores_probes_and_metrics(guarded: serving.Service) -> None:
    body = save_whole(serving.delta())
    wrong = (
        "",
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        TOKEN,
        "Bearer ",
        f"Basic {TOKEN}",
        f"Bearer  {TOKEN}",
    )
    score, others = (
        ("POST", "/v1/score?kind=factor_delta", body, 200),
        {"/v1/probes": 200, "/metrics": 200, "/x": 404},
    )
    for method, path, sent, status in (
        score,
        *(("GET", path, None, status) for path, status in others.items()),
    ):
        for headers in ({}, *({"Authorization": value} for value in wrong)):
            answer = guarded.ask(method, path, sent, headers)
            assert (answer.status, answer.error) == (401, "Unauthorized"), (path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (
            guarded.ask(method, path, sent, {"Authorization": f"Bearer {TOKEN}"}).status == status
        )
    twice = guarded.raw(
        f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
        + b"Authorization: Bearer wrong\r\n\r\n"
    )
    assert twice is not None
    assert twice.error == "Unauthorized"  # somebody in front may have looked at the other one
    for path in ("/healthz", "/", "/openapi.json"):
        assert guarded.ask("GET", path).status == 200
    # the scheme's case does not count
    assert (
        guarded.ask("GET", "/v1/probes", None, {"Authorization": f"bearer {TOKEN}"}).status == 200
    )
    assert guarded.client(TOKEN).score(serving.delta())[0].probe == "mine"
    assert TOKEN not in json.dumps(guarded.lines())


def test_without_a_start_only_deltas_are_scored(guarded: serving.Service) -> None:
    client = guarded.client(TOKEN)
    with pytest.raises(
        DataError,
        match=(
            r"send the factor_delta itself \(\?kind=factor_delta\), or have the service started"
            r" with --base"
        ),
    ):
        client.score(serving.uploaded())
    [result] = client.score(serving.delta())
    wanted = serving.expected("paper", serving.delta(), "config", "base_model", "start")
    assert result == replace(wanted, probe="mine")


def test_any_base_scores_under_another_name(
    guarded: serving.Service, service: serving.Service
) -> None:
    renamed = Adapter(dict(serving.delta()), kind="factor_delta", base_model="org/another-name")
    [result] = guarded.client(TOKEN).score(renamed)
    assert result.score == serving.expected("paper", serving.delta()).score
    with pytest.raises(BaseModelMismatch):
        service.client().score(renamed, "paper")


def command(*options: str, **environment: str) -> tuple[int, str]:
    """Exit code and last line of stderr of a command that is meant to fail before it serves."""
    from loraprobe.cli.commands import app

    done = CliRunner().invoke(app, ["serve", *options], env=environment)
    return done.exit_code, done.stderr.strip()


def test_what_cannot_be_served_safely_is_refused_before_anything_listens(
    files: serving.Files,
) -> None:
    paper = ["--probe", str(files.probes["paper"])]
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        code, said = command(*paper, "--host", host)
        assert code == 2, host
        assert "name a token with --token-env, or say --insecure" in said
    refused = {
        "is not set or empty": [*paper, "--token-env", "NOT_THERE"],
        "visible characters": [*paper, "--token-env", "SPACED"],
        "two probes named 'paper'": [*paper, *paper],
        "got the probe name": ["--probe", f"a/b={files.probes['paper']}"],
        "expected the folder of a probe": ["--probe", str(files.start)],
        "below max_body": [*paper, "--max-mib", "2", "--memory-mib", "1"],
        "got timeout 0": [*paper, "--timeout", "0"],
        "Check the path": [*paper, "--base", "/nowhere/at/all"],
    }
    for message, options in refused.items():
        code, said = command(*options, SPACED="two words")
        assert (code, message in said) == (2, True), (message, said)


def test_an_address_that_is_taken_is_one_line(files: serving.Files) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = command(
            "--probe", str(files.probes["paper"]), "--port", str(taken.getsockname()[1])
        )
    assert code == 2
    assert "Address already in use" in said
    assert "Traceback" not in said


# --- browsers ---


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8080", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("evil.example", 421),
        ("localhost.evil.example:8080", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 400),
        ("[::1", 400),
    ],
)
def test_a_name_that_somebody_else_let_point_here_is_refused(
    service: serving.Service, host: str, status: int
) -> None:
    for path in ("/", "/healthz", "/v1/probes"):
        answer = service.ask("GET", path, headers={"Host": host})
        assert answer.status == status
    twice = service.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
    assert twice is not None
    assert twice.error == "BadRequest"


NAVIGATION = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "cross-site"}


@pytest.mark.parametrize(
    ("method", "headers", "is_own"),
    [
        ("POST", {"Sec-Fetch-Site": "same-origin"}, True),
        ("POST", {"Sec-Fetch-Site": "none"}, True),
        ("POST", {"Origin": "http://{host}", "Sec-Fetch-Site": "same-origin"}, True),
        ("POST", {"Origin": "https://{host}"}, True),  # behind a proxy that speaks TLS
        ("POST", {"Origin": "http://evil.example"}, False),
        ("POST", {"Origin": "null"}, False),
        ("POST", {"Origin": "http://localhost:3000"}, False),
        ("POST", {"Sec-Fetch-Site": "cross-site"}, False),
        ("POST", {"Sec-Fetch-Site": "same-site"}, False),
        ("POST", NAVIGATION, False),
        ("GET", {"Sec-Fetch-Site": "cross-site"}, False),
        ("GET", {"Origin": "http://evil.example"}, False),
        ("GET", NAVIGATION, True),  # somebody followed a link
    ],
)
def test_a_page_of_another_origin_may_not_ask(
    service: serving.Service, method: str, headers: dict[str, str], is_own: bool
) -> None:
    host = f"127.0.0.1:{service.port}"
    path = "/v1/score?probe=paper" if method == "POST" else "/v1/probes"
    body = save_whole(serving.uploaded()) if method == "POST" else None
    filled = {name: value.format(host=host) for name, value in headers.items()}
    answer = service.ask(method, path, body, filled)
    assert answer.status == (200 if is_own else 403)
    if not is_own:
        assert answer.error == "ForeignOrigin"


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"],
)
def test_a_body_needs_the_type_that_no_form_can_send(service: serving.Service, kind: str) -> None:
    body = save_whole(serving.uploaded())
    head = f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    said = f"Content-Type: {kind}\r\n" if kind else ""
    answer = service.raw(f"{head}{said}\r\n".encode() + body)
    assert answer is not None
    assert (answer.status, answer.error) == (415, "UnsupportedMediaType")
    preflight = service.ask(
        "OPTIONS", "/v1/score", headers={"Access-Control-Request-Method": "POST"}
    )
    assert preflight.status == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]


# --- how often, and how much is told ---


def paper_app(**settings: object) -> object:
    return create_app(Settings({"paper": probes.tiny_probe("linear", "paper")}, **settings))


def test_an_address_has_so_many_scores_and_no_more() -> None:
    app = paper_app(rate="3/hour")
    path = "/v1/score?kind=factor_delta"
    body = save_whole(serving.delta())

    async def ask() -> list[int]:
        answers = [await serving.call(app, path, body) for _ in range(4)]
        assert answers[-1].body["error"]["type"] == "RateLimited"
        others = [
            await serving.call(app, path, body, client="127.0.0.2"),
            await serving.call(app, "/healthz", method="GET"),
        ]
        return [answer.status for answer in (*answers, *others)]

    assert asyncio.run(ask()) == [200, 200, 200, 429, 200, 200]
    with pytest.raises(ServiceError, match="got the rate 'often'"):
        paper_app(rate="often")


@pytest.mark.parametrize("detail", ["scores", "rounded", "verdicts"])
def test_no_more_is_told_of_a_score_than_was_settled(detail: str) -> None:
    app = paper_app(detail=detail)
    exact = serving.expected("paper", serving.delta())
    answer = asyncio.run(
        serving.call(app, "/v1/score?kind=factor_delta", save_whole(serving.delta()))
    )
    [result] = answer.body["results"]
    told = {"scores": exact.score, "rounded": round(exact.score or 0, 1), "verdicts": None}[detail]
    assert (result["score"], result["verdict"]) == (told, exact.verdict)
    [facts] = asyncio.run(serving.call(app, "/v1/probes", method="GET")).body["probes"]
    cuts = (result["threshold"], facts["threshold"], facts["benign_below"])
    assert cuts == ((0.8, 0.8, None) if detail == "scores" else (None, None, None))


@pytest.mark.parametrize("detail", ["scores", "rounded"])
def test_exact_scores_give_a_linear_probe_away_in_one_query_a_feature_and_tenths_do_not(
    detail: str,
) -> None:
    """What docs/serve.md says of private probes: each score is one equation for the weights."""
    probe = probes.tiny_probe("linear", "paper")
    app = paper_app(detail=detail)
    good = save_slice(probe.featurizer, serving.delta())
    size = probe.featurizer.num_features

    def logit(unit: np.ndarray) -> float:
        body = good[: -4 * size] + unit.astype(np.float32).tobytes()
        answer = asyncio.run(serving.call(app, "/v1/score?kind=factor_delta", body))
        score = min(max(answer.body["results"][0]["score"], 1e-9), 1 - 1e-9)
        return math.log(score / (1 - score))

    units = np.eye(size)
    constant = (logit(units[0]) + logit(-units[0])) / 2
    stolen = np.array([logit(unit) for unit in units]) - constant
    for seed in range(3):
        [row] = probe.featurizer([serving.delta(seed)])
        [score] = probe([serving.delta(seed)])
        guess = 1 / (1 + math.exp(-(float(stolen @ row) + constant)))
        assert (abs(guess - score) < 1e-3) == (detail == "scores")
