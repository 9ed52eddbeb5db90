"""A whole run of a stock strategy in the wrapper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedloop.plugins import rejected
from fedloop.plugins.flower import defended
from tests.helpers import plugged


class OneProcess(Grid):
    """Flower's Grid without a network: every message is answered by the ClientApp here and now."""

    run = set_run = create_message = push_messages = pull_messages = None

    def __init__(self, app: ClientApp) -> None:
        self.app = app

    def get_node_ids(self) -> list[int]:
        return [*map(int, plugged.CLIENTS)]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in self.get_node_ids()}
        return [self.app(message, contexts[message.metadata.dst_node_id]) for message in messages]


def client_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = message.content["config"]["server-round"]
        state = plugged.tensors_of(message.content["arrays"])
        change = plugged.delta(100 * number + context.node_id, malicious=context.node_id > 3)
        trained = plugged.arrays_record({key: state[key] + change[key] for key in state})
        metrics = MetricRecord({"num-examples": 40, "loss": 1.0 / number})
        return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 40, "loss": 1.0})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def test_a_whole_run_with_start_keeps_the_malicious_out_and_an_undefended_one_does_not() -> None:
    start = plugged.global_state()
    all_five = {"min_train_nodes": 5, "min_available_nodes": 5}
    records: list[Any] = []
    options = {"alpha": plugged.ALPHA, "on_record": records.append}

    def run(strategy: Strategy) -> Any:
        arrays = plugged.arrays_record(start)
        return strategy.start(OneProcess(client_app()), arrays, num_rounds=3)

    result = run(defended(FedAvg(**all_five), plugged.defense(), **options))
    assert [set(rejected(record)) for record in records] == [{"4", "5"}] * 3
    kept = [plugged.delta(100 * number + client) for number in (1, 2, 3) for client in (1, 2, 3)]
    ended = plugged.tensors_of(result.arrays)
    for key, value in start.items():
        expected = value + sum(change[key] for change in kept) / 3
        np.testing.assert_allclose(ended[key], expected, rtol=0, atol=1e-4)
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx(0.5)
    free = plugged.tensors_of(run(FedAvg(**all_five)).arrays)
    assert max(float((free[key] - ended[key]).abs().max()) for key in start) > 0.1
