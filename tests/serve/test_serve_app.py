"""The scoring service as an ASGI application, without a connection.

What happens inside while it scores, fails or is short of memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import DataError, MissingExtra, ServiceError
from loraprobe.serve import create_app
from loraprobe.serve.answers import Refusal
from loraprobe.serve.logs import JsonLines
from loraprobe.serve.openapi import SCORE
from loraprobe.serve.scoring import (
    MAX_RANK,
    MAX_SPECTRA,
    MAX_VALUES,
    PARAMETERS,
    Scorer,
    parse_question,
)
from loraprobe.serve.settings import Settings
from loraprobe.serve.slices import save_whole
from loraprobe.serve.upload import Held
from tests.helpers import make, probes, serving


class Response(NamedTuple):
    status: int
    body: Any


async def ask(
    app: Any,
    path: str,
    body: bytes = b"",
    method: str = "POST",
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> Response:
    """One request; the body comes in two parts."""
    path, _, query = path.partition("?")
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return (
            {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            if parts
            else {"type": "http.disconnect"}
        )

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "headers": [(b"host", b"x"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    await app(scope, receive, send)
    text = b"".join(message.get("body", b"") for message in sent[1:])
    return Response(sent[0]["status"], json.loads(text))


def paper(**options: Any) -> Settings:
    """One probe, and a start."""
    return Settings({"paper": probes.tiny_probe("linear", "paper")}, serving.start(), **options)


def body() -> bytes:
    return save_whole(serving.uploaded())


# --- beside each other
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score?spectra=true"])
def test_other_requests_are_answered_while_a_large_body_is_scored(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, finish = threading.Event(), threading.Event()
    score = Scorer.__call__

    def slow(self: Scorer, *given: Any) -> Any:
        entered.set()
        assert finish.wait(20)
        return score(self, *given)

    async def both() -> tuple[Response, Response]:
        app = create_app(
            paper(inline=10 if path == "/v1/score" else 1 << 20)
        )  # spectra take a thread whatever the size
        scoring = asyncio.create_task(ask(app, path, body()))
        assert await asyncio.to_thread(entered.wait, 20)
        health = await ask(app, "/healthz", method="GET")
        assert not scoring.done()
        finish.set()
        return health, await scoring

    monkeypatch.setattr(Scorer, "__call__", slow)
    health, scored = asyncio.run(both())
    assert health == Response(200, {"status": "ok"})
    assert scored.body["results"] == [vars(serving.of_upload("paper", serving.uploaded()))]


def test_a_small_body_is_scored_where_it_came_in(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    score = Scorer.__call__
    monkeypatch.setattr(
        Scorer,
        "__call__",
        lambda self, *given: seen.append(threading.current_thread().name) or score(self, *given),
    )
    for inline in (1 << 18, 1):
        assert asyncio.run(ask(create_app(paper(inline=inline)), "/v1/score", body())).status == 200
    assert seen == ["MainThread", "scoring_0"]


def test_what_is_held_is_counted_while_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    data, score, answers = body(), Scorer.__call__, []

    async def run() -> None:
        app = create_app(paper(max_body=len(data), max_held=len(data) + 100, inline=1))
        entered, finish = threading.Event(), threading.Event()
        monkeypatch.setattr(
            Scorer,
            "__call__",
            lambda self, *given: entered.set() or (finish.wait(20) and score(self, *given)),
        )
        first = asyncio.create_task(ask(app, "/v1/score", data))
        assert await asyncio.to_thread(entered.wait, 20)
        answers.append(
            await ask(app, "/v1/score", data)
        )  # no room beside the one that is being scored
        finish.set()
        answers.extend([await first, await ask(app, "/v1/score", data)])

    asyncio.run(run())
    assert [answer.status for answer in answers] == [503, 200, 200]
    assert answers[0].body["error"]["type"] == "Overloaded"


def test_held_bytes_are_given_back_whatever_happens() -> None:
    held = Held(10)
    held.take(6)
    with pytest.raises(Refusal) as caught:
        held.take(5)
    assert (caught.value.status, caught.value.headers, held.bytes) == (503, {"Retry-After": "1"}, 6)
    held.give_back(6)
    held.take(10)


# --- failures
# -----------------------------------------------------------------------------------------------------------


def test_an_error_of_the_service_itself_is_typed_and_tells_nothing_but_to_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: Scorer, *given: Any) -> Any:
        raise ZeroDivisionError("the inner secret")

    async def run() -> Response:
        answer: list[Response] = []
        with pytest.raises(ZeroDivisionError):  # goes on to the server, which logs it
            answer.append(await ask_through(create_app(paper()), answer))
        return answer[0]

    async def ask_through(app: Any, answer: list[Response]) -> Response:
        """`ask`, keeping the answer of an application that raises behind it."""
        messages: list[dict[str, Any]] = []

        async def kept(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
            async def both(message: dict[str, Any]) -> None:
                messages.append(message)
                await send(message)

            try:
                await app(scope, receive, both)
            finally:
                answer.append(Response(messages[0]["status"], json.loads(messages[1]["body"])))

        return await ask(kept, "/v1/score", body())

    monkeypatch.setattr(Scorer, "__call__", fail)
    status, said = asyncio.run(run())
    assert (status, said["error"]["type"]) == (500, "InternalError")
    assert "secret" not in json.dumps(said)
    assert "Traceback" not in json.dumps(said)


def test_a_log_line_is_one_line_of_json_even_of_a_traceback() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.LogRecord(
            "uvicorn.error", logging.ERROR, "", 0, "Exception in\n%s", ("app",), sys.exc_info()
        )
    line = JsonLines().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert (said["level"], said["event"]) == ("error", "Exception in\napp")
    assert said["exception"].startswith("Traceback")


@pytest.mark.parametrize("module", ["fastapi", "prometheus_client"])
def test_a_missing_extra_says_how_to_install_it(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"pip install 'loraprobe\[serve\]'"):
        create_app(paper())


def test_a_probe_whose_library_is_missing_is_found_out_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loraprobe.heads import XGBoostHead

    probe = probes.tiny_probe("xgboost")
    fresh = Settings(
        {
            "trees": type(probe)(
                probe.featurizer,
                XGBoostHead.from_json(probe.head.to_json(), probe.head.num_features),
            )
        }
    )
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(MissingExtra, match="xgboost"):
        create_app(fresh)


BAD_SETTINGS: dict[str, dict[str, Any]] = {
    "no probe": {"probes": {}},
    "probe name": {"probes": {"a b": probes.tiny_probe()}},
    "a token that is empty": {"token": ""},
    "plain ASCII": {"token": "sécret"},
    "expected an Adapter": {"base": "zoo/adapters/initial"},
    "below max_body": {"max_body": 10, "max_held": 9},
    "max_connections 0": {"max_connections": 0},
    "timeout nan": {"timeout": float("nan")},
    "timeout inf": {"timeout": float("inf")},
    "min_rate -1": {"min_rate": -1},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_settings_that_make_no_sense_are_refused(message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        Settings(**{"probes": {"paper": probes.tiny_probe()}, **BAD_SETTINGS[message]})


# --- questions and answers
# ----------------------------------------------------------------------------------------------


def test_the_documented_parameters_are_the_ones_that_are_read() -> None:
    documented = [one["name"] for one in SCORE["parameters"] if one["in"] == "query"]
    assert tuple(documented) == PARAMETERS
    values = {
        "probe": "paper",
        "kind": "weight_delta",
        "alpha": "-1.5e1",
        "base_model": "org%2Fb%C3%A4se",
        "spectra": "true",
    }
    question = parse_question(
        "&".join(f"{name}={values[name]}" for name in documented).encode(), {"paper"}
    )
    assert (
        question.probes,
        question.kind,
        question.alpha,
        question.base_model,
        question.spectra,
    ) == (
        ("paper",),
        "weight_delta",
        -15.0,
        "org/bäse",
        True,
    )
    assert parse_question(b"", {"a": 1, "b": 2}).probes == ("a", "b")


def test_fresh_is_a_start_for_probes_that_read_b_only() -> None:
    settings = Settings(
        {
            "paper": probes.tiny_probe("linear", "paper"),
            "all_a": probes.tiny_probe("linear", "all_a"),
        },
        "fresh",
    )
    scorer, names = Scorer(settings), settings.probes
    after = probes.labelled_adapter(4, kind="weights")
    [result], _ = scorer(save_whole(after), parse_question(b"probe=paper", names))
    delta = Adapter(
        {name: LoRAPair(0 * pair.A, pair.B, pair.scaling) for name, pair in after.items()},
        kind="factor_delta",
    )
    assert result.score == probes.tiny_probe("linear", "paper")([delta])[0]
    with pytest.raises(
        Exception, match=r"probe 'all_a': .*needs the adapter that training started from"
    ):
        scorer(save_whole(after), parse_question(b"probe=all_a", names))


def test_what_of_the_spectra_is_returned_is_bounded() -> None:
    many = make.adapter(r=70, layers=150, dims={"q_proj": (80, 90), "v_proj": (71, 90)})
    probe = probes.fit_probe(
        [
            many,
            many,
            make.adapter(r=70, layers=150, dims={"q_proj": (80, 90), "v_proj": (71, 90)}, seed=1),
        ]
        * 2,
        [0, 0, 1] * 2,
    )
    _, spectra = Scorer(Settings({"paper": probe}))(
        save_whole(many), parse_question(b"spectra=true", ["paper"])
    )
    assert spectra is not None
    assert (spectra["modules"], len(spectra["rows"])) == (300, MAX_SPECTRA)
    assert {len(row["values"]) for row in spectra["rows"]} == {MAX_VALUES}


def test_spectra_of_a_rank_that_would_take_minutes_are_refused_and_its_score_is_not() -> None:
    adapter = probes.labelled_adapter(4, kind="weights")
    huge = make.with_pairs(
        adapter, {make.module("q_proj", 1): make.pair(10, 12, MAX_RANK + 1)}
    )  # of a layer that the probe does not read
    scorer = Scorer(Settings({"paper": probes.tiny_probe()}, "fresh"))
    for rank, query in ((2, b"spectra=true"), (MAX_RANK + 1, b"spectra=false")):
        [result], _ = scorer(
            save_whole(adapter if rank == 2 else huge), parse_question(query, ["paper"])
        )
        assert 0 <= result.score <= 1
    with pytest.raises(DataError, match=f"rank {MAX_RANK + 1}"):
        scorer(save_whole(huge), parse_question(b"spectra=true", ["paper"]))
