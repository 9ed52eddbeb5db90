"""The server's half as a Flower strategy.

Ask the clients of a round, wait until a deadline, read what is readable, weigh it.

    strategy = DefendedStrategy(federation, nodes, partial(plan_round, config), agreement, settings,
    run.finish, run.ahead()) strategy.start(grid)

A client is the node that Flower says a reply came from, and every message carries a nonce (see
`.messages`). Whatever else is wrong with a reply, an error of its client or none at all, is a
refused client with a reason in the record, and the round goes on.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from loraprobe.adapters.layout import pack
from loraprobe.errors import MissingExtra

from ..client.client import Trained
from ..defense.screening import LONGEST_REASON, UNREADABLE, reason
from ..defense.types import RoundRecord
from ..errors import EngineError
from ..run.round import GlobalLoRA
from ..run.simulate import RoundPlan
from .agreement import Agreement
from .arrays import encode, itemsize
from .messages import Task, answers, pack_task, unpack_reply
from .settings import EngineSettings

try:
    from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg, Result
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from httpx import HTTPStatusError
except ImportError as missing:
    raise MissingExtra("flwr", "flower", "the Flower engine") from missing

# What Flower raises while it puts a reply together whose parts do not fit: a client can send such.
BROKEN = (
    *UNREADABLE,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    DecodeError,
    HTTPStatusError,
)
_POLL = 0.25  # seconds between two looks for replies or nodes
_UNREADABLE_REPLY = (
    1  # the code of the error that stands in for a reply that cannot be put together
)


@dataclass(frozen=True)
class _Asked:
    """One client's part of a round."""

    client: str
    task: Task
    message: Message


@dataclass(frozen=True)
class _OpenRound:
    """What was sent, and who could not be sent anything."""

    plan: RoundPlan
    clients: tuple[str, ...]
    asked: Mapping[int, _Asked]  # by node
    absent: Mapping[str, str]
    began: float
    sent: int


class DefendedStrategy(FedAvg):
    """`GlobalLoRA`, hence a defence, any rule and any server optimiser, as a Flower strategy.

    Args:
        federation: holds the global LoRA; set to the state after the last finished round.
        nodes: client id -> Flower's node id, for every client of the federation, in the order that
            plans count in. Who is not in it takes no part. It is decided on the server, by
            registering keys; nothing that a node sends changes it.
        plan: a round's number -> who takes part and how they train.
        finish: called with every round's record, after the global LoRA moved.
        rounds: the numbers of the rounds to play: resumed runs do not start from 1.
        malicious: clients that play the configured attack on updates, in an experiment.
    """

    def __init__(
        self,
        federation: GlobalLoRA,
        nodes: Mapping[str, int],
        plan: Callable[[int], RoundPlan],
        agreement: Agreement,
        settings: EngineSettings,
        finish: Callable[[RoundRecord], None],
        rounds: Sequence[int],
        *,
        malicious: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.federation, self.agreement, self.settings = federation, agreement, settings
        self._nodes, self._clients, self._plan, self._finish = (
            dict(nodes),
            list(nodes),
            plan,
            finish,
        )
        self._rounds, self._malicious = list(rounds), list(malicious)
        self._open: _OpenRound | None = None
        self._empty, self._started = 0, False

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Any = None,
    ) -> Result:
        """Play the rounds. Only `grid` is used.

        Arrays, rounds and timeouts are the federation's, the run's and the settings' own.

        Raises:
            EngineError: nobody sent anything usable for `max_empty_rounds` rounds in a row; all of
                them are saved.
        """
        result = Result()
        result.arrays = self._arrays()
        for number in self._rounds:
            messages = list(self.configure_train(number, result.arrays, ConfigRecord(), grid))
            replies = self._exchange(grid, messages)
            arrays, metrics = self.aggregate_train(number, replies)
            result.arrays = arrays or result.arrays
            if metrics is not None:
                result.train_metrics_clientapp[number] = metrics
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each client of the round that is online.

        They live as long as the round.
        """
        plan = self._plan(server_round)
        clients = tuple(self._clients[index] for index in plan.chosen)
        wanted = self.federation.defense.wanted(clients)
        online = self._online(grid, [self._nodes[client] for client in clients])
        self._started = True
        asked: dict[int, _Asked] = {}
        for client, seed in zip(clients, plan.seeds, strict=True):
            node = self._nodes[client]
            if node in online:
                task = self._task(plan, client, seed, client in wanted)
                content = pack_task(task, self.agreement)
                group, ttl = str(server_round), self.settings.round_timeout
                asked[node] = _Asked(
                    client, task, Message(content, node, MessageType.TRAIN, group_id=group, ttl=ttl)
                )
        absent = {
            client: "missing: its node is not connected"
            for client in clients
            if self._nodes[client] not in online
        }
        sent = sum(
            len(array.data)
            for one in asked.values()
            for array in one.message.content.array_records["arrays"].values()
        )
        self._open = _OpenRound(plan, clients, asked, absent, time.perf_counter(), sent)
        return [one.message for one in asked.values()]

    def _task(self, plan: RoundPlan, client: str, seed: int, wanted: bool) -> Task:
        initial = self.federation.initial if wanted and self.agreement.shadows else None
        change, residual = self.federation.asks(client), self.federation.residual
        return Task(
            plan.number,
            secrets.token_hex(16),
            plan.training,
            seed,
            wanted,
            self.federation.lora,
            initial,
            change,
            residual,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Finish the round with these replies.

        The arrays are the global LoRA's, moved or as they were.

        Raises:
            EngineError: this round was not configured, or nobody sent anything usable for too long.
        """
        opened, self._open = self._open, None
        if opened is None or opened.plan.number != server_round:
            raise EngineError(
                f"got replies to round {server_round}; expected configure_train of that round first"
            )
        trained, refused, note = self._read(opened, replies)
        waited = time.perf_counter() - opened.began
        plan = opened.plan
        malicious = [client for client in self._malicious if client in opened.clients]
        record = self.federation.finish(
            plan.number,
            trained,
            opened.clients,
            malicious,
            plan.training,
            plan.generator,
            {**opened.absent, **refused},
        )
        update = len(trained) * self.agreement.layout.size * itemsize(self.agreement.wire)
        note = "; ".join(
            part
            for part in (
                record.note,
                note,
                "" if trained else "skipped: nobody sent anything usable",
            )
            if part
        )
        sent, seconds = (
            {**record.bytes, "update": update, "to_clients": opened.sent},
            {**record.seconds, "exchange": waited},
        )
        record = replace(record, bytes=sent, seconds=seconds, note=note)
        self._finish(record)
        self._empty = 0 if trained else self._empty + 1
        if self._empty >= self.settings.max_empty_rounds:
            raise EngineError(
                f"nobody sent anything usable in {self._empty} rounds in a row, the last of them"
                f" round {plan.number}: {next(iter(record.reasons.values()), 'nobody was asked')}."
                " The run is saved; start it again once clients are back."
            )
        return self._arrays(), MetricRecord(
            {
                "replies": len(trained),
                "mean-factor": sum(record.factors.values()) / len(record.factors),
            }
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nobody is asked: the global model is measured on the server, where nobody can lie about
        it.
        """
        return []

    def _read(
        self, opened: _OpenRound, replies: Iterable[Message]
    ) -> tuple[dict[str, Trained], dict[str, str], str]:
        """What each client sent, why there is nothing of the others, and what came from nobody who
        was asked.
        """
        read: dict[str, list[Trained | str]] = {one.client: [] for one in opened.asked.values()}
        weak: dict[
            str, str
        ] = {}  # reasons that give way to a reply that proves where it comes from
        strangers = 0
        for reply in replies:
            one = _sender(opened, reply)
            if one is None:
                strangers += 1
            elif reply.has_error():
                weak[one.client] = f"missing: {reply.error.reason or 'an error without a reason'}"
            else:
                self._hear(reply, one, read[one.client], weak)
        trained = {
            client: found[0]
            for client, found in read.items()
            if len(found) == 1 and isinstance(found[0], Trained)
        }
        refused = {
            client: weak.get(client, "missing: no reply before the round's deadline")
            for client, found in read.items()
            if not found
        }
        refused |= {
            client: found[0]
            for client, found in read.items()
            if len(found) == 1 and isinstance(found[0], str)
        }
        refused |= {
            client: f"duplicate: {len(found)} replies to one message; expected one"
            for client, found in read.items()
            if len(found) > 1
        }
        note = f"{strangers} replies came from nodes that were not asked" if strangers else ""
        return trained, {client: _plain(why) for client, why in refused.items()}, note

    def _hear(
        self, reply: Message, one: _Asked, read: list[Trained | str], weak: dict[str, str]
    ) -> None:
        """Put a reply, or what is wrong with it, where it belongs."""
        try:
            if answers(reply.content, one.task.nonce):
                read.append(unpack_reply(reply.content, one.client, one.task, self.agreement))
            else:
                weak[one.client] = (
                    "the reply does not hold the nonce of its round's message: an old one, or not"
                    " this node's"
                )
        except BROKEN as error:
            read.append(reason(error))

    def _online(self, grid: Grid, nodes: Collection[int]) -> set[int]:
        """Which of these nodes are connected.

        In the first round once all are, later once any is, or when the time is up.
        """
        deadline = time.monotonic() + self.settings.connect_timeout
        while True:
            online = set(grid.get_node_ids()).intersection(nodes)
            if (
                len(online) == len(nodes)
                or (online and self._started)
                or time.monotonic() >= deadline
            ):
                return online
            time.sleep(_POLL)

    def _exchange(self, grid: Grid, messages: Sequence[Message]) -> list[Message]:
        """Send, and wait until everybody has answered or the round is over.

        Every reply is fetched by a thread of its own: one that cannot be put together takes no
        other with it, and one that is announced but never arrives, for which Flower would wait
        hours, holds nobody up.
        """
        if not messages:
            return []
        identities = list(grid.push_messages(messages))
        if len(identities) != len(messages):
            raise EngineError(
                f"the SuperLink took {len(identities)} of the round's {len(messages)} messages;"
                " they may be too large for it"
            )
        replies: list[Message] = []
        deadline = time.monotonic() + self.settings.round_timeout
        with _threads(len(messages)) as pool:
            fetching = {
                pool.submit(_fetch, grid, str(identity), deadline): m
                for identity, m in zip(identities, messages, strict=True)
                if identity
            }
            waiting = set(fetching)
            while waiting and (left := deadline - time.monotonic()) > 0:
                done, waiting = wait(waiting, left, FIRST_COMPLETED)
                for one in done:
                    replies += _fetched(one, fetching[one])
        return replies

    def _arrays(self) -> ArrayRecord:
        return ArrayRecord({"lora": encode(pack(self.federation.lora)[0].numpy())[0]})


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that nobody waits for in the end."""
    pool = ThreadPoolExecutor(count, "reply")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _fetch(grid: Grid, identity: str, deadline: float) -> list[Message]:
    """The reply to a message, once it is there."""
    found: list[Message] = []
    while not found and time.monotonic() < deadline:
        time.sleep(_POLL)
        found = list(grid.pull_messages([identity]))
    return found


def _fetched(one: Future[list[Message]], asked: Message) -> list[Message]:
    try:
        return one.result()
    except BROKEN as error:
        return [
            Message(Error(_UNREADABLE_REPLY, f"unreadable reply: {reason(error)}"), reply_to=asked)
        ]


def _plain(text: str) -> str:
    """A stranger's words as a record may hold them and a terminal may show them."""
    return "".join(character if character.isprintable() else " " for character in text)[
        :LONGEST_REASON
    ]


def _sender(opened: _OpenRound, reply: Message) -> _Asked | None:
    """Who was asked what this replies to.

    The server's own errors name no node, but the message they are about.
    """
    one = opened.asked.get(reply.metadata.src_node_id)
    if one is None and reply.has_error():
        return next(
            (
                asked
                for asked in opened.asked.values()
                if asked.message.metadata.message_id == reply.metadata.reply_to_message_id
            ),
            None,
        )
    return one
