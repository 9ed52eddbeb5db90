"""The ClientApp: train the LoRA on this node's data, and send the change and the evidence back.

The base model is loaded once.

What a node trains on is said in its own node config, never by the server:
    data    a source as in a configuration (fedloop.data.corpora): JSONL, JSON, CSV, Parquet, ...
    experiment, partition-id    instead, for rehearsals: a run's folder and a number, that client's
                                part of the experiment's sources
    base    the base model on this machine, instead of what the server calls it
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraprobe.adapters.layout import Layout
from loraprobe.featurizer import FeatureRecipe, Featurizer

from ..client.client import ClientTrainer, Trained
from ..client.folding import FoldedBase
from ..client.training import quiet, read_adapter
from ..data.corpora import load_corpus
from ..data.examples import Example
from ..errors import ConfigError, EngineError, MissingExtra
from ..run.build import build_clients, load_adapted
from ..run.folder import read_config
from .agreement import Agreement
from .messages import Task, pack_reply, unpack_task

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp


def client_app() -> ClientApp:
    """A ClientApp that answers "train" messages of `EngineStrategy`.

    In one process it loads the base model once (`fedloop flower node`); Flower's own SuperNode
    starts a process for every message, which works too and loads it every time.

    Raises:
        MissingExtra: flwr is not installed.
    """
    try:
        from flwr.app import Message
        from flwr.clientapp import ClientApp
    except ImportError as error:
        raise MissingExtra("flwr", "flower", "the Flower engine") from error
    app = ClientApp()
    trainer = NodeTrainer()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(
            trainer.answer(message.content, context.node_config, message.metadata.ttl),
            reply_to=message,
        )

    return app


class NodeTrainer:
    """Plays the client of one node, or of several that share a process and its base model."""

    def __init__(self) -> None:
        self._member: _Member | None = None
        self._examples: dict[tuple[str, ...], Sequence[Example]] = {}

    def answer(self, content: RecordDict, node_config: Mapping[str, Any], ttl: float) -> RecordDict:
        """Do what a message asks.

        Args:
            ttl: seconds until nobody waits for the reply any more; training stops between two steps
                then.

        Raises:
            ConfigError, DataError: the node config, or what it names.
            EngineError: the time is up.
            LayoutMismatch, MessageError: the server means another base model, or speaks another
                version.
        """
        deadline = time.monotonic() + ttl
        task, agreement = unpack_task(content)
        examples = self._data(node_config)
        base = node_config.get("base")
        if self._member is None or (self._member.agreement, self._member.base) != (agreement, base):
            self._member = None  # the former model goes before the next one comes
            self._member = _Member(agreement, base)
        return pack_reply(self._member.train(task, examples, deadline), task, agreement)

    def _data(self, node_config: Mapping[str, Any]) -> Sequence[Example]:
        """This node's examples, read once."""
        source = tuple(
            str(node_config.get(name, "")) for name in ("data", "experiment", "partition-id")
        )
        if source not in self._examples:
            self._examples[source] = _examples(*source)
        return self._examples[source]


def _examples(data: str, experiment: str, partition: str) -> Sequence[Example]:
    if data and not experiment:
        return load_corpus(data).examples
    if experiment and not data and partition.isdecimal():
        clients = build_clients(read_config(Path(experiment)))
        if int(partition) < len(clients):
            return clients[int(partition)].examples
        raise ConfigError(
            f"partition-id: got {partition}; expected a number below {len(clients)}, the number of"
            f" clients in {experiment}"
        )
    raise ConfigError(
        "the node config names no data; expected data, or experiment with a partition-id (a whole"
        " number), and not both"
    )


class _Member:
    """The base model with a LoRA on it, as one agreement wants it."""

    def __init__(self, agreement: Agreement, base: str | None) -> None:
        quiet()
        self.agreement = agreement
        self.base = base
        settings = agreement.model
        if base is not None:
            settings = settings.model_copy(update={"base": base, "revision": None})
        self._model, self._tokenizer = load_adapted(
            settings, agreement.lora, frozen_a=agreement.frozen_a
        )
        self._folded = FoldedBase(self._model)
        adapter = read_adapter(self._model, agreement.base_model)
        agreement.check_layout(adapter)
        recipe = FeatureRecipe(factors=agreement.factors)
        self._read = Featurizer(
            recipe, Layout.of(adapter, agreement.modules, agreement.factors), frozenset(adapter)
        )

    def train(self, task: Task, examples: Sequence[Example], deadline: float) -> Trained:
        """One round, until the deadline."""
        agreement = self.agreement
        self._folded.set(task.residual)
        # Read for shadows only, and then it is sent.
        initial = task.lora if task.initial is None else task.initial
        trainer = ClientTrainer(
            self._model,
            self._tokenizer,
            initial,
            agreement.evidence,
            self._read,
            agreement.shadow,
            agreement.shadow_examples,
            self._folded.unfolded,
        )
        change = task.change.adjuster(self._model, agreement.weights, task.lora)

        def adjust(parameters: list[torch.nn.Parameter]) -> None:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"round {task.round} is over: its time was up before this node had trained"
                )
            if change is not None:
                change(parameters)

        return trainer.train(
            "this node",
            examples,
            task.lora,
            task.training,
            task.seed,
            wanted=task.wanted,
            adjust=adjust,
        )
