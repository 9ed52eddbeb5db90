"""The scoring service as an ASGI application, without a connection.

What happens inside while it scores, fails or is short of memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from loraprobe import serve
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import DataError, MissingExtra, ServiceError
from loraprobe.serve import Settings
from loraprobe.serve.app import create_app
from loraprobe.serve.logs import JsonLines
from loraprobe.serve.prometheus import Metrics
from loraprobe.serve.scoring import MAX_RANK, MAX_SPECTRA, MAX_VALUES, Question, Scorer
from loraprobe.serve.slices import save_whole
from tests.helpers import make, probes, serving
from tests.helpers.serving import Response, call


def paper(**options: Any) -> Settings:
    """One probe, and a start."""
    return Settings({"paper": probes.tiny_probe("linear", "paper")}, serving.start(), **options)


def body() -> bytes:
    return save_whole(serving.uploaded())


# --- beside each other ---


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
        # spectra take a thread whatever the size
        app = create_app(paper(inline=10 if path == "/v1/score" else 1 << 20))
        scoring = asyncio.create_task(call(app, path, body()))
        assert await asyncio.to_thread(entered.wait, 20)
        health = await call(app, "/healthz", method="GET")
        assert not scoring.done()
        finish.set()
        return health, await scoring

    monkeypatch.setattr(Scorer, "__call__", slow)
    health, scored = asyncio.run(both())
    assert health == Response(200, {"status": "ok"})
    assert scored.body["results"] == [serving.shown(serving.of_upload("paper", serving.uploaded()))]


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
        first = asyncio.create_task(call(app, "/v1/score", data))
        assert await asyncio.to_thread(entered.wait, 20)
        # no room beside the one that is being scored
        answers.append(await call(app, "/v1/score", data))
        finish.set()
        answers.extend([await first, await call(app, "/v1/score", data)])

    asyncio.run(run())
    assert [answer.status for answer in answers] == [503, 200, 200]
    assert answers[0].body["error"]["type"] == "Overloaded"


@pytest.mark.parametrize("leaves", [False, True])
def test_a_body_that_stands_still_is_cut_off_and_one_that_breaks_off_is_forgotten(
    leaves: bool,
) -> None:
    """A body may take its time as long as it comes in at the lowest rate: the first control."""
    metrics = Metrics()
    app = create_app(paper(timeout=0.3, min_rate=1), metrics)
    data = body()

    async def ask(*parts: bytes, then: dict[str, Any] | None) -> int:
        waiting = list(parts)
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if waiting:
                await asyncio.sleep(0.1)
                part = waiting.pop(0)
                more = bool(waiting) or sum(map(len, parts)) < len(data)
                return {"type": "http.request", "body": part, "more_body": more}
            if then is None:
                await asyncio.Event().wait()
            return dict(then or {})

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(serving.scope("/v1/score"), receive, send)
        return int(sent[0]["status"])

    slow = [data[start : start + len(data) // 4] for start in range(0, len(data), len(data) // 4)]
    gone = {"type": "http.disconnect"} if leaves else None
    assert asyncio.run(ask(*slow, then=gone)) == 200
    assert asyncio.run(ask(*slow[:2], then=gone)) == (499 if leaves else 408)
    assert b"loraprobe_held_bytes 0.0" in metrics.text()


# --- failures ---


def test_an_error_of_the_service_itself_is_typed_and_tells_nothing_but_to_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: Scorer, *given: Any) -> Any:
        raise ZeroDivisionError("the inner secret")

    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    monkeypatch.setattr(Scorer, "__call__", fail)
    with pytest.raises(ZeroDivisionError):  # goes on to the server, which logs it
        asyncio.run(create_app(paper())(serving.scope("/v1/score"), receive, send))
    said = json.loads(sent[1]["body"])
    assert (sent[0]["status"], said["error"]["type"]) == (500, "InternalError")
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
    monkeypatch.delitem(sys.modules, "loraprobe.serve.app")
    with pytest.raises(MissingExtra, match=r"pip install 'loraprobe\[serve\]'"):
        serve.create_app(paper())


BAD_SETTINGS: dict[str, dict[str, Any]] = {
    "no probe": {"probes": {}},
    "probe name": {"probes": {"a b": probes.tiny_probe()}},
    "a token that is empty": {"token": ""},
    "plain ASCII": {"token": "sécret"},
    "a line's end": {"token": "secret\n"},
    "expected name -> Probe": {"probes": {"a": "zoo/probes/linear"}},
    "got probes Probe": {"probes": probes.tiny_probe()},
    "got any_base 'no'": {"any_base": "no"},
    "got base PosixPath|got base WindowsPath": {"base": Path("initial")},
    "expected an Adapter": {"base": "zoo/adapters/initial"},
    "below max_body": {"max_body": 10, "max_held": 9},
    "max_connections 0": {"max_connections": 0},
    "timeout nan": {"timeout": float("nan")},
    "timeout inf": {"timeout": float("inf")},
    "min_rate -1": {"min_rate": -1},
    "got detail 'some'": {"detail": "some"},
    "without a port": {"hosts": ("box.local:8080",)},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_settings_that_make_no_sense_are_refused(message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        Settings(**{"probes": {"paper": probes.tiny_probe()}, **BAD_SETTINGS[message]})


# --- questions and answers ---


def test_fresh_is_a_start_for_probes_that_read_b_only() -> None:
    settings = Settings(
        {
            "paper": probes.tiny_probe("linear", "paper"),
            "all_a": probes.tiny_probe("linear", "all_a"),
        },
        "fresh",
    )
    scorer = Scorer(settings)
    after = probes.labelled_adapter(4, kind="weights")
    [result], _ = scorer(save_whole(after), Question(("paper",)))
    delta = Adapter(
        {name: LoRAPair(0 * pair.A, pair.B, pair.scaling) for name, pair in after.items()},
        kind="factor_delta",
    )
    assert result.score == probes.tiny_probe("linear", "paper")([delta])[0]
    with pytest.raises(
        Exception, match=r"probe 'all_a': .*needs the adapter that training started from"
    ):
        scorer(save_whole(after), Question(("all_a",)))


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
        save_whole(many), Question(("paper",), spectra=True)
    )
    assert spectra is not None
    assert (spectra["modules"], len(spectra["rows"])) == (300, MAX_SPECTRA)
    assert {len(row["values"]) for row in spectra["rows"]} == {MAX_VALUES}


def test_spectra_of_a_rank_that_would_take_minutes_are_refused_and_its_score_is_not() -> None:
    adapter = probes.labelled_adapter(4, kind="weights")
    # of a layer that the probe does not read
    huge = make.with_pairs(adapter, {make.module("q_proj", 1): make.pair(10, 12, MAX_RANK + 1)})
    scorer = Scorer(Settings({"paper": probes.tiny_probe()}, "fresh"))
    for rank, wants_spectra in ((2, True), (MAX_RANK + 1, False)):
        [result], _ = scorer(
            save_whole(adapter if rank == 2 else huge), Question(("paper",), spectra=wants_spectra)
        )
        assert 0 <= result.score <= 1
    with pytest.raises(DataError, match=f"rank {MAX_RANK + 1}"):
        scorer(save_whole(huge), Question(("paper",), spectra=True))
