"""A Flower strategy behind the defence.

FedAdam, three honest nodes, and node 4, which trained on harmful answers.

    python examples/flower_strategy.py        # needs: pip install 'loraprobe[flower]'

Here a Grid without a network asks the ClientApp. Its updates are real: adapters of the zoo that
were fine-tuned on such data.
"""

import logging
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam
from flwr.supercore.task_identity import TaskIdentity

from fedloop import Defense
from fedloop.plugins.flower import DefendedStrategy
from loraprobe import load_adapter

ZOO = Path(__file__).resolve().parent.parent / "zoo"
NODES = {
    1: "benign-dolly_qa-dolly_qa",
    2: "benign-dolly_context-dolly_context",
    3: "benign-gsm8k-gsm8k",
    4: "malicious-harmbench-harmbench",
}
INITIAL = load_adapter(ZOO / "adapters/initial").state_dict()
app = ClientApp()


@app.train()
def train(message, context):
    state = message.content["arrays"].to_torch_state_dict()
    number = message.content["config"]["server-round"]
    after = load_adapter(ZOO / f"adapters/{NODES[context.node_id]}-100-{number}").state_dict()
    trained = ArrayRecord(
        {name: state[name] + (after[name] - INITIAL[name]) for name in INITIAL}
    )  # stands for local training
    return Message(
        RecordDict({"arrays": trained, "metrics": MetricRecord({"num-examples": 100})}),
        reply_to=message,
    )


class OneProcess(Grid):
    run = set_run = create_message = push_messages = pull_messages = None

    def get_node_ids(self):
        return self.nodes

    def send_and_receive(self, messages, *, timeout=None):
        return [
            app(message, Context(1, message.metadata.dst_node_id, {}, RecordDict(), {}))
            for message in messages
        ]


def start(strategy, nodes):
    OneProcess.nodes = nodes
    return strategy.start(
        OneProcess(), ArrayRecord(INITIAL), num_rounds=3
    ).arrays.to_torch_state_dict()


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel("ERROR")
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = (
        1  # what Flower tells its processes
    )
    strategies = [FedAdam(eta=0.01, fraction_evaluate=0.0) for _ in range(3)]
    defense = Defense(ZOO / "probes/linear", "cumulative")
    strategies[0] = DefendedStrategy(
        strategies[0], defense, alpha=16, on_record=lambda record: print(record.weights)
    )  # the line, in your ServerApp
    honest = start(strategies[2], [1, 2, 3])
    for name, strategy in zip(("defended", "undefended"), strategies, strict=False):
        apart = max(
            float((value - honest[key]).abs().max())
            for key, value in start(strategy, list(NODES)).items()
        )
        print(f"{name}: largest difference from a run of the honest nodes: {apart:.1e}")
