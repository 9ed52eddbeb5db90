"""Every error loraprobe raises on purpose: what was got, what was expected, what to do."""

from __future__ import annotations

import reprlib
from importlib.util import find_spec


class LoraprobeError(ValueError):
    """Bad input or an operation that cannot be done safely; the base of all others."""


class AdapterFormatError(LoraprobeError):
    """The file or state dict is not a readable plain-LoRA adapter."""


class UnsupportedAdapterError(AdapterFormatError):
    """The adapter is readable but is not plain LoRA (DoRA, embeddings, modules_to_save, ...)."""


class LayoutMismatch(LoraprobeError):
    """Modules, factors or shapes differ from the ones expected: a wrong base, rank or layer set."""


class BaseModelMismatch(LoraprobeError):
    """The adapter names another base model than the probe was trained on."""


class StartMismatch(LoraprobeError):
    """The adapter started from another initial adapter than those a probe of factors knows."""


class KindMismatch(LoraprobeError):
    """Weights where a delta is needed, or one kind of delta where another is needed."""


class NonFiniteError(LoraprobeError):
    """A tensor holds NaN or infinity."""


class RecipeError(LoraprobeError):
    """A feature recipe asks for something unknown or for nothing at all."""


class FitError(LoraprobeError):
    """The labelled adapters cannot support the requested fit, threshold or evaluation."""


class ProbeFormatError(LoraprobeError):
    """A probe folder is incomplete, damaged, tampered with or of an unknown format version."""


class HubError(LoraprobeError):
    """A repository, revision or file on the Hub could not be fetched as asked."""


class TrustError(LoraprobeError):
    """A probe is on no list of trusted ones, is not signed as asked, or a list cannot be read."""


class PolicyError(LoraprobeError):
    """What a scan is asked to do cannot be done: its policy, its list or its cache is wrong."""


class DataError(LoraprobeError):
    """A dataset file is missing or a row in it cannot be used."""


class OutputError(LoraprobeError):
    """Something is already where a command was to write."""


class ServiceError(LoraprobeError):
    """A scoring service cannot be set up or reached, or refused for a reason without a class.

    Attributes:
        type: the service's own word for it, "ServiceError" where there was no answer.
        status: the HTTP status, None where there was no answer.
    """

    def __init__(self, message: str, type: str = "ServiceError", status: int | None = None) -> None:
        super().__init__(message)
        self.type, self.status = type, status


class MissingExtra(LoraprobeError, ImportError):
    """An optional dependency is not installed; the message holds the pip line that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed: pip install 'loraprobe[{extra}]'"
        )


def require(package: str, extra: str, purpose: str) -> None:
    """Say what to install where an optional dependency is missing.

    Raises:
        MissingExtra: the package cannot be found.
    """
    if find_spec(package) is None:
        raise MissingExtra(package, extra, purpose)


EXTRAS = {
    **dict.fromkeys(("typer", "rich", "click"), "cli"),
    "xgboost": "xgboost",
    **dict.fromkeys(("matplotlib", "umap", "jinja2"), "figures"),
    **dict.fromkeys(("torch", "transformers", "peft", "accelerate", "datasets", "gguf"), "fed"),
    **dict.fromkeys(("pydantic", "rouge_score", "tokenizers"), "fed"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "httptools", "limits"), "serve"),
    "bitsandbytes": "gpu",
    "flwr": "flower",
    "cryptography": "flower-deploy",
    "nvflare": "nvflare",
    "tensorboard": "tensorboard",
    **dict.fromkeys(("model_signing", "OpenSSL"), "sign"),
}
"""Module -> the extra that brings it."""


def missing_extra(
    error: ImportError, purpose: str = "this command", made: type[MissingExtra] = MissingExtra
) -> ImportError:
    """An import that failed for want of an extra, with what to install; others as they are."""
    package = str(error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None or isinstance(error, LoraprobeError):
        return error
    return made(package, extra, purpose)


def quoted(value: object, limit: int = 60, *, keep: str = "") -> str:
    """A stranger's text or value for a message, a table or a log.

    Text is cut after `limit` characters, anything else shown shortened; what a terminal or a log
    would act upon is escaped, but for the characters of `keep`.

    >>> quoted("caf\u00e9 " + chr(27) + "[2J"), quoted("abcdef", 3), quoted([1.5, None])
    ('café \\\\x1b[2J', 'abc...', '[1.5, None]')
    """
    if not isinstance(value, str):
        cut = reprlib.repr(value)
    else:
        cut = value if len(value) <= limit else value[:limit] + "..."
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in cut
    )
