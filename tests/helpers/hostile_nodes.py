"""Nodes with registered keys that speak Flower's protocol to a real SuperLink, and answer whatever
they like.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supernode.fleet_http_connection import http_request_response
from httpx import HTTPStatusError

from tests.helpers.flowered import TRAINER, Sent


@dataclass
class Hostile:
    """One node: its private key, its data, and what becomes of its honest reply.

    Attributes:
        sent: the reply to each message that it was asked, or several, or none.
        late: whether the reply to the first message waits until the second message comes.
    """

    key: Path
    config: Mapping[str, Any]
    sent: Sent
    late: bool = False
    kept: list[Message] = field(default_factory=list)
    # statuses with which the SuperLink refused what it pushed
    turned_away: list[int] = field(default_factory=list)


class HostileNodes(threading.Thread):
    """All of them in one thread of this process, which share its model.

    Leaving the block disconnects them.
    """

    def __init__(self, address: str, authority: Path, nodes: list[Hostile]) -> None:
        super().__init__()
        self._address, self._authority, self._nodes = address, authority, nodes
        self._stopped, self.up = threading.Event(), threading.Event()

    def run(self) -> None:
        """Connect, and answer until stopped."""
        with ExitStack() as stack:
            ends = [stack.enter_context(self._connected(node)) for node in self._nodes]
            self.up.set()
            while not self._stopped.wait(0.1):
                for node, end in zip(self._nodes, ends, strict=True):
                    self._look(node, end)

    def _connected(self, node: Hostile) -> Any:
        private: Any = load_ssh_private_key(node.key.read_bytes(), None)
        return http_request_response(
            self._address,
            False,
            self._authority.read_bytes(),
            (private, private.public_key()),
            max_retries=3,
        )

    def _look(self, node: Hostile, end: tuple[Any, ...]) -> None:
        """Take a message, if there is one, and answer it."""
        _, receive, send, _, _, pull_object, push_object, confirm = end
        if (found := receive()) is None:
            return
        asked = arrived(*found, pull_object)
        confirm(asked.metadata.run_id, asked.metadata.message_id)
        replies = list(
            node.sent(
                asked, Message(TRAINER.answer(asked.content, node.config, 60.0), reply_to=asked)
            )
        )
        if node.late and not node.kept:
            node.kept = replies
            return
        for reply in [*node.kept, *replies] if node.late else replies:
            try:
                push(reply, send, push_object)
            except HTTPStatusError as error:
                node.turned_away.append(error.response.status_code)

    def __enter__(self) -> HostileNodes:
        self.start()
        assert self.up.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()


def arrived(
    message: Message, tree: ObjectTree, pull_object: Callable[[int, str], bytes]
) -> Message:
    """The message with its content, as a SuperNode puts it together."""
    identity, run = message.metadata.message_id, message.metadata.run_id
    contents = pull_objects(
        [part.object_id for part in iterate_object_tree(tree)], lambda name: pull_object(run, name)
    )
    whole = inflate_object_from_contents(identity, contents)
    assert isinstance(whole, Message)
    whole.metadata.__dict__["_message_id"] = identity
    return whole


def push(
    reply: Message,
    send: Callable[..., tuple[set[str], str]],
    push_object: Callable[[int, str, str, bytes], None],
) -> None:
    """A reply and its parts, as a SuperNode sends them."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    parts, run = get_all_nested_objects(reply), reply.metadata.run_id
    tree = get_object_tree(reply)
    wanted, session = send(reply, tree, 0.0)
    for name in wanted:
        with suppress(KeyError):
            push_object(run, session, name, parts[name].deflate())
