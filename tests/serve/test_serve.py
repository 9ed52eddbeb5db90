"""The scoring service as its users meet it.

A process, its answers, its Python client, its metrics and log, its token, its end.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from typer.testing import CliRunner

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import weight_delta
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import BaseModelMismatch, DataError, LoraprobeError
from loraprobe.serve.slices import save_slice, save_whole
from loraprobe.serve.upload import content_digest
from tests.helpers import make, probes, serving

pytestmark = (
    pytest.mark.enable_socket
)  # on the loopback interface only: to a server that the test starts

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> serving.Files:
    return serving.written(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def service(
    files: serving.Files, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[serving.Service]:
    """All the probes, a start, and bodies of at most 1 MiB."""
    with serving.running(
        tmp_path_factory.mktemp("log") / "log", *files.options(), "--max-mib", "1"
    ) as running:
        yield running


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


# --- answers
# ------------------------------------------------------------------------------------------------------------


def test_a_trained_adapter_gets_the_verdict_of_every_probe_that_the_library_gives(
    service: serving.Service,
) -> None:
    scores = set()
    for seed, malicious in ((0, True), (1, False), (2, True)):
        adapter = serving.uploaded(seed, malicious)
        body = safetensors.torch.save(make.tensors(adapter), {"format": "pt"})  # as PEFT writes it
        answer = service.score(body, f"alpha={serving.ALPHA}&base_model={probes.BASE}")
        assert answer.status == 200, answer
        assert set(answer.body) == {"results", "sha256", "seconds"}
        assert answer.body["results"] == [
            asdict(serving.of_upload(name, adapter)) for name in serving.served_probes()
        ]
        assert answer.body["sha256"] == hashlib.sha256(body).hexdigest()
        assert 0 < answer.body["seconds"] < 30
        scores |= {result["score"] for result in answer.body["results"]}
    assert len(scores) == 12  # the verdicts are about the adapter and the probe


@pytest.mark.parametrize("name", ["paper", "all_b"])
def test_a_slice_gets_the_verdict_of_the_whole_delta(service: serving.Service, name: str) -> None:
    delta = serving.delta(3)
    body = save_slice(serving.served_probes()[name].featurizer, delta)
    answer = service.score(body, f"probe={name}&kind=factor_delta")
    assert answer.body["results"] == [asdict(serving.expected(name, delta))]
    assert (
        service.score(body, f"probe={name}").error == "KindMismatch"
    )  # the request says weights, which is the default
    assert service.score(body, "probe=spectral&kind=factor_delta").error == "RecipeError"
    assert service.score(body, "kind=factor_delta").error in (
        "LayoutMismatch",
        "RecipeError",
    )  # not the slice of all of them


def test_one_probe_that_cannot_score_fails_the_request_and_is_named(
    service: serving.Service,
) -> None:
    answer = service.score(save_whole(serving.delta()), "kind=factor_delta")
    assert (answer.status, answer.error) == (422, "KindMismatch")
    assert "probe 'of_weights': " in answer.body["error"]["message"]


def test_a_blank_adapter_is_inconclusive_with_a_reason(service: serving.Service) -> None:
    [result] = service.score(save_whole(serving.start()), "probe=paper").body["results"]
    assert (result["verdict"], result["reason"]) == (
        "inconclusive",
        "nothing that the probe reads has changed",
    )


def test_spectra_are_those_of_the_change_since_the_start(service: serving.Service) -> None:
    adapter = serving.uploaded()
    shown = service.score(save_whole(adapter), "probe=paper&spectra=true").body["spectra"]
    assert (shown["of"], shown["modules"]) == ("weight_delta", 4)
    change = weight_delta(adapter, serving.start())
    assert [row["module"] for row in shown["rows"]] == list(change)
    for row in shown["rows"]:
        assert row["matrix"] == "BA"
        assert row["values"] == pytest.approx(change[row["module"]].svdvals().tolist(), rel=1e-5)
    weights = service.score(save_whole(adapter), "probe=of_weights&spectra=true").body["spectra"]
    assert weights["of"] == "weights"  # no delta was asked for
    assert weights["rows"][0]["values"] == pytest.approx(
        adapter[weights["rows"][0]["module"]].svdvals().tolist(), rel=1e-5
    )


def test_spectra_of_a_slice_are_those_of_the_factors_it_holds(service: serving.Service) -> None:
    delta = serving.delta()
    body = save_slice(serving.served_probes()["paper"].featurizer, delta)
    shown = service.score(body, "probe=paper&kind=factor_delta&spectra=true").body["spectra"]
    assert [(row["module"], row["matrix"]) for row in shown["rows"]] == [
        (make.module("q_proj"), "B"),
        (make.module("v_proj"), "B"),
    ]
    assert shown["rows"][0]["values"] == pytest.approx(
        np.linalg.svd(delta[make.module("q_proj")].B, compute_uv=False).tolist(), rel=1e-5
    )


def test_the_probes_are_described_with_the_slices_they_read(service: serving.Service) -> None:
    described = {probe["name"]: probe for probe in service.ask("GET", "/v1/probes").body["probes"]}
    assert list(described) == list(serving.served_probes())
    paper = described["paper"]
    assert (paper["kind"], paper["base_model"], paper["threshold"], paper["head"]) == (
        "factor_delta",
        probes.BASE,
        0.8,
        "linear",
    )
    assert paper["slice"] == [
        [make.module(name), "B", f"base_model.model.{make.module(name)}.lora_B.weight"]
        for name in ("q_proj", "v_proj")
    ]
    assert described["spectral"]["slice"] is None
    assert described["of_weights"]["kind"] == "weights"


def test_the_documentation_names_every_parameter_answer_and_error(service: serving.Service) -> None:
    document = service.ask("GET", "/openapi.json").body
    assert set(document["paths"]) == {"/v1/score", "/v1/probes", "/healthz", "/metrics"}
    route = document["paths"]["/v1/score"]["post"]
    assert [one["name"] for one in route["parameters"]] == [
        "probe",
        "kind",
        "alpha",
        "base_model",
        "spectra",
        "Content-Digest",
    ]
    assert set(route["responses"]) == {
        "200",
        "400",
        "401",
        "408",
        "413",
        "415",
        "422",
        "431",
        "500",
        "503",
    }
    schema = route["responses"]["200"]["content"]["application/json"]["schema"]["properties"]
    answer = service.score(save_whole(serving.uploaded()), "spectra=true").body
    assert set(schema) == set(answer)
    assert set(schema["results"]["items"]["properties"]) == set(answer["results"][0])
    assert set(schema["spectra"]["properties"]) == set(answer["spectra"])
    assert list(route["requestBody"]["content"]) == ["application/octet-stream"]


# --- refusals
# -----------------------------------------------------------------------------------------------------------

GOOD = f"alpha={serving.ALPHA}&base_model={probes.BASE}"

QUERIES = {
    "probe=nope": "UnknownProbe",
    "probe=": "UnknownProbe",
    "probes=paper": "QueryError",
    "probe=paper&probe=paper": "QueryError",
    "probe": "QueryError",
    "kind=delta": "QueryError",
    "kind=factor_delta": "KindMismatch",  # the file says weights
    "kind=weight_delta": "KindMismatch",
    "alpha=4": "AdapterFormatError",  # the file holds its scalings
    "alpha=0": "QueryError",
    "alpha=nan": "QueryError",
    "alpha=x": "QueryError",
    "spectra=yes": "QueryError",
    "base_model=": "QueryError",
    "base_model=org%2Fother": "BaseModelMismatch",
    "base_model=%0A": "QueryError",
    "base_model=%ff": "QueryError",
    "&": "QueryError",
    "&".join(f"p{number}=1" for number in range(30)): "QueryError",
}


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_that_is_not_understood_is_refused(service: serving.Service, query: str) -> None:
    answer = service.score(save_whole(serving.uploaded()), query)
    assert (answer.status, answer.error) == (422, QUERIES[query])


def nan(adapter: Adapter) -> Adapter:
    """The adapter with a B that is no number."""
    return make.with_pairs(
        adapter,
        {
            name: LoRAPair(pair.A, float("nan") * pair.B, pair.scaling)
            for name, pair in adapter.items()
        },
    )


BODIES: dict[str, tuple[Any, str]] = {
    "NaN": (lambda: nan(serving.uploaded()), "NonFiniteError"),
    "another rank": (lambda: make.adapter(r=3, base_model=probes.BASE), "LayoutMismatch"),
    "another model": (
        lambda: make.adapter(
            r=2, dims={"q_proj": (20, 24), "v_proj": (6, 24)}, base_model=probes.BASE
        ),
        "LayoutMismatch",
    ),
    "another base": (lambda: make.adapter(r=2, base_model="org/other"), "BaseModelMismatch"),
    "a layer more": (lambda: make.adapter(r=2, layers=3, base_model=probes.BASE), "LayoutMismatch"),
    "a layer less": (lambda: make.adapter(r=2, layers=1, base_model=probes.BASE), "LayoutMismatch"),
    "another scaling": (
        lambda: make.adapter(r=2, scaling=1.0, base_model=probes.BASE),
        "LayoutMismatch",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_an_adapter_that_cannot_be_scored_is_an_error_of_the_librarys_type(
    service: serving.Service, name: str
) -> None:
    make_adapter, error = BODIES[name]
    answer = service.score(save_whole(make_adapter()))
    assert (answer.status, answer.error) == (422, error)
    with pytest.raises(LoraprobeError) as caught:
        service.client().score(make_adapter())
    assert type(caught.value).__name__ == error
    assert str(caught.value) == answer.body["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/v1/scores", 404, "NotFound"),
        ("GET", "/v1/score/", 404, "NotFound"),
        ("POST", "//v1/score", 404, "NotFound"),
        ("GET", "/docs", 404, "NotFound"),
        ("GET", "/v1/score", 405, "MethodNotAllowed"),
        ("DELETE", "/healthz", 405, "MethodNotAllowed"),
        ("POST", "/metrics", 405, "MethodNotAllowed"),
        ("BREW", "/v1/score", 405, "MethodNotAllowed"),
    ],
)
def test_a_path_or_method_that_is_not_there_is_a_typed_error(
    service: serving.Service, method: str, path: str, status: int, error: str
) -> None:
    answer = service.ask(method, path)
    assert (answer.status, answer.error) == (status, error)
    assert ("allow" in answer.headers) == (status == 405)


def test_a_digest_must_be_that_of_the_body(service: serving.Service) -> None:
    body = save_whole(serving.uploaded())
    right = content_digest(body)
    assert service.score(body, content_digest=right).status == 200
    assert service.score(body, content_digest=f"sha-512=:AAAA:, {right}").status == 200
    wrong = service.score(body, content_digest=content_digest(body + b"x"))
    assert (wrong.status, wrong.error) == (422, "DigestMismatch")
    assert wrong.body["error"]["got"] == hashlib.sha256(body).hexdigest()
    for bad in (
        "",
        "sha-256=:AAAA:",
        "sha-256=abc",
        "md5=:AAAA:",
        right[:-1],
        f"{right}, {right}",
        right.replace("=:", "=:*", 1),
        f"{right};",
    ):
        answer = service.score(body, content_digest=bad)
        assert (answer.status, answer.error) == (400, "BadDigest"), bad


# --- token and address
# --------------------------------------------------------------------------------------------------


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
        f"GET /metrics HTTP/1.1\r\nHost: s\r\nAuthorization: Bearer {TOKEN}\r\nAuthorization:"
        " Bearer wrong\r\n\r\n".encode()
    )
    assert twice is not None
    assert twice.error == "Unauthorized"  # somebody in front may have looked at the other one
    for path in ("/healthz", "/", "/openapi.json"):
        assert guarded.ask("GET", path).status == 200
    assert (
        guarded.ask("GET", "/v1/probes", None, {"Authorization": f"bearer {TOKEN}"}).status == 200
    )  # the scheme's case does not count
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
    assert result == replace(serving.expected("paper", serving.delta()), probe="mine")


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


# --- metrics, log, end
# --------------------------------------------------------------------------------------------------


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
    assert (after["loraprobe_in_flight"], after["loraprobe_held_bytes"]) == (
        1,
        0,
    )  # this very request
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
    assert set(scored) == {
        "time",
        "level",
        "event",
        "method",
        "route",
        "status",
        "seconds",
        "bytes",
    }
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
    assert "http" not in text.replace(
        "http://www.w3.org/2000/svg", ""
    )  # nothing is fetched from anywhere
    assert " style=" not in text
    assert "innerHTML" not in text


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_told_to_stop_it_finishes_what_it_began_refuses_the_rest_and_exits_with_0(
    files: serving.Files, tmp_path: Path, signal: str
) -> None:
    import signal as signals

    body = save_whole(serving.uploaded())
    head = (
        "POST /v1/score?probe=paper HTTP/1.1\r\nHost: x\r\nContent-Type:"
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
        assert answer.body["results"] == [asdict(serving.of_upload("paper", serving.uploaded()))]
        assert service.process.wait(20) == 0
    assert all(line["level"] == "info" for line in service.lines())


def test_answers_are_not_held_back_until_the_client_acknowledges(service: serving.Service) -> None:
    """The head and the body of an answer in two segments would cost 40 ms a request, the time
    after which a client acknowledges the first.
    """
    with service.connect() as connection:
        begun = time.monotonic()
        for _ in range(60):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: service\r\n\r\n")
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
