"""A process that answers the messages of one or more SuperNodes with the base model in memory,
instead of one process a message.

    python -m fedloop.flower.deploy.runner SECRET-FILE 127.0.0.1:9094 [127.0.0.1:9095 ...]

The SuperNodes run with `--isolation process`: they hand tasks to whoever knows the secret. Stock
Flower would start a process for every message, which loads the model anew, and would run the code
that the server sends along with it. This runs the installed fedloop and nothing else. It uses the
parts of Flower 1.41's own ClientApp process that are not public.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

from .. import client_app, require_flower

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.supercore.runtime import RuntimeHttpClient

App = Callable[["Message", "Context"], "Message"]
_IDLE = 0.1  # seconds between two questions for work
_BEAT = 10.0  # seconds between two signs of life; Flower gives a task up after sixty without
# What a client's work may raise: it becomes an error reply. Anything else ends this process, and
# the node with it.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class _Work:
    """A message that has arrived whole."""

    client: RuntimeHttpClient
    message: Message
    context: Context
    since: float
    done: threading.Event


def run_tasks(
    addresses: Sequence[str], secret: bytes, app: App, check: Callable[[], None] = lambda: None
) -> NoReturn:
    """Do what the SuperNodes at these addresses are asked to do, one message after the other, for
    ever.

    Messages are fetched by threads: the parts of one may never arrive, if its run has ended
        meanwhile.

    Args:
        check: called whenever there is nothing to do; what it raises ends this.
    """
    require_flower()
    clients, arrived = (
        {address: _client(address, secret=secret) for address in addresses},
        SimpleQueue[_Work](),
    )
    while True:
        for address, client in clients.items():
            token = _acquire(client)
            if token:
                threading.Thread(target=_fetch, args=(address, token, arrived), daemon=True).start()
        try:
            work = arrived.get(timeout=_IDLE)
        except Empty:
            check()
        else:
            _answer(work, app)


def _acquire(client: RuntimeHttpClient) -> str | None:
    """The right to work on a message, if there is one."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from httpx import TransportError

    with suppress(TransportError):  # a SuperNode that is not up yet, or not any more
        reply = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if reply.HasField("task"):
            return str(reply.token)
    return None


def _fetch(address: str, token: str, arrived: SimpleQueue[_Work]) -> None:
    """Get a message that may be worked on, and keep the right to it alive until that is done."""
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
    from flwr.supernode.runtime.run_clientapp import pull_task_input
    from httpx import HTTPError

    client, done = _client(address, token=token), threading.Event()
    threading.Thread(target=_beat, args=(client, done), daemon=True).start()
    try:
        message, context, _, _ = pull_task_input(client)
        arrived.put(_Work(client, message, context, time.monotonic(), done))
    except (*_FAILURES, HTTPError, ObjectPullError) as error:
        done.set()
        _say(f"a message did not arrive: {error!r}")


def _answer(work: _Work, app: App) -> None:
    """Do what a message asks, and send the answer, or the error that came of it."""
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode, SubStatus
    from flwr.supernode.runtime.run_clientapp import push_message, push_task_output
    from httpx import HTTPError

    metadata = work.message.metadata
    metadata.ttl = max(
        0.0, metadata.ttl - (time.monotonic() - work.since)
    )  # what is left of the round
    try:
        reply, status, details = app(work.message, work.context), SubStatus.COMPLETED, ""
    except _FAILURES as error:
        details, status = f"{type(error).__name__}: {error}", SubStatus.FAILED
        _say(f"round {metadata.group_id}: {details}")
        reply = Message(
            Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, details), reply_to=work.message
        )
    try:
        push_message(work.client, reply, work.context)
        push_task_output(work.client, work.context, status, details)
    except (*_FAILURES, HTTPError) as error:
        _say(
            f"an answer could not be sent: {error!r}"
        )  # the SuperNode gave the message up, or is gone
    finally:
        work.done.set()
        work.client.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _beat(client: RuntimeHttpClient, done: threading.Event) -> None:
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
    from httpx import HTTPError

    while not done.wait(_BEAT):
        with suppress(
            HTTPError
        ):  # who does not hear it gives the task up, and the server hears that
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


def _client(
    address: str, *, secret: bytes | None = None, token: str | None = None
) -> RuntimeHttpClient:
    """A connection to a SuperNode on this machine.

    To ask for work, or to do what the token is for.
    """
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.runtime import RuntimeHttpClient

    interceptors: list[Any] = [RuntimeVersionHttpInterceptor(component_name="fedloop")]
    if secret is not None:
        interceptors.append(
            SuperExecAuthHttpInterceptor(
                master_secret=secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
            )
        )
    if token is not None:
        interceptors.append(RuntimeTokenHttpInterceptor(token))
    return RuntimeHttpClient.from_server_address(
        server_address=address, insecure=True, root_certificates=None, interceptors=interceptors
    )


def main(arguments: Sequence[str]) -> None:
    """SECRET-FILE ADDRESS ...; until SIGTERM."""
    secret, *addresses = arguments
    end_on_sigterm()
    run_tasks(addresses, Path(secret).read_bytes(), node_app())


def node_app() -> App:
    """The ClientApp as a function, with the slow imports done.

    The first round should not have to wait for them.
    """
    app = client_app()
    for package in ("transformers", "peft"):
        import_module(package)
    return lambda message, context: app(message=message, context=context)


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception would: blocks that clean up are left."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


if __name__ == "__main__":
    main(sys.argv[1:])
