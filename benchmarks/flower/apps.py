"""What runs inside Flower's processes for `benchmarks.flower.cost`.

One ServerApp for every way, and a ClientApp for each kind of message.

Clients train nothing: they answer with what they were sent plus random numbers, so that what is
measured is what it costs to move and average an adapter. Everything else is the real thing:
`EngineStrategy` with a defence, records and checkpoints on one side, Flower's own FedAvg on the
other. The ways take turns, a round each, so that whatever else the machine does is shared by all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.common import random_probe
from benchmarks.flower.counted_wire import carried
from fedloop.client.client import Trained
from fedloop.config import Config
from fedloop.defense.defense import Defense
from fedloop.defense.levels import CumulativeLevel
from fedloop.defense.types import ClientUpdate
from fedloop.flower.agreement import Agreement
from fedloop.flower.deploy.runner import end_on_sigterm, run_tasks
from fedloop.flower.messages import pack_reply, unpack_task
from fedloop.flower.nodes import read_nodes
from fedloop.flower.settings import EngineSettings
from fedloop.flower.strategy import EngineStrategy
from fedloop.run.folder import RunFolder
from fedloop.run.global_lora import GlobalLoRA
from fedloop.run.plan import plan_round
from fedloop.run.run import Run
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import unpack
from loraprobe.adapters.pair import LoRAPair

LAYERS, WIDTH = 32, 1000
MODULES = tuple(
    [f"self_attn.{name}_proj" for name in "qkvo"]
    + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
)
TENSORS = 2 * LAYERS * len(MODULES)
CLIENTS, EXAMPLES = 2, 100
_TURN, _LOOK = "turn", 0.02


class Way(NamedTuple):
    """How an adapter travels: with which strategy, and as what."""

    ours: bool
    wire: str = "float32"
    packed: bool = True


class Task(NamedTuple):
    """A run: its way, and how long."""

    way: Way
    rank: int
    rounds: int
    timeout: float


WAYS = {
    "fedloop, float32": Way(True),
    "fedloop, float16": Way(True, "float16"),
    "FedAvg, tensor by tensor": Way(False, packed=False),
    "FedAvg, one array": Way(False),
}


def adapter(rank: int) -> Adapter:
    """A random LoRA of 448 tensors: 32 layers of seven square modules of width 1,000.

    4 * 448,000 * rank bytes in float32.
    """
    rng = torch.Generator().manual_seed(0)
    pairs = {
        f"model.layers.{layer}.{module}": LoRAPair(
            torch.rand(rank, WIDTH, generator=rng), torch.rand(WIDTH, rank, generator=rng), 2.0
        )
        for layer in range(LAYERS)
        for module in MODULES
    }
    return Adapter(pairs, kind="weights", base_model="none")


# --- the server


class Turns:
    """Whose round it is: a file with a name, passed on in a fixed order."""

    def __init__(self, folder: Path, name: str, order: Iterable[str]) -> None:
        self._file, self._name, self._order = folder / _TURN, name, list(order)

    def wait(self) -> None:
        """Until it is this one's turn."""
        while self._file.read_text(encoding="utf-8") != self._name:
            time.sleep(_LOOK)

    def pass_on(self) -> None:
        """It is the next one's."""
        following = self._order[(self._order.index(self._name) + 1) % len(self._order)]
        part = self._file.with_suffix(".part")
        part.write_text(following, encoding="utf-8")
        part.replace(self._file)


class Timed:
    """A strategy whose rounds wait for their turn and are written down.

    From the first message's making to the new global adapter.
    """

    turns: Turns
    log: Path
    counters: Path

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy's own, once it is its turn."""
        self.turns.wait()
        self._wire, self._began = carried(self.counters), time.perf_counter()
        return list(super().configure_train(server_round, arrays, config, grid))  # type: ignore[misc]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the strategy's own, which goes on without whoever is missing; the row says who was."""
        heard = list(replies)
        result: tuple[ArrayRecord | None, MetricRecord | None] = super().aggregate_train(
            server_round, heard
        )  # type: ignore[misc]
        seconds, (up, down) = time.perf_counter() - self._began, carried(self.counters)
        row = {
            "round": server_round,
            "seconds": round(seconds, 3),
            "replies": sum(reply.has_content() for reply in heard),
            "errors": [reply.error.reason[:200] for reply in heard if reply.has_error()],
            "to_server": up - self._wire[0],
            "to_clients": down - self._wire[1],
            "load": round(os.getloadavg()[0], 1),
        }
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.turns.pass_on()
        return result


class TimedDefended(Timed, EngineStrategy):
    """Ours."""


class TimedFedAvg(Timed, FedAvg):
    """Flower's."""


def server_app() -> ServerApp:
    """A ServerApp whose run config names the way, the rank, the rounds, and where to write."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        of = context.run_config
        folder, name = Path(str(of["folder"])), str(of["way"])
        for kind in (TimedDefended, TimedFedAvg):
            kind.turns = Turns(folder, name, json.loads(str(of["order"])))
            kind.log = folder / f"{name}.jsonl"
            kind.counters = Path(str(of["counters"]))
        run = Task(WAYS[name], int(of["rank"]), int(of["rounds"]), float(of["timeout"]))
        if run.way.ours:
            play_ours(grid, run, folder / name, Path(str(of["nodes"])))
        else:
            play_stock(grid, run)

    return app


def play_ours(grid: Grid, run: Task, folder: Path, nodes: Path) -> None:
    """As `fedloop.flower.server.serve` does, but for a LoRA that is on no model."""
    lora = {"r": run.rank, "alpha": 2 * run.rank, "target_modules": ["q_proj"]}
    config = Config.of({"rounds": run.rounds, **EXPERIMENT, "lora": lora})
    initial = adapter(run.rank)
    delta = Adapter(dict(initial), kind="factor_delta", base_model=initial.base_model)
    trusting = random_probe(delta, intercept=-5.0, size=1e-3)  # every update is averaged
    federation = GlobalLoRA(initial, Defense(trusting, CumulativeLevel()), config)
    wire = run.way.wire
    settings = EngineSettings(round_timeout=run.timeout, wire=wire, max_empty_rounds=1)
    ids = {name: node.node_id for name, node in read_nodes(nodes).items()}
    with RunFolder.create(folder, config, {}) as kept, Run(config, federation, kept) as played:
        plan, agreement = partial(plan_round, config), Agreement.of(config, federation, wire)
        parts = (federation, ids, plan, agreement, settings, played.finish, played.ahead())
        TimedDefended(*parts).start(grid)
    refused = [record.reasons for record in played.records if record.reasons or record.skipped]
    if refused:
        raise RuntimeError(f"expected every client to count in every round; got {refused}")


EXPERIMENT: dict[str, Any] = {  # nothing of it is loaded
    "model": {"base": "none"},
    "training": {"lr": 1.0, "steps": 1, "batch_size": 1, "max_length": 8},
    "clients": {"count": CLIENTS, "benign": ["builtin:benign"]},
}


def play_stock(grid: Grid, run: Task) -> None:
    """FedAvg, as Flower's documentation uses it for a PEFT state dict."""
    state = adapter(run.rank).state_dict()
    if run.way.packed:
        state = {"adapter": torch.cat([tensor.reshape(-1) for tensor in state.values()])}
    strategy = TimedFedAvg(fraction_evaluate=0.0)
    strategy.start(grid, ArrayRecord(state), num_rounds=run.rounds, timeout=run.timeout)


# --- the clients


def stock_client() -> ClientApp:
    """A ClientApp for FedAvg, in a process of its own for every message, as in Flower's nodes."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()  # type: ignore[union-attr]
        moved = {name: tensor + 1e-3 * torch.rand(tensor.shape) for name, tensor in state.items()}
        metrics = MetricRecord({"num-examples": EXAMPLES, "train_loss": 1.0})
        return Message(
            RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message
        )

    return app


def our_client(message: Message, context: Context) -> Message:
    """What `fedloop.flower.client` answers, with random numbers in place of what training
    would have changed.
    """
    task, agreement = unpack_task(message.content)
    delta = unpack(
        1e-3 * torch.rand(agreement.layout.size), agreement.layout, base_model=agreement.base_model
    )
    update = ClientUpdate("this node", EXAMPLES, delta)
    trained = Trained(update, 1.0, {"train": 0.0, "evidence": 0.0}, 0)
    return Message(pack_reply(trained, task, agreement), reply_to=message)


if __name__ == "__main__":
    _secret, *_addresses = sys.argv[1:]
    end_on_sigterm()
    run_tasks(_addresses, Path(_secret).read_bytes(), our_client)
