"""What the service tells about itself under /openapi.json.

Parameters, bodies and answers of its routes.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..adapters.adapter import KINDS
from .answers import Result
from .upload import MEDIA_TYPE

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {
                "type": {
                    **_TEXT,
                    "description": "What is wrong, in one word: BodyTooLarge, LayoutMismatch, ...",
                },
                "message": _TEXT,
                "got": {"description": "The value in question, where there is one."},
                "expected": {"description": "What was expected instead."},
            },
        }
    },
}
_REFUSED = {
    400: "Not valid HTTP, two lengths of one body, or a Content-Digest that cannot be read.",
    401: "The token is missing or wrong.",
    408: "The body came in too slowly.",
    413: "The body is larger than this service takes.",
    415: "Another content type, or a content encoding.",
    431: "The headers are too large.",
    422: "The query or the body cannot be scored; the type is that of the library's error.",
    500: "An error of the service itself.",
    503: "Too much at once: try again after Retry-After seconds.",
}
_RESULT_TYPES: dict[str, Schema] = {
    "probe": _TEXT,
    "commit": {
        "type": ["string", "null"],
        "description": "The Hub commit of the probe, null if it came from a folder.",
    },
    "score": {**_NUMBER, "minimum": 0, "maximum": 1, "description": "P(malicious)."},
    "verdict": {**_TEXT, "enum": ["benign", "malicious", "inconclusive"]},
    "reason": {**_TEXT, "description": "Why, where that is not plain from the score."},
    "threshold": {**_NUMBER, "description": "A score of at least this is malicious."},
}
_RESULT: Schema = {
    "type": "object",
    "required": [field.name for field in fields(Result)],
    "properties": _RESULT_TYPES,
}
_SPECTRA: Schema = {
    "type": "object",
    "description": (
        "Only with spectra=true. Singular values of B @ A (BA) of every module, or of the changes"
        " of its factors (A, B)."
    ),
    "properties": {
        "of": {**_TEXT, "enum": list(KINDS)},
        "modules": {
            "type": "integer",
            "description": "How many the body has; rows may be of fewer.",
        },
        "rows": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "module": _TEXT,
                    "matrix": {**_TEXT, "enum": ["A", "B", "BA"]},
                    "values": {"type": "array", "items": _NUMBER},
                },
            },
        },
    },
}
_ANSWER: Schema = {
    "type": "object",
    "required": ["results", "sha256", "seconds"],
    "properties": {
        "results": {"type": "array", "items": _RESULT},
        "sha256": {**_TEXT, "description": "Of the body, in hexadecimal."},
        "seconds": {**_NUMBER, "description": "From the complete body to its scores."},
        "spectra": _SPECTRA,
    },
}
_PARAMETER_TYPES: dict[str, tuple[Schema, str]] = {
    "probe": (_TEXT, "Score with this probe only; all that are served if left out."),
    "kind": ({**_TEXT, "enum": list(KINDS), "default": "weights"}, "What the body holds."),
    "alpha": (
        _NUMBER,
        "PEFT's lora_alpha: needed for a file that PEFT wrote, which does not hold it.",
    ),
    "base_model": (
        _TEXT,
        "The base model's name, for a file that does not say it; compared with the probe's.",
    ),
    "spectra": (
        {"type": "boolean", "default": False},
        "Return singular values of every module too.",
    ),
}

SCORE: Schema = {
    "parameters": (
        [
            {"name": name, "in": "query", "required": False, "schema": schema, "description": text}
            for name, (schema, text) in _PARAMETER_TYPES.items()
        ]
        + [
            {
                "name": "Content-Digest",
                "in": "header",
                "required": False,
                "schema": _TEXT,
                "description": "RFC 9530, sha-256: checked against the body.",
            }
        ]
    ),
    "requestBody": {
        "required": True,
        "description": (
            "The bytes of adapter_model.safetensors, or of a delta slice"
            " (loraprobe.serve.slices.save_slice)."
        ),
        "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    },
}


def answers(
    schema: Schema | None, media_type: str, *refused: int
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: 200 of a media type, and what may be refused."""
    content: Schema = {"content": {media_type: {"schema": schema} if schema else {}}}
    errors: Schema = {"content": {"application/json": {"schema": _ERROR}}}
    return {
        200: {"description": "OK", **content},
        **{status: {"description": _REFUSED[status], **errors} for status in refused},
    }


SCORE_ANSWERS = answers(_ANSWER, "application/json", *_REFUSED)
PROBES_ANSWERS = answers(
    {"type": "object", "properties": {"probes": {"type": "array", "items": {"type": "object"}}}},
    "application/json",
    401,
    500,
)
