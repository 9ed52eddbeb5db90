"""The query and the answers of the routes, as pydantic checks and documents them."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from ..adapters.adapter import Kind
from ..errors import quoted
from .results import Refusal, Result

_SCALING = "a finite number other than 0"


def _not_zero(value: float) -> float:
    if value == 0:
        raise PydanticCustomError("zero", "got no scaling", {"expected": _SCALING})
    return value


def _printable(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("unprintable", "got no name", {"expected": "printable text"})
    return text


Alpha = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_not_zero)]
ModelName = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_printable)]


class ScoreQuery(BaseModel):
    """What a request asks of its body."""

    model_config = ConfigDict(extra="forbid")

    probe: Annotated[
        str | None,
        Field(description="Score with this probe only; all that are served if left out."),
    ] = None
    kind: Annotated[Kind, Field(description="What the body holds.")] = "weights"
    alpha: Annotated[
        Alpha | None,
        Field(
            description="PEFT's lora_alpha: needed for a file of PEFT's, which does not hold it."
        ),
    ] = None
    base_model: Annotated[
        ModelName | None,
        Field(
            description="The base model of a file that does not say it; compared with the probe's."
        ),
    ] = None
    spectra: Annotated[bool, Field(description="Return singular values of every module too.")] = (
        False
    )


def read_query(query_string: bytes) -> ScoreQuery:
    """Read and check a query string.

    FastAPI would do this for every request anew, which takes as long as scoring; the result of
    this function can be remembered.

    Raises:
        Refusal: a parameter is unknown, occurs twice or has a value that is not valid.
    """
    pairs = parse_qsl(query_string.decode("latin-1"), keep_blank_values=True)
    values = dict(pairs)
    if len(values) < len(pairs):
        raise Refusal(422, "QueryError", "a parameter occurs twice", expected="each at most once")
    try:
        return ScoreQuery.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    names = ", ".join(ScoreQuery.model_fields)
    raise Refusal(
        422,
        "QueryError",
        f"{quoted(str(first['loc'][0]))}: {first['msg']}",
        got=quoted(str(first["input"])),
        expected=f"one of {names}"
        if first["type"] == "extra_forbidden"
        else first.get("ctx", {}).get("expected"),
    )


def query_parameters() -> list[dict[str, Any]]:
    """The parameters of POST /v1/score for /openapi.json."""
    properties = ScoreQuery.model_json_schema()["properties"]
    digest = {
        "name": "Content-Digest",
        "in": "header",
        "required": False,
        "schema": {"type": "string", "description": "RFC 9530, sha-256: checked against the body."},
    }
    return [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in properties.items()
    ] + [digest]


class SpectrumRow(BaseModel):
    """The largest singular values of one matrix of one module."""

    module: str
    matrix: Literal["A", "B", "BA"]
    values: list[float]


class Spectra(BaseModel):
    """Singular values of B @ A (BA) of every module, or of the changes of its factors (A, B)."""

    of: Kind
    modules: Annotated[int, Field(description="How many the body has; rows may be of fewer.")]
    rows: list[SpectrumRow]


class Answer(BaseModel):
    """The results of every probe that was asked."""

    results: list[Result]
    sha256: Annotated[str, Field(description="Of the body, in hexadecimal.")]
    seconds: Annotated[float, Field(description="From the complete body to its scores.")]
    spectra: Annotated[Spectra | None, Field(description="Only with spectra=true.")] = None


class ProbeFacts(BaseModel):
    """What a client has to know of a probe to choose it and to send its slice."""

    name: str
    commit: str | None
    base_model: str | None
    kind: Kind
    head: str
    recipe: dict[str, Any]
    threshold: float | None
    benign_below: float | None
    modules: list[str]
    slice: Annotated[
        list[tuple[str, Literal["A", "B"], str]] | None,
        Field(description="Module, factor and tensor name of all that it reads; null: everything."),
    ]


class ProbeList(BaseModel):
    """The probes that are served."""

    probes: list[ProbeFacts]


class Health(BaseModel):
    """That the service answers."""

    status: Literal["ok"] = "ok"


class ErrorFacts(BaseModel):
    """Why a request was refused."""

    type: Annotated[str, Field(description="In one word: BodyTooLarge, LayoutMismatch, ...")]
    message: str
    got: str | int | float | None = None
    expected: str | int | float | None = None


class ErrorAnswer(BaseModel):
    """The body of every refusal."""

    error: ErrorFacts


_REFUSALS = {
    400: "A Content-Digest that cannot be read.",
    401: "The token is missing or wrong.",
    403: "The request comes from a page of another origin.",
    408: "The body came in too slowly.",
    413: "The body is larger than this service takes.",
    415: "Another content type, none, or a content encoding.",
    421: "The Host header names another service.",
    422: "The query or the body cannot be scored; the type is that of the library's error.",
    429: "More requests than --rate: try again after Retry-After seconds.",
    431: "The headers are too large.",
    500: "An error of the service itself.",
    503: "Too much at once: try again after Retry-After seconds.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may be refused so; all statuses if none is named."""
    return {
        status: {"model": ErrorAnswer, "description": _REFUSALS[status]}
        for status in statuses or _REFUSALS
    }
