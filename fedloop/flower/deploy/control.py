"""The operator's side of a SuperLink: register nodes, start a run, ask how it stands, stop it.

From the server's own machine only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ...errors import ConfigError, EngineError
from .. import require_flower

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        finished: whether it has come to an end, good or bad.
        completed: whether it was a good one.
        details: what went wrong, if something did.
    """

    finished: bool
    completed: bool
    details: str


class Control:
    """A connection to a SuperLink's Control API.

    Args:
        address: host:port; the host has to be in the server's certificate.
        authority: the file of the certificate authority that signed it.

    Raises:
        ConfigError: there is no certificate in that file.
        MissingExtra: flwr is not installed.
    """

    def __init__(self, address: str, authority: Path) -> None:
        require_flower()
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        try:
            self._client: ControlHttpClient = ControlHttpClient.from_server_address(
                server_address=address,
                insecure=False,
                root_certificates=_read(authority),
                interceptors=[RuntimeVersionHttpInterceptor("fedloop")],
            )
        except (OSError, UnicodeDecodeError) as error:  # of OpenSSL
            raise ConfigError(
                f"{authority} is not a certificate: {error}. Expected the server's ca.crt."
            ) from None
        self._address = address

    def register(self, key: Path) -> tuple[int, str]:
        """Let the holder of a key take part: (node id, the public key as a line of text).

        Raises:
            ConfigError: it is not a public key of a NIST curve in OpenSSH's format.
            EngineError: the key is registered already, or the SuperLink cannot be reached.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key
        from flwr.proto.control_pb2 import RegisterNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        text = _read(key)
        try:
            public = load_ssh_public_key(text)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(
                f"{key} is not a public key: {error}. Expected what `ssh-keygen -t ecdsa -b 384`"
                " writes to a .pub file."
            ) from None
        if not isinstance(public, EllipticCurvePublicKey):
            raise ConfigError(
                f"{key} is a key of another kind; expected what `ssh-keygen -t ecdsa -b 384` writes"
                " to a .pub file"
            )
        with self._typed_errors():
            response = self._client.RegisterNode(
                RegisterNodeRequest(public_key=public_key_to_bytes(public))
            )
        return int(response.node_id), text.decode().strip()

    def unregister(self, node_id: int) -> None:
        """Shut a node out, from now on.

        Raises:
            EngineError: there is no such node, or the SuperLink cannot be reached.
        """
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with self._typed_errors():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start(self, app: Path, run_config: Mapping[str, str | int | float]) -> int:
        """Start a run of the app in a folder: its id.

        Raises:
            EngineError: the app or its run config is not valid, or the SuperLink cannot be reached.
        """
        from flwr.cli.build import build_fab_from_disk
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        try:
            bundle = build_fab_from_disk(app)
        except (OSError, ValueError) as error:
            raise EngineError(
                f"{app} is not a Flower app: {error}. Expected a folder that `fedloop flower init`"
                " wrote."
            ) from error
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        with self._typed_errors():
            response = self._client.StartRun(
                StartRunRequest(
                    fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config))
                )
            )
        return int(response.run_id)

    def status(self, run: int) -> RunStatus:
        """How a run stands.

        Raises:
            EngineError: there is no such run, or the SuperLink cannot be reached.
        """
        from flwr.proto.control_pb2 import ListRunsRequest

        with self._typed_errors():
            response = self._client.ListRuns(ListRunsRequest(run_id=run))
        if run not in response.run_dict:
            raise EngineError(
                f"the SuperLink at {self._address} knows no run {run}; expected one that was"
                " started there"
            )
        status = response.run_dict[run].status
        return RunStatus(
            status.status == "finished", status.sub_status == "completed", status.details
        )

    def stop(self, run: int) -> None:
        """End a run; what its rounds have saved stays.

        Raises:
            EngineError: the SuperLink cannot be reached.
        """
        from flwr.proto.control_pb2 import StopRunRequest

        with self._typed_errors():
            self._client.StopRun(StopRunRequest(run_id=run))

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        """What goes wrong, as one typed error."""
        from flwr.supercore.error import FlowerError
        from httpx import HTTPError, HTTPStatusError

        try:
            yield
        except HTTPStatusError as error:
            refusal = FlowerError.from_json(error.response.text)
            why = (
                f"{refusal.message} {refusal.public_details or ''}".strip()
                if refusal
                else f"HTTP {error.response.status_code} {error.response.text[:200]}"
            )
            raise EngineError(f"the SuperLink at {self._address} refused: {why}") from error
        except HTTPError as error:
            raise EngineError(
                f"cannot reach the SuperLink at {self._address}: {error}. Expected it to run, with"
                " a certificate for that name."
            ) from error

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
