"""The server's half as a Flower strategy.

Ask the clients of a round, wait until a deadline, read what is readable, weigh it.

    strategy = EngineStrategy(
        federation, nodes, partial(plan_round, config), agreement, settings, run.finish, run.ahead()
    )
    strategy.start(grid)

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
from dataclasses import dataclass
from typing import Any

from loraprobe.adapters.layout import pack

from ..defense.screening import LONGEST_REASON, UNREADABLE, reason
from ..errors import EngineError, MissingExtra
from ..run.global_lora import GlobalLoRA
from ..run.plan import RoundPlan
from ..run.round import OpenRound, Played
from .agreement import Agreement
from .arrays import encode, itemsize
from .messages import Encoder, Task, answers, pack_task, unpack_reply
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
_UNREADABLE_REPLY = 1  # the code of the error in place of a reply that cannot be put together


@dataclass(frozen=True)
class _Request:
    """One client's part of a round."""

    client: str
    task: Task
    message: Message


@dataclass(frozen=True)
class _SentRound:
    """What was sent, and who could not be sent anything."""

    plan: RoundPlan
    clients: tuple[str, ...]
    requests: Mapping[int, _Request]  # by node
    absent: Mapping[str, str]
    began: float
    sent: int


class EngineStrategy(FedAvg):
    """`GlobalLoRA`, hence a defence, any rule and any server optimiser, as a Flower strategy.

    Args:
        federation: holds the global LoRA; set to the state after the last finished round.
        nodes: client id -> Flower's node id, for every client of the federation, in the order that
            plans count in. Who is not in it takes no part. It is decided on the server, by
            registering keys; nothing that a node sends changes it.
        plan: a round's number -> who takes part and how they train.
        finish: called with every round that was played, after the global LoRA moved.
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
        finish: Callable[[Played], None],
        rounds: Iterable[int],
        *,
        malicious: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.federation = federation
        self.agreement = agreement
        self.settings = settings
        self._nodes = dict(nodes)
        self._clients = list(nodes)
        self._plan = plan
        self._finish = finish
        self._rounds = rounds
        self._malicious = list(malicious)
        self._open: _SentRound | None = None
        self._empty = 0
        self._started = False

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
        encoder = Encoder(self.agreement.wire)
        requests: dict[int, _Request] = {}
        for client, seed in zip(clients, plan.seeds, strict=True):
            node = self._nodes[client]
            if node in online:
                task = self._task(plan, client, seed, client in wanted)
                content = pack_task(task, self.agreement, encoder)
                message = Message(
                    content,
                    node,
                    MessageType.TRAIN,
                    group_id=str(server_round),
                    ttl=self.settings.round_timeout,
                )
                requests[node] = _Request(client, task, message)
        absent = {
            client: "missing: its node is not connected"
            for client in clients
            if self._nodes[client] not in online
        }
        sent = sum(
            len(array.data)
            for part in requests.values()
            for array in part.message.content.array_records["arrays"].values()
        )
        self._open = _SentRound(plan, clients, requests, absent, time.perf_counter(), sent)
        return [part.message for part in requests.values()]

    def _task(self, plan: RoundPlan, client: str, seed: int, wanted: bool) -> Task:
        initial = self.federation.initial if wanted and self.agreement.shadows else None
        return Task(
            plan.number,
            secrets.token_hex(16),
            plan.training,
            seed,
            wanted,
            self.federation.lora,
            initial,
            self.federation.asks(client),
            self.federation.residual,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Finish the round with these replies.

        The arrays are the global LoRA's, moved or as they were.

        Raises:
            EngineError: this round was not configured, or nobody sent anything usable for too long.
        """
        opened = self._open
        self._open = None
        if opened is None or opened.plan.number != server_round:
            raise EngineError(
                f"got replies to round {server_round}; expected configure_train of that round first"
            )
        malicious = [client for client in self._malicious if client in opened.clients]
        with OpenRound(self.federation, opened.plan, opened.clients) as arriving:
            for client, why in opened.absent.items():
                arriving.refuse(client, why)
            strangers = self._read(opened, replies, arriving)
            waited = time.perf_counter() - opened.began
            usable = len(arriving.clients)
            played = arriving.close(malicious)
        size = itemsize(self.agreement.wire)
        played.bytes["update"] = usable * self.agreement.layout.size * size
        played.bytes["to_clients"] = opened.sent
        played.seconds["exchange"] = waited
        if strangers:
            played.notes.append(f"{strangers} replies came from nodes that were not asked")
        self._finish(played)
        self._stop_if_empty(usable, played)
        factors = played.assessment.factors
        mean = sum(factors.values()) / len(factors)
        return self._arrays(), MetricRecord({"replies": usable, "mean-factor": mean})

    def _stop_if_empty(self, usable: int, played: Played) -> None:
        self._empty = 0 if usable else self._empty + 1
        if self._empty >= self.settings.max_empty_rounds:
            raise EngineError(
                f"nobody sent anything usable in {self._empty} rounds in a row, the last of them"
                f" round {played.assessment.round}:"
                f" {next(iter(played.reasons.values()), 'nobody was asked')}."
                " The run is saved; start it again once clients are back."
            )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nobody is asked: the global model is measured on the server, where nobody can lie about
        it.
        """
        return []

    def _read(self, opened: _SentRound, replies: Iterable[Message], arriving: OpenRound) -> int:
        """Pass on what each client sent, and why there is nothing of the others.

        Returns:
            how many replies came from nobody who was asked.
        """
        strangers = 0
        silent = {
            request.client: "missing: no reply before the round's deadline"
            for request in opened.requests.values()
        }
        heard: set[str] = set()
        for reply in replies:
            request = _sender(opened, reply)
            if request is None:
                strangers += 1
            elif reply.has_error():
                why = reply.error.reason or "an error without a reason"
                silent[request.client] = f"missing: {why}"
            elif not self._answers(reply, request):
                silent[request.client] = (
                    "the reply does not hold the nonce of its round's message: an old one, or not"
                    " this node's"
                )
            else:
                heard.add(request.client)
                self._hear(reply, request, arriving)
        for client, why in silent.items():
            if client not in heard:  # a reply that proves where it comes from comes first
                arriving.refuse(client, _plain(why))
        return strangers

    def _answers(self, reply: Message, request: _Request) -> bool:
        try:
            return answers(reply.content, request.task.nonce)
        except BROKEN:
            return True  # unreadable as a whole, which its reading will say

    def _hear(self, reply: Message, request: _Request, arriving: OpenRound) -> None:
        """Spool a reply, or refuse its client with what is wrong with it."""
        try:
            trained = unpack_reply(reply.content, request.client, request.task, self.agreement)
        except BROKEN as error:
            arriving.receive(request.client, _plain(reason(error)))
        else:
            arriving.receive(request.client, trained)

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

    def _exchange(self, grid: Grid, messages: Sequence[Message]) -> Iterator[Message]:
        """Send, and hand on replies as they come, until everybody has answered or the round is
        over.

        Every reply is fetched by a thread of its own: one that cannot be put together takes no
        other with it, and one that is announced but never arrives, for which Flower would wait
        hours, holds nobody up.
        """
        if not messages:
            return
        identities = list(grid.push_messages(messages))
        if len(identities) != len(messages):
            raise EngineError(
                f"the SuperLink took {len(identities)} of the round's {len(messages)} messages;"
                " they may be too large for it"
            )
        deadline = time.monotonic() + self.settings.round_timeout
        with _threads(len(messages)) as pool:
            waiting = {
                pool.submit(_fetch, grid, str(identity), deadline): message
                for identity, message in zip(identities, messages, strict=True)
                if identity
            }
            while waiting and (left := deadline - time.monotonic()) > 0:
                done, _ = wait(waiting, left, FIRST_COMPLETED)
                for future in done:  # forgotten once it is read: so is its reply
                    yield from _fetched(future, waiting.pop(future))

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
    replies: list[Message] = []
    while not replies and time.monotonic() < deadline:
        time.sleep(_POLL)
        replies = list(grid.pull_messages([identity]))
    return replies


def _fetched(future: Future[list[Message]], sent: Message) -> list[Message]:
    try:
        return future.result()
    except BROKEN as error:
        return [
            Message(Error(_UNREADABLE_REPLY, f"unreadable reply: {reason(error)}"), reply_to=sent)
        ]


def _plain(text: str) -> str:
    """A stranger's words as a record may hold them and a terminal may show them."""
    return "".join(character if character.isprintable() else " " for character in text)[
        :LONGEST_REASON
    ]


def _sender(opened: _SentRound, reply: Message) -> _Request | None:
    """Who was asked what this replies to.

    The server's own errors name no node, but the message they are about.
    """
    sender = opened.requests.get(reply.metadata.src_node_id)
    if sender is not None or not reply.has_error():
        return sender
    about = reply.metadata.reply_to_message_id
    requests = opened.requests.values()
    return next((part for part in requests if part.message.metadata.message_id == about), None)
