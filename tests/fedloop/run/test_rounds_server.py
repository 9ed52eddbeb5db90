"""Whole federations on the tiny Llama.

How LoRA factors are averaged, and what the server's optimiser does with the mean.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloop.config import Config
from fedloop.errors import DataError
from fedloop.run.build import build_clients, build_federation
from fedloop.run.federation import Federation
from fedloop.run.plan import plan_round
from fedloop.run.round import OpenRound
from fedloop.run.simulate import simulate
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta, factor_delta
from loraprobe.errors import ProbeFormatError
from tests.helpers.federated import Files, run, settings, untimed, vector

TRAINING = {"lr": 5e-2, "schedule": "constant"}


def effective(
    federation: Federation, adapter: Adapter, delta: Adapter | None = None
) -> dict[str, torch.Tensor]:
    """Every adapted weight of the model with this LoRA (and this change of it).

    Base + scaling B A.
    """
    worn = adapter if delta is None else add_delta(adapter, delta)
    weights = {}
    for module, pair in worn.items():
        base = federation._model.get_submodule(f"base_model.model.{module}.base_layer").weight
        A, B = (torch.from_numpy(pair.factor(factor)).double() for factor in ("A", "B"))
        weights[module] = base.detach().double().clone() + pair.scaling * B @ A
    return weights


@pytest.mark.parametrize(
    ("lora", "exact"), [("exact", True), ("factors", False), ("frozen_a", True)]
)
def test_the_new_global_model_is_the_mean_of_the_clients_models(
    lora: str, exact: bool, tiny_files: Files
) -> None:
    config = Config.of(settings(tiny_files, aggregation={"lora": lora}, training=TRAINING))
    federation, clients = build_federation(config), build_clients(config)
    for number in (1, 2, 3):
        plan = plan_round(config, number)
        chosen = [clients[index] for index in plan.chosen]
        seen: dict[str, dict[str, torch.Tensor]] = {}
        with OpenRound(federation, plan, [client.client_id for client in chosen]) as arriving:
            for index, trained in enumerate(federation.train(plan, chosen)):
                name = trained.update.client_id
                seen[name] = effective(federation, federation.lora, trained.delta)
                update = replace(trained.update, num_examples=1 + index)
                arriving.receive(name, replace(trained, update=update))
            record = arriving.close().record()
        after = effective(federation, federation.lora)
        for module, weight in after.items():
            mean = sum(record.weights[name] * one[module] for name, one in seen.items())
            apart = float(
                (weight - mean).norm() / (mean - effective_base(tiny_files, module)).norm()
            )
            assert (apart < 1e-5) is exact, (number, module, apart)
    # they do not all count alike
    assert sorted(record.weights.values()) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@cache
def base_model(files: Files) -> Any:
    from fedloop.client.training import load_base

    return load_base(str(files.base))[0]


def effective_base(files: Files, module: str) -> torch.Tensor:
    weight: torch.Tensor = base_model(files).get_submodule(module).weight.detach().double()
    return weight


@pytest.mark.slow
def test_a_frozen_a_never_moves_even_if_somebody_sends_another(tiny_files: Files) -> None:
    noise = {"update_attack": "gaussian", "update_attack_options": {"std": 1.0}}
    initial = run(tiny_files, rounds=1, training={"lr": 1e-30}).adapter

    def moved(**aggregation: Any) -> set[bool]:
        adapter = run(tiny_files, aggregation=aggregation, clients=noise).adapter
        assert all(pair.B.any() for pair in adapter.values())
        return {not np.array_equal(pair.A, initial[name].A) for name, pair in adapter.items()}

    for server in ("fedavg", "fedavgm", "scaffold"):
        assert moved(lora="frozen_a", server=server) == {False}
    assert moved() == {True}  # negative control


def test_fedprox_keeps_clients_near_the_start(tiny_files: Files) -> None:
    start = build_federation(Config.of(settings(tiny_files))).lora

    def moved(server: str = "fedprox", **proximal: float) -> torch.Tensor:
        result = run(
            tiny_files,
            rounds=1,
            aggregation={"server": server},
            training={"steps": 6, "lr": 1e-2, **proximal},
            clients={"count": 2, "malicious": 0},
        )
        return vector(factor_delta(result.adapter, start))

    near, far = moved(proximal=100.0), moved(proximal=0.0)
    assert near.norm() < 0.8 * far.norm()
    assert torch.equal(far, moved("fedavg"))  # with mu 0 it is FedAvg


@pytest.mark.parametrize("server", ["fedavgm", "fedadagrad", "fedyogi", "fedadam", "scaffold"])
def test_server_optimisers_change_the_run_and_remember_over_a_resume(
    server: str, tiny_files: Files, tmp_path: Path
) -> None:
    options = {} if server == "scaffold" else {"lr": 0.01}
    changes: dict[str, Any] = {"rounds": 3, "clients": {"sampled": 2}}
    chosen = {"aggregation": {"server": server, "server_options": options}}
    whole = run(tiny_files, **changes, **chosen)
    config = settings(tiny_files, **changes, **chosen, output={"folder": str(tmp_path)})

    def watch(what: str, number: int, client: str, value: float) -> None:
        if what == "client" and number > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, watch=watch)
    resumed = simulate(config)
    assert torch.equal(vector(resumed.adapter), vector(whole.adapter))
    assert [*map(untimed, resumed.records)] == [*map(untimed, whole.records)]
    assert not torch.equal(vector(whole.adapter), vector(run(tiny_files, **changes).adapter))


@pytest.mark.parametrize(
    ("defense", "error"),
    [
        ({"probe": "no/such/probe"}, ProbeFormatError),
        ({"behaviour": "none.jsonl", "behaviour_cut": 1.0}, DataError),
    ],
)
def test_what_a_defence_lacks_is_said_before_a_model_is_loaded(
    tiny_files: Files, defense: dict[str, Any], error: type[Exception]
) -> None:
    values = settings(tiny_files, defense=defense, model={"base": "/no/such/model"})
    with pytest.raises(error, match=r"probe|none.jsonl"):
        build_federation(Config.of(values))
