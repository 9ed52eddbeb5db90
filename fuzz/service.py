"""The body of a request to the scoring service, asked without a socket.

POST /v1/score as an ASGI call.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, MutableMapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.errors import LoraprobeError
from loraprobe.probe import Probe
from loraprobe.serve.slices import save_slice, save_whole

from . import reread
from .corpus import BASE, Files, probes, tensors
from .oracle import Failure, an_adapter, loaded_probe

BODY, QUERY = "body.safetensors", "query"
Answer = tuple[str, list[dict[str, Any]]]  # the sha256 that the service names, its results


class Refused(LoraprobeError):
    """The service answered with a status between 400 and 499 and an error that says why."""


@cache
def requests() -> tuple[Files, ...]:
    """Slices for two probes, a whole delta, and a file of PEFT's with what has to be said beside
    it.
    """
    delta = an_adapter(4)
    return (
        {
            BODY: save_slice(served()["linear"].featurizer, delta),
            QUERY: b"probe=linear&kind=factor_delta",
        },
        {
            BODY: save_slice(served()["mlp"].featurizer, delta),
            QUERY: b"probe=mlp&kind=factor_delta&spectra=true",
        },
        {BODY: save_whole(delta), QUERY: b"kind=factor_delta"},
        {
            BODY: safetensors.torch.save(tensors(), {"format": "pt"}),
            QUERY: f"alpha=4&base_model={BASE}".encode(),
        },
    )


@cache
def served() -> dict[str, Probe]:
    """Three probes of which the features are one block of numbers of B."""
    return dict(zip(("linear", "mlp", "trees"), map(loaded_probe, probes()[:3]), strict=True))


@cache
def _app() -> tuple[Any, asyncio.AbstractEventLoop]:
    from loraprobe.serve.app import create_app
    from loraprobe.serve.settings import Settings

    zeros = {name: tensor * 0 for name, tensor in tensors().items()}
    return (
        create_app(
            Settings(served(), base=Adapter.from_state_dict(zeros, alpha=4, base_model=BASE))
        ),
        asyncio.new_event_loop(),
    )


def ask(folder: Path) -> Answer:
    """Send the request of a folder.

    Raises:
        Refused: it was refused with a typed error.
        Failure: any other answer that is not a score.
    """
    status, body = _post((folder / BODY).read_bytes(), (folder / QUERY).read_bytes())
    try:
        answer = json.loads(body)
        if status == 200:
            return answer["sha256"], answer["results"]
        error = answer["error"]
        if 400 <= status < 500 and error["type"]:
            raise Refused(f"{error['message']} {error.get('got', '')} {error.get('expected', '')}")
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, LoraprobeError):
            raise
        raise Failure(
            f"status {status} with an answer that is not understood: {body[:200]!r}"
        ) from None
    raise Failure(f"status {status}: {body[:200]!r}")


def _post(body: bytes, query: bytes) -> tuple[int, bytes]:
    app, loop = _app()
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    messages = [
        {"type": "http.request", "body": part, "more_body": number == 0}
        for number, part in enumerate(parts)
    ]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/score",
        "root_path": "",
        "raw_path": b"/v1/score",
        "query_string": query,
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/octet-stream")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    loop.run_until_complete(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def judge_answer(folder: Path, undamaged: Path) -> Callable[[Answer], str]:
    """Of an answer: the scores of the undamaged body, or those of the numbers that an independent
    reader finds in this one.
    """

    def judge(answer: Answer) -> str:
        digest, results = answer
        data = (folder / BODY).read_bytes()
        if digest != hashlib.sha256(data).hexdigest():
            raise Failure(f"it names the sha256 {digest}, which is not that of the body")
        matrices = reread.safetensors(data)
        for result in results:
            expected = _score(served()[result["probe"]], matrices)
            if not (0 <= result["score"] <= 1) or abs(result["score"] - expected) > 1e-6:
                raise Failure(
                    f"probe {result['probe']} scores {result['score']}, the numbers of the body"
                    f" score {expected}"
                )
        return "identical" if results == _undamaged(undamaged)[1] else "as in the file"

    return judge


@cache
def _undamaged(folder: Path) -> Answer:
    return ask(folder)


def _score(probe: Probe, matrices: reread.Matrices) -> float:
    """The probe's head on B of its layers, flattened and of length 1."""
    row = np.concatenate(
        [matrices[module, "B"].ravel() for module in probe.featurizer.layout.scalings]
    ).astype(np.float64)
    length = float(np.sqrt((row * row).sum()))
    return float(
        probe.score_features((row / length if length else row).astype(np.float32)[None])[0]
    )
