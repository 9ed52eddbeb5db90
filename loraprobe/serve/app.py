"""The service as a FastAPI application: its routes, and errors as typed bodies."""

# No `from __future__ import annotations` here: FastAPI evaluates the annotations of endpoints.
import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from .._version import __version__
from ..errors import quoted
from ..probe import Probe
from .middleware import JSON_HEADERS, SCORE_PATH, Guard, Requests, rate_limit
from .page import page
from .prometheus import Metrics
from .results import Refusal
from .schemas import (
    Answer,
    Health,
    ProbeFacts,
    ProbeList,
    query_parameters,
    read_query,
    refusals,
)
from .scoring import Answered, Question, Scorer
from .settings import Settings
from .slices import slice_factors, tensor_name
from .upload import MEDIA_TYPE, Body, Held, received_body

SCORING_THREADS = 2
"""Large bodies scored at one time; NumPy lets go of the interpreter for most of it."""

MAX_QUERIES = 64
"""Query strings whose meaning is remembered; callers mostly ask the same."""
_SCORE_DOCUMENT = {
    "parameters": query_parameters(),
    "requestBody": {
        "required": True,
        "description": (
            "The bytes of adapter_model.safetensors, or of a delta slice"
            " (loraprobe.serve.slices.save_slice)."
        ),
        "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    },
}


class Service:
    """What the routes share: the probes, the memory there is, the threads and the counters."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.held = Held(settings.max_held)
        self.probes = ProbeList(
            probes=[
                _probe_facts(name, probe, settings.detail == "scores")
                for name, probe in settings.probes.items()
            ]
        )
        self._scorer = Scorer(settings)
        self._threads = ThreadPoolExecutor(SCORING_THREADS, "scoring")
        self.question = lru_cache(MAX_QUERIES)(self._parsed)
        metrics.held_bytes.set_function(lambda: self.held.bytes)

    def _parsed(self, query_string: bytes) -> Question:
        """What a query string asks.

        Raises:
            Refusal: a parameter is unknown, occurs twice or is not valid; there is no such probe.
        """
        query = read_query(query_string)
        served = tuple(self.settings.probes)
        if query.probe is not None and query.probe not in served:
            raise Refusal(
                422,
                "UnknownProbe",
                "no probe of that name is served",
                got=quoted(query.probe),
                expected=", ".join(sorted(served)),
            )
        probes = served if query.probe is None else (query.probe,)
        return Question(probes, query.kind, query.alpha, query.base_model, query.spectra)

    async def answer(self, body: Body, question: Question) -> Answer:
        """Score a body, a large one in a thread.

        Raises:
            LoraprobeError: it cannot be scored.
        """
        begun = time.perf_counter()
        if len(body.data) <= self.settings.inline and not question.spectra:
            answered = self._scorer(body.data, question)
        else:
            answered = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._scorer, body.data, question
            )
        seconds = time.perf_counter() - begun
        self.metrics.count_scored(len(body.data), seconds, answered.results)
        return _answer(answered, body.sha256, seconds)


def create_app(settings: Settings, metrics: Metrics | None = None) -> FastAPI:
    """The ASGI application, counting into `metrics` or into some of its own.

    Raises:
        MissingExtra: prometheus_client, limits or what a probe's head needs is not installed.
        ServiceError: the rate cannot be read.
    """
    spend = None if settings.rate is None else rate_limit(settings.rate)
    service = Service(settings, metrics or Metrics())
    app = FastAPI(
        title="loraprobe",
        summary="P(malicious) of LoRA adapters",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_routes(app, service)
    app.add_exception_handler(HTTPException, _router_refuses)
    app.add_exception_handler(Exception, _service_failed)
    named = frozenset(str(getattr(route, "path", "")) for route in app.routes)
    # The last one added is the first one asked.
    app.add_middleware(Guard, settings=settings, spend=spend)
    app.add_middleware(Requests, metrics=service.metrics, routes=named)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    html, page_headers = page()

    @app.post(
        SCORE_PATH,
        response_model=Answer,
        responses=refusals(),
        openapi_extra=_SCORE_DOCUMENT,
        summary="Score an adapter",
    )
    async def score(request: Request) -> Response:
        question = service.question(request.scope["query_string"])
        async with received_body(request, service.settings, service.held) as body:
            answer = await service.answer(body, question)
        return Response(answer.model_dump_json(), headers=JSON_HEADERS)

    @app.get("/v1/probes", responses=refusals(401, 403, 421), summary="The probes served")
    async def probes() -> ProbeList:
        return service.probes

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **refusals(401, 403, 421)},
        summary="Metrics in Prometheus' format",
    )
    async def measured() -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.media_type)

    @app.get("/healthz", responses=refusals(403, 421), summary="Whether the service answers")
    async def healthz() -> Health:
        return Health()

    @app.get("/", include_in_schema=False)
    async def start_page() -> Response:
        return Response(html, media_type="text/html", headers=page_headers)


def _answer(answered: Answered, sha256: str, seconds: float) -> Answer:
    return Answer.model_validate(
        {
            "results": answered.results,
            "sha256": sha256,
            "seconds": round(seconds, 6),
            "spectra": answered.spectra,
        }
    )


def _probe_facts(name: str, probe: Probe, shows_cuts: bool) -> ProbeFacts:
    featurizer = probe.featurizer
    layout = featurizer.layout
    # A pooled recipe reads all of an adapter: there is no slice.
    factors = () if featurizer.recipe.any_modules else slice_factors(featurizer)
    slots = [
        (module, factor, tensor_name(module, factor))
        for module in layout.scalings
        for factor in factors
    ]
    return ProbeFacts(
        name=name,
        commit=probe.commit,
        base_model=probe.base_model,
        kind=layout.kind,
        head=probe.head.name,
        recipe=featurizer.recipe.to_dict(),
        threshold=probe.threshold if shows_cuts else None,
        benign_below=probe.benign_below if shows_cuts else None,
        modules=sorted(featurizer.modules),
        slice=None if featurizer.recipe.any_modules else slots,
    )


async def _router_refuses(request: Request, error: Exception) -> Response:
    """A path or a method that is not there."""
    status: int = getattr(error, "status_code", 500)
    headers = dict(getattr(error, "headers", None) or {})
    if status == 405:
        raise Refusal(
            405,
            "MethodNotAllowed",
            "this path takes another method",
            expected=headers.get("Allow"),
            headers=headers,
        )
    raise Refusal(
        status,
        "NotFound" if status == 404 else "BadRequest",
        "there is nothing at this path" if status == 404 else "the request cannot be read",
        expected="a path of /openapi.json",
    )


async def _service_failed(request: Request, error: Exception) -> Response:
    """What nobody foresaw: the log has it, the client does not."""
    refusal = Refusal(
        500, "InternalError", "the service could not finish this request; its log says why"
    )
    return Response(refusal.body(), refusal.status, headers=JSON_HEADERS)
