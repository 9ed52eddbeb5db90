"""What the Hub's client raises, turned into HubError.

What was asked, what came back, what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import HubError

_BY_STATUS = {
    400: "the Hub refused the request",
    401: "the Hub wants a valid token. Set HF_TOKEN, or log in with `hf auth login`",
    402: "the Hub wants a paid plan for this",
    403: "the token may not do this. Publishing needs one with the role 'write' for the repository"
    " and its namespace",
    409: "it conflicts with what the Hub holds. Look at the repository, then try again",
    412: "somebody else committed in the meantime, and nothing of this was committed. Push again",
    413: "the Hub finds it too large",
    429: "the Hub was asked too often. Wait, then try again",
}
_MAX_REASON = 300


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Raise whatever the library raises inside as a HubError that starts with `where`.

    Nothing but calls of the library belongs inside: what it raises on an answer that it does not
    understand (KeyError, TypeError, ...) is taken for the server's fault.

    Raises:
        HubError: with the library's own error as its cause.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, whichever this version stands on

    xet = getattr(hub, "XetDownloadError", HTTPError)  # not in the first 1.x versions
    try:
        yield
    except HubError:
        raise
    except (
        HTTPError,
        hub.EntryNotFoundError,
        xet,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        RuntimeError,
    ) as error:
        raise HubError(f"{where}: {_advice(error)}") from error


def _advice(error: Exception) -> str:
    """What happened and what to do, in one or two sentences."""
    from huggingface_hub import errors as hub

    wraps = "orce download failed" in str(error) or isinstance(error, hub.LocalEntryNotFoundError)
    if wraps and isinstance(error.__cause__, Exception):
        return _advice(error.__cause__)  # what it met when it asked; then the cache had nothing
    advices: dict[type[Exception], str] = {
        hub.GatedRepoError: "the repository is gated. Accept its conditions on the Hub, then pass"
        " the token of that account.",
        hub.RepositoryNotFoundError: "no such repository, or it is private and the token does not"
        " open it. Check the id and token.",
        hub.RevisionNotFoundError: "no such revision. Give a commit, tag or branch of the"
        " repository.",
        hub.OfflineModeIsEnabled: "not in the local cache, and HF_HUB_OFFLINE=1 keeps the Hub from"
        " being asked. Unset it to go online.",
        hub.LocalEntryNotFoundError: "not in the local cache, and the Hub was not asked or not"
        " reached. Go online once, or give a commit that is cached.",
        hub.HFValidationError: f"the Hub knows no such name ({_reason(error)}). Check the id and"
        " revision.",
    }
    for kind, advice in advices.items():
        if isinstance(error, kind):
            return advice
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status >= 500:
        return f"the Hub has a fault of its own (HTTP {status}: {_reason(error)}). Try again later."
    if status in _BY_STATUS:
        return f"{_BY_STATUS[status]} (HTTP {status}: {_reason(error)})."
    # The client takes that storage wherever hf_xet is installed, and has no other way then.
    if "xet" in _reason(error).lower():
        return (
            f"the transfer to or from the Hub's Xet storage failed ({_reason(error)}). If this Hub"
            " has none, set HF_HUB_DISABLE_XET=1."
        )
    if isinstance(error, RuntimeError) and "uploading" in str(error):
        return (
            f"a large file could not be uploaded, and nothing was committed ({_reason(error)})."
            " Push again."
        )
    if isinstance(error, hub.HTTPError | OSError):  # type: ignore[attr-defined]
        return (
            f"the Hub did not deliver it ({type(error).__name__}: {_reason(error)}). Check the"
            " network and HF_ENDPOINT, or try again later; what is in the cache can be read with"
            " HF_HUB_OFFLINE=1."
        )
    return (
        f"the Hub did not deliver it, or its answer cannot be understood ({type(error).__name__}:"
        f" {_reason(error)}). Try again later."
    )


def _reason(error: BaseException) -> str:
    """The server's words if it had any, else the library's; without pages of HTML."""
    message: Any = getattr(error, "server_message", None)
    lines = [line.strip() for line in str(message or error).splitlines() if line.strip()]
    if not message and hasattr(error, "response"):
        lines = lines[:1]  # after it comes the body of the answer
    text = " ".join(lines)[:_MAX_REASON] or "no reason given"
    cause = error.__cause__
    return f"{text} {_reason(cause)}" if isinstance(error, RuntimeError) and cause else text
