"""The service as a FastAPI application: its routes, and errors as typed bodies."""

# No `from __future__ import annotations` here: FastAPI evaluates the annotations of endpoints,
# whose names are local to create_app.
import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import MissingExtra
from ..probe import Probe
from . import openapi
from .answers import Refusal
from .gate import JSON_HEADERS, App, Gate, Scope, Send, reply
from .metrics import Metrics
from .page import page
from .scoring import Scorer, parse_question
from .settings import Settings
from .slices import slice_factors, tensor_name
from .upload import Held, Receive, Upload

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

SCORING_THREADS = 2
"""Large bodies scored at one time; torch and NumPy let go of the interpreter for most of it."""
MAX_QUESTIONS = 64
"""Query strings whose meaning is remembered."""


def create_app(settings: Settings, metrics: Metrics | None = None) -> "FastAPI":
    """The ASGI application, counting into `metrics` or into some of its own.

    Raises:
        MissingExtra: FastAPI, prometheus_client or what a probe's head needs is not installed.
    """
    try:
        from fastapi import FastAPI
        from fastapi.routing import APIRoute
    except ImportError as error:
        raise MissingExtra(str(error.name), "serve", "The scoring service") from None

    class DirectRoute(APIRoute):
        """A route that is an ASGI application itself.

        FastAPI documents it, and neither parses nor validates anything.
        """

        def __init__(self, path: str, endpoint: App, **options: Any) -> None:
            super().__init__(path, _without_parameters(endpoint.__name__), **options)
            self.app = endpoint

    service = _Service(settings, metrics or Metrics())
    html, page_headers = page()

    async def score(scope: Scope, receive: Receive, send: Send) -> None:
        await service.score(scope, receive, send)

    async def probes(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, service.described)

    async def measured(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, service.metrics.text(), {"content-type": service.metrics.media_type})

    async def healthz(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, b'{"status": "ok"}')

    async def start_page(scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, html, {"content-type": "text/html; charset=utf-8", **page_headers})

    app = FastAPI(
        title="loraprobe",
        summary="P(malicious) of LoRA adapters",
        version=__version__,
        docs_url=None,
        redoc_url=None,
    )
    app.router.route_class, app.router.redirect_slashes = DirectRoute, False
    app.add_api_route(
        "/v1/score",
        score,
        methods=["POST"],
        openapi_extra=openapi.SCORE,
        responses=openapi.SCORE_ANSWERS,
        summary="Score an adapter",
    )
    app.add_api_route(
        "/v1/probes",
        probes,
        responses=openapi.PROBES_ANSWERS,
        summary="The probes that are served, and the slices they read",
    )
    app.add_api_route(
        "/metrics",
        measured,
        responses=openapi.answers(None, "text/plain", 401),
        summary="Metrics in Prometheus' format",
    )
    app.add_api_route(
        "/healthz",
        healthz,
        responses=openapi.answers(None, "application/json"),
        summary="Whether the service answers",
    )
    app.add_api_route("/", start_page, include_in_schema=False)
    _answer_errors(app)
    routes = frozenset(str(getattr(route, "path", "")) for route in app.routes)
    direct = {
        (method, route.path): route.app
        for route in app.routes
        if isinstance(route, DirectRoute)
        for method in route.methods or ()
    }
    app.add_middleware(
        Gate, token=settings.token, metrics=service.metrics, routes=routes, direct=direct
    )
    return app


def _without_parameters(name: str) -> Callable[[], None]:
    """A function of this name for FastAPI to look at.

    What it takes and returns is said in `openapi`.
    """

    def documented() -> None:
        raise NotImplementedError

    documented.__name__ = name
    return documented


class _Service:
    """What the endpoints share."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._held = settings, Held(settings.max_held)
        self.metrics = metrics
        metrics.held_bytes.set_function(lambda: self._held.bytes)
        self._scorer = Scorer(settings)
        self._threads = ThreadPoolExecutor(SCORING_THREADS, "scoring")
        self._question = lru_cache(MAX_QUESTIONS)(
            partial(parse_question, probes=settings.probes)
        )  # callers mostly ask the same
        self.described = json.dumps(
            {"probes": [_described(name, probe) for name, probe in settings.probes.items()]}
        ).encode()

    async def score(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one body. What is counted of it is counted when the answer is on its way.

        Raises:
            Refusal, LoraprobeError: there is no answer.
        """
        question = self._question(scope["query_string"])
        upload = Upload(scope, receive, self._settings, self._held)
        try:
            body, digest = await upload.read()
            begun = time.perf_counter()
            if len(body) <= self._settings.inline and not question.spectra:
                results, spectra = self._scorer(body, question)
            else:
                results, spectra = await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._scorer, body, question
                )
            seconds = time.perf_counter() - begun
        finally:
            scope["loraprobe.bytes"] = upload.received
            upload.release()
        answer = {
            "results": [vars(result) for result in results],
            "sha256": digest,
            "seconds": round(seconds, 6),
        }
        await reply(
            send, json.dumps(answer if spectra is None else {**answer, "spectra": spectra}).encode()
        )
        self.metrics.count_scored(len(body), seconds, results)


def _described(name: str, probe: Probe) -> dict[str, Any]:
    """What a client has to know of a probe to choose it and to send its slice."""
    featurizer = probe.featurizer
    pooled = featurizer.recipe.pool  # such a recipe reads all of an adapter: there is no slice
    factors = () if pooled else slice_factors(featurizer)
    return {
        "name": name,
        "commit": probe.commit,
        "base_model": probe.base_model,
        "kind": featurizer.layout.kind,
        "head": probe.head.name,
        "recipe": featurizer.recipe.to_dict(),
        "threshold": probe.threshold,
        "benign_below": probe.benign_below,
        "modules": sorted(featurizer.modules),
        "slice": (
            None
            if pooled
            else [
                [module, factor, tensor_name(module, factor)]
                for module in featurizer.layout.scalings
                for factor in factors
            ]
        ),
    }


def _answer_errors(app: "FastAPI") -> None:
    """The router's refusals, and what nobody foresaw, as typed errors too."""
    from starlette.exceptions import HTTPException

    async def of_the_router(request: "Request", error: Exception) -> "Response":
        status: int = getattr(error, "status_code", 500)
        allowed = getattr(error, "headers", None) or {}
        if status == 405:
            raise Refusal(
                405,
                "MethodNotAllowed",
                "this path takes another method",
                expected=allowed["Allow"],
                headers=allowed,
            )
        raise Refusal(
            status,
            "NotFound" if status == 404 else "BadRequest",
            "there is nothing at this path",
            expected="a path of /openapi.json",
        )

    async def of_the_service(request: "Request", error: Exception) -> "Response":
        from starlette.responses import Response

        refusal = Refusal(
            500, "InternalError", "the service could not finish this request; its log says why"
        )
        return Response(refusal.body(), refusal.status, headers=JSON_HEADERS)

    app.add_exception_handler(HTTPException, of_the_router)
    app.add_exception_handler(Exception, of_the_service)
