"""What Flower's strategies are given in the tests of the plug-ins: arrays, replies and failures."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

State = dict[str, Any]
CLIENTS = ("1", "2", "3", "4", "5")


class Nodes:
    """As much of a Flower Grid as strategies look at."""

    def get_node_ids(self) -> list[int]:
        return [*map(int, CLIENTS)]


def arrays_record(state: State) -> ArrayRecord:
    """A state dict as Flower sends it."""
    return ArrayRecord({key: Array(value.numpy()) for key, value in state.items()})


def tensors_of(record: ArrayRecord) -> State:
    """The inverse."""
    return {key: torch.from_numpy(array.numpy()) for key, array in record.items()}


def instruction(client: str) -> Message:
    """A training task to a node."""
    return Message(RecordDict(), dst_node_id=int(client), message_type="train")


def reply(client: str, count: Any, state: Any, **metrics: Any) -> Message:
    """What a node answers, as in Flower's examples."""
    content = RecordDict(
        {
            "arrays": arrays_record(state),
            "metrics": MetricRecord({"num-examples": count, **metrics}),
        }
    )
    return Message(content, reply_to=instruction(client))


def failure(client: str) -> Message:
    """What Flower answers for a node that raised."""
    return Message(Error(0, "it raised"), reply_to=instruction(client))


def flower_round(strategy: Strategy, number: int, arrays: ArrayRecord, sent: list[Any]) -> Any:
    """One round of training: sent are messages, or (client, count, state)."""
    messages = [one if isinstance(one, Message) else reply(*one) for one in sent]
    strategy.configure_train(number, arrays, ConfigRecord(), Nodes())
    return strategy.aggregate_train(number, messages)
