"""A client of the scoring service, on the standard library alone.

client = ScoringClient("http://127.0.0.1:8080")
for result in client.score("path/to/adapter"):
    print(result.probe, result.verdict, result.score, result.unchecked)
"""

from __future__ import annotations

import hashlib
import http.client
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlencode, urlsplit

from .. import errors
from ..errors import KindMismatch, LayoutMismatch, LoraprobeError, ServiceError
from .results import Result
from .settings import check_token
from .upload import MEDIA_TYPE, content_digest

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter

MAX_ANSWER = 16 << 20


class ScoringClient:
    """Sends adapters to a scoring service and reads its verdicts.

    Every body is sent with its sha256, which the service checks, and the one in the answer is
    compared. Redirects are not followed and proxies not used. Each request has a connection of its
    own, so that threads can share a client.

    Args:
        url: "http://host:port" or "https://host", with a path in front of the service's own if
            there is one.
        token: what the service wants as a bearer token.
        timeout: seconds to wait for the network, each time.

    Raises:
        ServiceError: the url is none, or no header can hold the token.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0) -> None:
        try:
            parts = urlsplit(url)
            self._host = parts.hostname or ""
            self._port = parts.port
        except ValueError:
            parts = urlsplit("")
            self._host = ""
        if (
            parts.scheme not in ("http", "https")
            or not self._host
            or parts.query
            or parts.fragment
            or parts.username
        ):
            raise ServiceError(
                f"got the address {url!r}; expected something like http://127.0.0.1:8080"
            )
        check_token(token)
        self._connection = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._url = url
        self._path = parts.path.rstrip("/")
        self._timeout = timeout
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def score(
        self, adapter: Adapter | str | Path, probe: str | None = None, *, alpha: float | None = None
    ) -> list[Result]:
        """What the probes of the service say of one adapter.

        An adapter goes over as it is: weights for the service to take the delta of, or a delta. If
        one probe is named and a delta given, only the slice that this probe reads is sent; modules
        that were not in its training are refused here.

        Args:
            adapter: in memory, or what `load_adapter` reads: a PEFT folder, a file or a Hub id.
            probe: one of `probes()`; all of them if None.
            alpha: lora_alpha, for a bare file.

        Returns:
            One result a probe.

        Raises:
            LoraprobeError: as the library raises it, here or in the service: LayoutMismatch,
                NonFiniteError, ...
            ServiceError: the service cannot be reached, or refused for a reason of its own; see its
                `type` and `status`.
        """
        from ..adapters.load import load_adapter

        loaded = load_adapter(adapter, alpha=alpha) if isinstance(adapter, str | Path) else adapter
        self._check_config(loaded)
        query = {"kind": loaded.kind, **({} if probe is None else {"probe": probe})}
        body = self._encoded(loaded, probe)
        headers = {"Content-Type": MEDIA_TYPE, "Content-Digest": content_digest(body)}
        answer = self._ask("POST", f"/v1/score?{urlencode(query)}", body, headers)
        try:
            results = [
                Result(**{**result, "unchecked": tuple(result["unchecked"])})
                for result in answer["results"]
            ]
            digest = answer["sha256"]
        except (KeyError, TypeError) as error:
            raise ServiceError(
                f"{self._url} gave an answer of another form ({error}); is it a scoring service?"
            ) from None
        if digest != hashlib.sha256(body).hexdigest():
            raise ServiceError(
                f"{self._url} scored a body with sha256 {digest}, which is not the one that was"
                " sent"
            )
        return results

    def probes(self) -> list[dict[str, Any]]:
        """The probes that are served: name, base_model, kind, threshold, the slice they read, ...

        Raises:
            ServiceError: see `score`.
        """
        served = self._ask("GET", "/v1/probes").get("probes")
        if not isinstance(served, list):
            raise ServiceError(
                f"{self._url} gave an answer of another form; is it a scoring service?"
            )
        return served

    def _check_config(self, adapter: Adapter) -> None:
        """What adapter_config.json says and tensors do not: no service can check it."""
        from ..adapters.deltas import check_is_change, incomplete

        check_is_change(adapter)
        if adapter.kind != "weights" or (selects := adapter.selects) is None:
            return
        if not adapter.zero_start:
            raise KindMismatch(
                "B did not start at zero (init_lora_weights in adapter_config.json), which a"
                " service cannot see. Send the change since the start: weight_delta(after, before)"
                " to a probe of products, factor_delta(after, before) to one of factors"
            )
        modules = {module for entry in self.probes() for module in entry["modules"]}
        if absent := [module for module in sorted(modules - adapter.keys()) if selects(module)]:
            raise LayoutMismatch(incomplete(absent))

    def _encoded(self, adapter: Adapter, probe: str | None) -> bytes:
        from .slices import SLICE, encode, save_whole

        if adapter.kind == "weights" or probe is None:
            return save_whole(adapter)
        served = {entry["name"]: entry for entry in self.probes()}
        if probe not in served:
            raise ServiceError(
                f"{self._url} serves {', '.join(sorted(served))}; got the probe {probe!r}",
                "UnknownProbe",
            )
        entry = served[probe]
        if entry["slice"] is None:
            return save_whole(adapter)
        unknown = adapter.keys() - set(entry["modules"])
        missing = {module for module, *_ in entry["slice"]} - adapter.keys()
        if unknown or missing:
            raise LayoutMismatch(
                f"the adapter changes {len(unknown)} modules that the training adapters did not and"
                f" lacks {len(missing)} that the probe {probe!r} reads, first"
                f" {min(unknown or missing)!r}. Use a probe made for this kind of adapter."
            )
        return encode(adapter, [(module, factor) for module, factor, _ in entry["slice"]], SLICE)

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        connection = self._connection(self._host, self._port, timeout=self._timeout)
        try:
            # A service that refuses a body need not read it to the end; its answer may be there all
            # the same.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(
                    method, self._path + path, body, {**self._headers, **(headers or {})}
                )
            response = connection.getresponse()
            data = response.read(MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            raise ServiceError(
                f"no answer from {self._url} ({type(error).__name__}: {error}). Is the service"
                " running there?"
            ) from None
        finally:
            connection.close()
        try:
            answer = json.loads(data) if len(data) <= MAX_ANSWER else None
        except ValueError:
            answer = None
        if response.status != 200:
            _raise(self._url, response.status, answer)
        if not isinstance(answer, dict):
            raise ServiceError(
                f"{self._url} gave an answer that is no JSON object; is it a scoring service?",
                status=response.status,
            )
        return answer


def _raise(url: str, status: int, answer: Any) -> NoReturn:
    """The error that a service reported, as the library's own class where it is one of those."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        raise ServiceError(
            f"{url} answered with status {status} and no typed error; is it a scoring service?",
            status=status,
        )
    kind = str(error.get("type"))
    message = str(error.get("message"))
    cls = getattr(errors, kind, None)
    if isinstance(cls, type) and issubclass(cls, LoraprobeError) and cls is not ServiceError:
        raise cls(message)
    details = "".join(f"; {name} {error[name]}" for name in ("got", "expected") if name in error)
    raise ServiceError(f"{kind}: {message}{details}", kind, status)
