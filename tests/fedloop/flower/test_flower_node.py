"""One node's half of the Flower engine.

Which data and which base model it takes, and what it refuses to do for a server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from fedloop.client.client import Trained
from fedloop.client.training import LocalTraining
from fedloop.config import Config
from fedloop.data.files import read_file
from fedloop.errors import ConfigError, EngineError, MessageError
from fedloop.flower.agreement import Agreement
from fedloop.flower.client import NodeTrainer, client_app
from fedloop.flower.messages import Task, pack_task, unpack_reply, unpack_task
from fedloop.run.build import build_clients, build_federation, roles_of
from fedloop.run.folder import RunFolder
from fedloop.run.server_state import GradientChange
from loraprobe.errors import DataError, LayoutMismatch
from tests.helpers import tiny
from tests.helpers.federated import Files, defended, settings, vector
from tests.helpers.flowered import wired

TRAINING = LocalTraining(5e-3, 3, 2, 40)
ROWS = [{"instruction": f"count to {n}", "response": f"it is {n}"} for n in range(5)]


class Server:
    """A federation that has something to be done."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.config = Config.of(values)
        self.federation = build_federation(self.config)
        self.agreement = Agreement.of(self.config, self.federation, "float32")

    def task(self, wanted: bool = False, **fields: Any) -> Task:
        initial = self.federation.initial if wanted and self.agreement.shadows else None
        return replace(
            Task(3, "a nonce", TRAINING, 11, wanted, self.federation.lora, initial), **fields
        )

    def message(self, task: Task, ttl: float = 60.0) -> Message:
        message = Message(pack_task(task, self.agreement), 5, MessageType.TRAIN, ttl=ttl)
        message.metadata.__dict__["_message_id"] = message.object_id
        return wired(message)

    def answer(
        self,
        trainer: NodeTrainer,
        config: Mapping[str, Any],
        task: Task | None = None,
        ttl: float = 60.0,
    ) -> Trained:
        task = task or self.task()
        return unpack_reply(
            trainer.answer(self.message(task).content, config, ttl), "c", task, self.agreement
        )

    def expected(self, examples: Any, task: Task | None = None) -> torch.Tensor:
        task = task or self.task()
        adjust = task.change.adjuster(self.federation._model, self.agreement.weights, task.lora)
        one = self.federation._trainer.train(
            "c", examples, task.lora, task.training, task.seed, wanted=task.wanted, adjust=adjust
        )
        return vector(one.delta)


@pytest.fixture(scope="module")
def server(tiny_files: Files) -> Server:
    return Server(settings(tiny_files))


@pytest.fixture(scope="module")
def trainer() -> NodeTrainer:
    return NodeTrainer()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "with a space.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_a_node_trains_on_its_own_file(server: Server, trainer: NodeTrainer, data: Path) -> None:
    one = server.answer(trainer, {"data": str(data)})
    assert torch.equal(vector(one.delta), server.expected(read_file(data).examples))
    assert (one.update.client_id, one.update.num_examples, one.update.steps) == ("c", 6, ())
    assert one.seconds["train"] > 0


def test_in_a_rehearsal_it_plays_one_client_of_an_experiment(
    server: Server, trainer: NodeTrainer, tmp_path: Path
) -> None:
    clients = build_clients(server.config)
    RunFolder.create(tmp_path / "run", server.config, roles_of(clients))
    for index in (0, 3):
        one = server.answer(trainer, {"experiment": str(tmp_path / "run"), "partition-id": index})
        assert torch.equal(vector(one.delta), server.expected(clients[index].examples))


def test_a_node_may_have_the_base_model_elsewhere(
    server: Server, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    elsewhere = replace(
        server.agreement,
        model=server.agreement.model.model_copy(update={"base": str(tmp_path / "empty")}),
    )
    content = wired(Message(pack_task(server.task(), elsewhere), 5, MessageType.TRAIN)).content
    with pytest.raises(DataError, match="cannot load the base model"):
        NodeTrainer().answer(content, {"data": str(data)}, 60.0)
    reply = NodeTrainer().answer(
        content, {"data": str(data), "base": str(tiny.saved(tmp_path / "copy"))}, 60.0
    )
    assert torch.equal(
        vector(unpack_reply(reply, "c", server.task(), elsewhere).delta),
        server.expected(read_file(data).examples),
    )


def test_another_base_model_is_refused_before_it_trains(
    server: Server, data: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for width, layers, error in (
        (16, 2, LayoutMismatch),
        (32, 1, LayoutMismatch),
        (32, 3, MessageError),
    ):
        shape = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "vocab_size": tiny.VOCABULARY,
            "intermediate_size": 48,
        }
        folder = tmp_path / f"{width}-{layers}"
        LlamaForCausalLM(
            LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
        ).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        with pytest.raises(error):
            server.answer(NodeTrainer(), {"data": str(data), "base": str(folder)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "the node config names no data"),
        ({"experiment": "run"}, "the node config names no data"),
        ({"experiment": "run", "partition-id": -1}, "the node config names no data"),
        ({"data": "a", "experiment": "run", "partition-id": 0}, "and not both"),
        ({"data": "absent.jsonl"}, "got source 'absent.jsonl'"),
    ],
)
def test_a_node_that_does_not_know_its_data_says_so(
    config: dict[str, Any], message: str, server: Server, trainer: NodeTrainer
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        server.answer(trainer, config)


def test_a_partition_that_is_not_there_is_told(
    server: Server, trainer: NodeTrainer, tmp_path: Path
) -> None:
    RunFolder.create(tmp_path / "run", server.config, {})
    with pytest.raises(ConfigError, match="partition-id: got 4; expected a number below 4"):
        server.answer(trainer, {"experiment": str(tmp_path / "run"), "partition-id": 4})


def test_training_ends_with_the_round(server: Server, trainer: NodeTrainer, data: Path) -> None:
    server.answer(trainer, {"data": str(data)})  # the model is loaded now
    began = time.monotonic()
    long = server.task(training=replace(TRAINING, steps=100_000))
    with pytest.raises(EngineError, match="round 3 is over"):
        server.answer(trainer, {"data": str(data)}, long, ttl=0.5)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("server_optimiser", ["fedprox", "scaffold"])
def test_what_the_server_optimiser_asks_reaches_the_gradients(
    server_optimiser: str, server: Server, trainer: NodeTrainer, data: Path
) -> None:
    size = server.agreement.layout.size
    correction = torch.randn(size, generator=torch.Generator().manual_seed(0))
    change = (
        GradientChange(proximal=50.0)
        if server_optimiser == "fedprox"
        else GradientChange(correction=correction)
    )
    task = server.task(change=change)
    one = server.answer(trainer, {"data": str(data)}, task)
    assert torch.equal(vector(one.delta), server.expected(read_file(data).examples, task))
    # negative control
    assert not torch.equal(vector(one.delta), server.expected(read_file(data).examples))


def test_evidence_holds_what_the_probe_reads_and_nothing_else(
    tiny_files: Files, data: Path
) -> None:
    server = Server(settings(tiny_files, defense=defended(tiny_files, "step")))
    task = server.task(wanted=True)
    content = NodeTrainer().answer(server.message(task).content, {"data": str(data)}, 60.0)
    read = sum(slot.size for slot in server.agreement.layout.slots if slot.factor == "B")
    assert content.array_records["arrays"]["evidence"].shape == (3 * read,)
    steps = unpack_reply(content, "c", task, server.agreement).update.steps
    assert len(steps) == 3
    assert all(pair.B.shape for pair in steps[0].values())
    with pytest.raises(ValueError, match="not part of the evidence"):
        _ = next(iter(steps[0].values())).A


def test_a_client_app_answers_flowers_messages(server: Server, data: Path) -> None:
    app, message = client_app(), server.message(server.task())
    context = Context(
        run_id=1, node_id=5, node_config={"data": str(data)}, state=RecordDict(), run_config={}
    )
    reply = app(message=message, context=context)
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert (
        unpack_reply(reply.content, "c", server.task(), server.agreement).update.num_examples == 6
    )


def test_messages_of_another_version_are_told_apart(server: Server, trainer: NodeTrainer) -> None:
    content = server.message(server.task()).content
    assert unpack_task(content)[1] == server.agreement
    for changes, message in (
        ({"protocol": 2}, "got protocol 2; expected 1: install the same version"),
        ({"agreement": '{"model": {}}'}, "no agreement that this version"),
        ({"agreement": "no JSON"}, "no agreement that this version"),
        ({"task": "{}"}, "no task that this version"),
        ({"task": json.dumps({"training": {"steps": 1, "speed": 2}})}, "no task that this version"),
    ):
        other = RecordDict(
            {
                "arrays": content.array_records["arrays"],
                "config": ConfigRecord({**dict(content.config_records["config"]), **changes}),
            }
        )
        with pytest.raises(MessageError, match=message):
            trainer.answer(other, {"data": "x"}, 60.0)
    with pytest.raises(MessageError, match="got no record 'config'"):
        trainer.answer(RecordDict({"arrays": content.array_records["arrays"]}), {"data": "x"}, 60.0)
