"""The service as a FastAPI application: its routes, and errors as typed bodies."""

# No `from __future__ import annotations` here: FastAPI evaluates the annotations of endpoints, whose names are local to create_app.
import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtra
from ..format import library_version
from ..probe import Probe
from ..slices import slice_factors, tensor_name
from . import openapi
from .answers import Refusal
from .gate import JSON_HEADERS, Gate
from .metrics import Metrics
from .page import page
from .scoring import Scorer, parse_question
from .settings import Settings
from .upload import Held, Upload

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

SCORING_THREADS = 2
"""Large bodies scored at one time; torch and NumPy let go of the interpreter for most of it."""


def create_app(settings: Settings, metrics: Metrics | None = None) -> "FastAPI":
    """The ASGI application, counting into `metrics` or into some of its own.

    Raises:
        MissingExtra: FastAPI, prometheus_client or what a probe's head needs is not installed.
    """
    try:
        from fastapi import FastAPI, Request, Response
        from fastapi.routing import APIRoute
    except ImportError as error:
        raise MissingExtra(str(error.name), "serve", "The scoring service") from None

    class DirectRoute(APIRoute):
        """An endpoint that takes the request as it is: FastAPI documents it, and neither parses nor validates anything."""

        def get_route_handler(self) -> Callable[[Request], Any]:
            handler: Callable[[Request], Any] = self.endpoint
            return handler

    service = _Service(settings, metrics or Metrics())
    html, page_headers = page()

    async def score(request: Request) -> Response:
        return Response(await service.score(request), headers=JSON_HEADERS)

    async def probes(request: Request) -> Response:
        return Response(service.described, headers=JSON_HEADERS)

    async def measured(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"content-type": service.metrics.media_type})

    async def healthz(request: Request) -> Response:
        return Response(b'{"status": "ok"}', headers=JSON_HEADERS)

    async def start_page(request: Request) -> Response:
        return Response(html, headers={"content-type": "text/html; charset=utf-8", **page_headers})

    app = FastAPI(title="loraprobe", summary="P(malicious) of LoRA adapters", version=library_version(), docs_url=None, redoc_url=None)
    app.router.route_class, app.router.redirect_slashes = DirectRoute, False
    app.add_api_route("/v1/score", score, methods=["POST"], openapi_extra=openapi.SCORE, responses=openapi.SCORE_ANSWERS, summary="Score an adapter")
    app.add_api_route("/v1/probes", probes, responses=openapi.PROBES_ANSWERS, summary="The probes that are served, and the slices they read")
    app.add_api_route("/metrics", measured, responses=openapi.answers(None, "text/plain", 401), summary="Metrics in Prometheus' format")
    app.add_api_route("/healthz", healthz, responses=openapi.answers(None, "application/json"), summary="Whether the service answers")
    app.add_api_route("/", start_page, include_in_schema=False)
    _answer_errors(app)
    routes = frozenset(str(getattr(route, "path", "")) for route in app.routes)
    app.add_middleware(Gate, token=settings.token, metrics=service.metrics, routes=routes)
    return app


class _Service:
    """What the endpoints share."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._held = settings, Held(settings.max_held)
        self.metrics = metrics
        metrics.held_bytes.set_function(lambda: self._held.bytes)
        self._scorer = Scorer(settings)
        self._threads = ThreadPoolExecutor(SCORING_THREADS, "scoring")
        self.described = json.dumps({"probes": [_described(name, probe) for name, probe in settings.probes.items()]}).encode()

    async def score(self, request: "Request") -> bytes:
        """The answer to one body, JSON.

        Raises:
            Refusal, LoraprobeError: there is none.
        """
        question = parse_question(request.scope["query_string"], self._settings.probes)
        upload = Upload(request.headers, request.receive, self._settings, self._held)
        try:
            body, digest = await upload.read()
            begun = time.perf_counter()
            if len(body) <= self._settings.inline and not question.spectra:
                results, spectra = self._scorer(body, question)
            else:
                results, spectra = await asyncio.get_running_loop().run_in_executor(self._threads, self._scorer, body, question)
            seconds = time.perf_counter() - begun
            self.metrics.body_bytes.observe(len(body))
        finally:
            request.scope["loraprobe.bytes"] = upload.received
            upload.release()
        self.metrics.scoring_seconds.observe(seconds)
        self.metrics.count_verdicts(results)
        answer = {"results": [vars(result) for result in results], "sha256": digest, "seconds": round(seconds, 6)}
        return json.dumps(answer if spectra is None else {**answer, "spectra": spectra}).encode()


def _described(name: str, probe: Probe) -> dict[str, Any]:
    """What a client has to know of a probe to choose it and to send its slice."""
    featurizer = probe.featurizer
    pooled = featurizer.recipe.pool  # such a recipe reads all of an adapter: there is no slice
    factors = () if pooled else slice_factors(featurizer)
    return {
        "name": name, "commit": probe.commit, "base_model": probe.base_model, "kind": featurizer.layout.kind, "head": probe.head.name,
        "recipe": featurizer.recipe.to_dict(), "threshold": probe.threshold, "benign_below": probe.benign_below,
        "modules": sorted(featurizer.modules),
        "slice": None if pooled else [[module, factor, tensor_name(module, factor)] for module in featurizer.layout.scalings for factor in factors],
    }  # fmt: skip


def _answer_errors(app: "FastAPI") -> None:
    """The router's refusals, and what nobody foresaw, as typed errors too."""
    from starlette.exceptions import HTTPException

    async def of_the_router(request: "Request", error: Exception) -> "Response":
        status: int = getattr(error, "status_code", 500)
        allowed = getattr(error, "headers", None) or {}
        if status == 405:
            raise Refusal(405, "MethodNotAllowed", "this path takes another method", expected=allowed["Allow"], headers=allowed)
        raise Refusal(status, "NotFound" if status == 404 else "BadRequest", "there is nothing at this path", expected="a path of /openapi.json")

    async def of_the_service(request: "Request", error: Exception) -> "Response":
        from starlette.responses import Response

        refusal = Refusal(500, "InternalError", "the service could not finish this request; its log says why")
        return Response(refusal.body(), refusal.status, headers=JSON_HEADERS)

    app.add_exception_handler(HTTPException, of_the_router)
    app.add_exception_handler(Exception, of_the_service)
