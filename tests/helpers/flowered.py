"""A Flower grid inside one process, for the tests of the Flower engine.

Real messages, really serialised, and nodes that misbehave.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedloop.config import Config
from fedloop.flower import strategy
from fedloop.flower.client import NodeTrainer
from fedloop.flower.nodes import Node, write_nodes
from fedloop.flower.server import serve
from fedloop.run.build import build_clients, build_federation, roles_of
from fedloop.run.folder import RunFolder
from fedloop.run.plan import plan_round
from fedloop.run.run import RunResult
from loraprobe import Probe, fit_probe
from loraprobe.adapters.layout import pack
from tests.helpers.federated import Files, settings

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
    1,
    1,
    1,
)  # of the server: a message is sent by the task of its process

TRAINER = NodeTrainer()  # keeps the last model it loaded


def vector(result: RunResult) -> torch.Tensor:
    """The final global LoRA, packed."""
    return pack(result.adapter)[0]


Sent = Callable[
    [Message, Message], Sequence[Message]
]  # what a node was asked, its honest reply -> what arrives of it


def honest(asked: Message, reply: Message) -> Sequence[Message]:
    return [reply]


def wired(message: Message) -> Message:
    """The message as it comes out of Flower's object store at the other end."""
    identity = message.metadata.message_id
    found = inflate_object_from_contents(
        message.object_id,
        {name: one.deflate() for name, one in get_all_nested_objects(message).items()},
    )
    assert isinstance(found, Message)
    found.metadata.__dict__["_message_id"] = identity
    return found


class FakeGrid(Grid):
    """Nodes that have trained when a message is pushed, and answer what `behaviour` makes of their
    honest replies.

    Attributes:
        asked: every message that was pushed.
    """

    def __init__(
        self,
        configs: Mapping[int, Mapping[str, Any]],
        behaviour: Mapping[int, Sent] | None = None,
        trainer: NodeTrainer | None = None,
    ) -> None:
        self.configs, self.behaviour, self.trainer = (
            dict(configs),
            dict(behaviour or {}),
            trainer or TRAINER,
        )
        self.asked: list[Message] = []
        self._replies: dict[str, Message] = {}
        self.online = set(configs)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_: Any, **__: Any) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self.asked.append(message)
            identities.append(message.object_id)
            self.reply(message)  # nobody's deadline is running yet
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        [identity] = message_ids
        message = next(one for one in self.asked if one.metadata.message_id == identity)
        node = message.metadata.dst_node_id
        sent = self.behaviour.get(node, honest)(message, self.reply(message))
        return [wired(one) if one.has_content() or one.has_error() else one for one in sent]

    def reply(self, message: Message) -> Message:
        """What an honest node sends, however long it takes."""
        identity = message.metadata.message_id
        if identity not in self._replies:
            arrived = wired(message)
            content = TRAINER.answer(
                arrived.content, self.configs[message.metadata.dst_node_id], ttl=1e6
            )
            self._replies[identity] = Message(content, reply_to=arrived)
        return self._replies[identity]


class Deployment:
    """An experiment on a fake grid, in a folder: nodes 1000, 1001, ...

    Play the clients in their order.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any], **settings: Any) -> None:
        self.config = Config.of(values)
        self.clients = build_clients(self.config)
        self.folder = folder / "run"
        RunFolder.create(self.folder, self.config, roles_of(self.clients)).close()
        self.nodes = {client.client_id: 1000 + index for index, client in enumerate(self.clients)}
        write_nodes(
            folder / "nodes.json",
            {name: Node(node, f"key of {name}") for name, node in self.nodes.items()},
        )
        self.run_config = {
            "config": str(self.folder / "config.json"),
            "folder": str(self.folder),
            "nodes": str(folder / "nodes.json"),
            "round-timeout": 60.0,
            "connect-timeout": 0.3,
            **settings,
        }
        self.configs = {
            node: {"experiment": str(self.folder), "partition-id": index}
            for index, node in enumerate(self.nodes.values())
        }

    def serve(
        self, behaviour: Mapping[str, Sent] | None = None, grid: FakeGrid | None = None
    ) -> RunResult:
        """Play the run, looking for replies all the time."""
        with patch.object(strategy, "_POLL", 0.001):
            return serve(grid or self.grid(behaviour), self.run_config)

    def grid(self, behaviour: Mapping[str, Sent] | None = None) -> FakeGrid:
        """A grid with these nodes."""
        return FakeGrid(
            self.configs, {self.nodes[client]: sent for client, sent in (behaviour or {}).items()}
        )


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def telling_probe(files: Files) -> Probe:
    """A probe that was fitted on what sixteen clients of the tiny federation learnt.

    It tells the built-in malicious data from benign.
    """
    changes: dict[str, Any] = {
        "training": {"steps": 4, "batch_size": 4},
        "clients": {"count": 16, "malicious": 8, "examples": 12},
    }
    config = Config.of(settings(files, seed=5, **changes))
    federation, clients, plan = (
        build_federation(config),
        build_clients(config),
        plan_round(config, 1),
    )
    deltas = [
        federation._trainer.train(
            client.client_id, client.examples, federation.lora, plan.training, seed, wanted=False
        ).delta
        for client, seed in zip(clients, plan.seeds, strict=True)
    ]
    labels = [client.label for client in clients]
    return fit_probe(
        deltas, labels, recipe="all_b", groups=[client.client_id for client in clients]
    )


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bool:
    """Whether a client that trusts this authority takes the server for what it says it is."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    finished = 0
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
                finished += 1
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                return False
    return finished >= 2
