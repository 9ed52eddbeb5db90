"""Rounds of updates, good and bad, and every adapter of fedloop.plugins playing them.

For the tests of the plugins.

Clients are "1" to "5", which is a number to OpenFedLLM, a node to Flower and a site to NVFlare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fedloop import ClientUpdate, Defense, RoundRecord
from fedloop.defense.levels import CumulativeLevel, Level
from fedloop.plugins import Reply, defend_round
from fedloop.plugins.flower import defended
from fedloop.plugins.nvflare import DefendedAggregator
from fedloop.plugins.openfedllm import defended as defended_openfedllm
from loraprobe import Adapter, Probe, factor_delta
from tests.helpers import federated, make, openfedllm, probes
from tests.helpers.flower_messages import CLIENTS, State, arrays_record, flower_round, tensors_of
from tests.helpers.flower_messages import Nodes as Nodes
from tests.helpers.flower_messages import failure as failure
from tests.helpers.flower_messages import instruction as instruction
from tests.helpers.flower_messages import reply as reply

BAD = ("4", "5")
ALPHA = 8  # r = 4, scaling 2
ROUNDS = 3
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = (
    1  # what a Flower process is told when it starts
)


class Sent(NamedTuple):
    """One reply: a change of the global state dict, and how many examples its client claims."""

    client: str
    count: Any
    delta: Any  # PEFT names -> tensors; or None for nothing

    def full(self, start: Mapping[str, torch.Tensor]) -> Any:
        """The trained weights, as far as they can be made."""
        if not isinstance(self.delta, dict):
            return self.delta
        fits = {
            name: start[name]
            for name, value in self.delta.items()
            if name in start and start[name].shape == value.shape
        }
        return {
            name: fits[name] + value if name in fits else value
            for name, value in self.delta.items()
        }


class Played(NamedTuple):
    """What an adapter made of all rounds."""

    records: list[RoundRecord]
    state: dict[str, torch.Tensor]
    memory: dict[str, Any]


def global_state(seed: int = 5) -> State:
    """The global LoRA before the first round: of an A that clients move little."""
    state = make.adapter(
        r=4, scaling=2.0, dims=federated.DIMS, seed=seed, base_model=federated.NAME
    ).state_dict()
    return {name: 8 * value if ".lora_A." in name else value for name, value in state.items()}


def delta(seed: int, malicious: bool = False, r: int = 4) -> State:
    """A change of it of the kind that `federated.fitted` tells apart; the tensors are shared."""
    return dict(_delta(seed, malicious, r))


@cache
def _delta(seed: int, malicious: bool, r: int) -> State:
    return probes.labelled_adapter(seed, malicious, **{**federated.LORA, "r": r}).state_dict()


def _changed(sent: Sent, change: Callable[[torch.Tensor], torch.Tensor]) -> Sent:
    first = next(iter(sent.delta))
    return sent._replace(delta={**sent.delta, first: change(sent.delta[first].clone())})


def _without_module(sent: Sent) -> Sent:
    return sent._replace(delta=dict(list(sent.delta.items())[2:]))


# How clients misbehave: reply -> replies.
def replies(
    state: State, seed: int = 0, clients: tuple[str, ...] = CLIENTS
) -> dict[str, tuple[int, State]]:
    """What honest clients send."""
    changes = {client: delta(seed + 10 * index) for index, client in enumerate(clients)}
    return {
        client: (40, {key: state[key] + change[key] for key in state})
        for client, change in changes.items()
    }


def as_replies(sent: dict[str, tuple[int, State]]) -> list[Reply]:
    return [Reply(client, count, state) for client, (count, state) in sent.items()]


WAYS: dict[str, Callable[[Sent, int], list[Sent]]] = {
    "honest": lambda sent, seed: [sent],
    "malicious": lambda sent, seed: [sent._replace(delta=delta(seed, True))],
    "nan": lambda sent, seed: [
        _changed(sent, lambda tensor: tensor.index_fill_(0, torch.tensor([0]), float("nan")))
    ],
    "infinite": lambda sent, seed: [_changed(sent, lambda tensor: tensor / 0)],
    "other rank": lambda sent, seed: [sent._replace(delta=delta(seed, r=2))],
    "missing": lambda sent, seed: [],
    "duplicate": lambda sent, seed: [sent, sent._replace(delta=delta(seed + 1))],
    "huge count": lambda sent, seed: [sent._replace(count=10**9)],
    "impossible count": lambda sent, seed: [sent._replace(count=2**60)],
    "no count": lambda sent, seed: [sent._replace(count=0)],
    "half a count": lambda sent, seed: [sent._replace(count=12.5)],
    "other keys": lambda sent, seed: [_without_module(sent)],
    "not LoRA": lambda sent, seed: [
        sent._replace(delta={**sent.delta, "lm_head.weight": torch.ones(2, 2)})
    ],
    "half a pair": lambda sent, seed: [sent._replace(delta=dict(list(sent.delta.items())[1:]))],
    "nothing in it": lambda sent, seed: [sent._replace(delta={})],
    "copies": lambda sent, seed: [sent._replace(delta=delta(999))],
}


def rounds(way: str, bad: tuple[str, ...] = BAD) -> list[list[Sent]]:
    """What is sent in every round: the bad clients misbehave in this way."""
    played = []
    for number in range(1, ROUNDS + 1):
        sent: list[Sent] = []
        for index, client in enumerate(CLIENTS):
            seed = 100 * number + 10 * index
            honest = Sent(client, 30 + 10 * index, delta(seed))
            sent += WAYS[way](honest, seed) if client in bad else [honest]
        played.append(sent)
    return played


@cache
def probe() -> Probe:
    """Frozen and fitted once."""
    return federated.fitted()


def defense(level: Level | None = None, **options: Any) -> Defense:
    """A new defence, that rejects outright unless another level is given."""
    return Defense(probe(), level or CumulativeLevel(), **options)


# --- the adapters


def by_hand(of: Defense, played: list[list[Sent]], state: State, folder: Any) -> Played:
    """The slow definition: Defense asked directly, weighted mean in float64.

    What can be read is read; the rest cannot be told here.
    """
    records = []
    for number, sent in enumerate(played, start=1):
        start = Adapter.from_state_dict(state, alpha=ALPHA)
        deltas = {
            one.client: factor_delta(Adapter.from_state_dict(one.full(state), alpha=ALPHA), start)
            for one in sent
        }
        updates = [ClientUpdate(one.client, one.count, deltas[one.client]) for one in sent]
        record = of.assess(number, updates, start=start, expected=CLIENTS)
        records.append(record)
        if not record.skipped:
            moved = {key: value.double() for key, value in state.items()}
            for client, weight in record.weights.items():
                if weight > 0:
                    changes = deltas[client].state_dict()
                    moved = {
                        key: value + weight * changes[key].double() for key, value in moved.items()
                    }
            state = {key: value.float() for key, value in moved.items()}
    return Played(records, state, memory(of))


def memory(defense: Defense) -> dict[str, Any]:
    """What a defence remembers, as numbers."""
    kept = defense._memory
    return {"round": kept.round, "level": kept.level, "features": kept.features}


def in_process(of: Defense, played: list[list[Sent]], state: State, folder: Any) -> Played:
    """`GlobalLoRA`, the server's half of fedloop's own engines, which take one readable update of
    a client.
    """
    from fedloop.client.client import Trained
    from fedloop.config import Config
    from fedloop.run.global_lora import GlobalLoRA
    from fedloop.run.plan import plan_round
    from fedloop.run.round import OpenRound

    config = Config.of(
        {
            "rounds": ROUNDS,
            "model": {"base": "none"},
            "clients": {"count": len(CLIENTS), "benign": ["builtin:benign"]},
        }
    )
    federation = GlobalLoRA(Adapter.from_state_dict(state, alpha=ALPHA), of, config)
    records = []
    for number, sent in enumerate(played, start=1):
        with OpenRound(federation, plan_round(config, number), CLIENTS) as arriving:
            for one in sent:
                start = federation.lora
                after = Adapter.from_state_dict(one.full(start.state_dict()), alpha=ALPHA)
                update = ClientUpdate(one.client, one.count, factor_delta(after, start))
                trained = Trained(update, 1.0, {"train": 0.0, "evidence": 0.0}, 0)
                arriving.receive(one.client, trained)
            records.append(arriving.close().record())
    return Played(records, federation.lora.state_dict(), memory(of))


def in_a_loop(of: Defense, played: list[list[Sent]], state: State, folder: Any) -> Played:
    """`defend_round` with tensors; duplicates need Replys, a mapping has none."""
    records = []
    for number, sent in enumerate(played, start=1):
        replies = [Reply(one.client, one.count, one.full(state)) for one in sent]
        done = defend_round(of, number, replies, state, alpha=ALPHA, expected=CLIENTS)
        records.append(done.record)
        state = done.state
    return Played(records, state, memory(of))


def in_a_loop_of_arrays(of: Defense, played: list[list[Sent]], state: State, folder: Any) -> Played:
    """`defend_round` with NumPy arrays and changes instead of weights."""
    arrays, records = arrays_of(state), []
    for number, sent in enumerate(played, start=1):
        replies = [
            Reply(one.client, one.count, arrays_of(one.delta), kind="factor_delta") for one in sent
        ]
        done = defend_round(of, number, replies, arrays, alpha=ALPHA, expected=CLIENTS)
        records.append(done.record)
        arrays = done.state
    return Played(
        records, {key: torch.from_numpy(value) for key, value in arrays.items()}, memory(of)
    )


def in_nvflare(kind: ParamsType) -> Callable[..., Played]:
    """`DefendedAggregator` between the events and calls of FLARE's FedAvg."""

    def play(of: Defense, played: list[list[Sent]], state: State, folder: Any) -> Played:
        probe().save_pretrained(folder / "probe")
        options = {field.name: getattr(of.level, field.name) for field in fields(of.level)}
        aggregator = DefendedAggregator(str(folder / "probe"), ALPHA, of.level.name, options)
        arrays = arrays_of(state)
        for number, sent in enumerate(played):
            aggregator.reset_stats()
            for client in CLIENTS:
                aggregator.handle_event(
                    AppEventType.BEFORE_TRAIN_TASK, task_for(client, arrays, number)
                )
            for one in sent:
                start = {key: torch.from_numpy(value) for key, value in arrays.items()}
                params = arrays_of(one.delta if kind == ParamsType.DIFF else one.full(start))
                aggregator.accept_model(
                    FLModel(
                        kind,
                        params,
                        meta={"client_name": one.client, "NUM_STEPS_CURRENT_ROUND": one.count},
                    )
                )
            arrays = aggregator.aggregate_model().params
        tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
        return Played(aggregator.records, tensors, memory(aggregator.defense))

    return play


def in_openfedllm(of: Defense, played: list[list[Sent]], state: State, folder: Any) -> Played:
    """`defended(global_aggregate)`; its lists have a place 0 that nobody takes."""
    records: list[RoundRecord] = []
    aggregate = defended_openfedllm(
        openfedllm.global_aggregate, of, alpha=ALPHA, on_record=records.append
    )
    fed_args = openfedllm.arguments(num_clients=len(CLIENTS) + 1)
    for number, sent in enumerate(played):
        local: list[Any] = [None] * fed_args.num_clients
        counts: list[Any] = [1] * fed_args.num_clients
        asked = [*map(int, CLIENTS)]
        for one in sent:
            if local[int(one.client)] is not None:
                asked.append(int(one.client))
            local[int(one.client)], counts[int(one.client)] = one.full(state), one.count
        state, _ = aggregate(
            fed_args, state, local, counts, asked, number, **openfedllm.memories(fed_args, state)
        )
    return Played(records, state, memory(of))


def in_flower(of: Defense, played: list[list[Sent]], state: State, folder: Any) -> Played:
    """`defended(FedAvg())` given messages."""
    records: list[RoundRecord] = []
    strategy = defended(FedAvg(), of, alpha=ALPHA, on_record=records.append)
    arrays = arrays_record(state)
    for number, sent in enumerate(played, start=1):
        start = tensors_of(arrays)
        result, _ = flower_round(
            strategy, number, arrays, [(one.client, one.count, one.full(start)) for one in sent]
        )
        assert result is not None
        arrays = result
    return Played(records, tensors_of(arrays), memory(of))


ADAPTERS: dict[str, Callable[..., Played]] = {
    "defend_round": in_a_loop,
    "defend_round, arrays": in_a_loop_of_arrays,
    "nvflare, full": in_nvflare(ParamsType.FULL),
    "nvflare, diff": in_nvflare(ParamsType.DIFF),
    "openfedllm": in_openfedllm,
    "flower": in_flower,
}


# --- what they are made of


def arrays_of(state: Any) -> Any:
    """NumPy arrays instead of tensors."""
    return (
        {key: value.numpy() for key, value in state.items()} if isinstance(state, dict) else state
    )


def task_for(client: str, params: State, number: int = 0) -> FLContext:
    """FLARE's context while it sends a training task to a client."""
    context, peer = FLContext(), FLContext()
    peer.set_prop(ReservedKey.IDENTITY_NAME, client, private=False, sticky=False)
    context.set_peer_context(peer)
    shareable = FLModelUtils.to_shareable(FLModel(ParamsType.FULL, params, current_round=number))
    context.set_prop(AppConstants.TRAIN_SHAREABLE, shareable, private=True, sticky=False)
    return context


def comparable(record: RoundRecord) -> RoundRecord:
    """The record as it is to be the same everywhere.

    Scores rounded, since global states differ in their last bits.
    """
    scores = {
        client: tuple(round(score, 4) for score in values)
        for client, values in record.scores.items()
    }
    weights = {client: round(weight, 6) for client, weight in record.weights.items()}
    factors = {client: round(factor, 6) for client, factor in record.factors.items()}
    return replace(
        record, scores=scores, weights=weights, factors=factors, seconds={}, losses={}, bytes={}
    )


def close_tree(left: Any, right: Any, tolerance: float = 1e-5) -> bool:
    """Whether two states agree, numbers up to a tolerance relative to the longest of them."""
    if isinstance(left, dict):
        return (
            isinstance(right, dict)
            and left.keys() == right.keys()
            and all(close_tree(left[key], right[key], tolerance) for key in left)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(
            close_tree(one, other, tolerance) for one, other in zip(left, right, strict=True)
        )
    if isinstance(left, np.ndarray | float):
        return bool(
            np.allclose(left, right, rtol=tolerance, atol=tolerance * float(np.abs(left).max()))
        )
    return bool(left == right)
