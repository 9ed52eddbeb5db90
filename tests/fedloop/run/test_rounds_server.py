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
from fedloop.run.build import build_clients, build_federation
from fedloop.run.federation import Federation
from fedloop.run.plan import plan_round
from fedloop.run.round import OpenRound
from fedloop.run.simulate import simulate
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta
from tests.helpers.federated import Files, run, settings, untimed, vector

TRAINING = {"lr": 5e-2, "schedule": "constant"}


def effective(
    federation: Federation, adapter: Adapter, delta: Adapter | None = None
) -> dict[str, torch.Tensor]:
    """Every adapted weight of the model with this LoRA (and this change of it).

    Base + scaling B A.
    """
    weights = {}
    for module, pair in adapter.items():
        A, B = (
            (pair.A, pair.B)
            if delta is None
            else (pair.A + delta[module].A, pair.B + delta[module].B)
        )
        base = federation._model.get_submodule(f"base_model.model.{module}.base_layer").weight
        product = torch.from_numpy(B).double() @ torch.from_numpy(A).double()
        weights[module] = base.detach().double().clone() + pair.scaling * product
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
    changes: dict[str, Any] = {
        "clients": {"update_attack": "gaussian", "update_attack_options": {"std": 1.0}}
    }
    for server in ("fedavg", "fedavgm", "scaffold"):
        frozen = run(tiny_files, aggregation={"lora": "frozen_a", "server": server}, **changes)
        initial = run(tiny_files, rounds=1, training={"lr": 1e-30}).adapter
        assert all(
            np.array_equal(pair.A, initial[module].A) for module, pair in frozen.adapter.items()
        )
        assert all(pair.B.any() for pair in frozen.adapter.values())
    free = run(tiny_files, **changes)
    # negative control
    assert not any(
        np.array_equal(pair.A, initial[module].A) for module, pair in free.adapter.items()
    )


def test_fedprox_keeps_clients_near_the_start(tiny_files: Files) -> None:
    def moved(proximal: float) -> torch.Tensor:
        training = {"proximal": proximal, "steps": 6, "lr": 1e-2}
        result = run(
            tiny_files,
            rounds=1,
            aggregation={"server": "fedprox"},
            training=training,
            clients={"count": 2, "malicious": 0},
        )
        return vector(factor_delta(result.adapter, load(tiny_files)))

    near, far = moved(100.0), moved(0.0)
    assert near.norm() < 0.8 * far.norm()
    plain = run(
        tiny_files,
        rounds=1,
        training={"steps": 6, "lr": 1e-2},
        clients={"count": 2, "malicious": 0},
    )
    # with mu 0 it is FedAvg
    assert torch.equal(far, vector(factor_delta(plain.adapter, load(tiny_files))))


@cache
def load(files: Files) -> Adapter:
    """The initial global LoRA."""
    return build_federation(Config.of(settings(files))).lora


@pytest.mark.parametrize("server", ["fedavgm", "fedadagrad", "fedyogi", "fedadam", "scaffold"])
def test_server_optimisers_change_the_run_and_remember_over_a_resume(
    server: str, tiny_files: Files, tmp_path: Path
) -> None:
    options = {} if server == "scaffold" else {"lr": 0.01}
    changes: dict[str, Any] = {
        "rounds": 3,
        "aggregation": {"server": server, "server_options": options},
        "clients": {"sampled": 2},
    }
    whole = run(tiny_files, **changes)
    config = settings(tiny_files, **changes, output={"folder": str(tmp_path)})
    stopping(config, after=2)
    resumed = simulate(config)
    assert torch.equal(vector(resumed.adapter), vector(whole.adapter))
    assert [untimed(record) for record in resumed.records] == [
        untimed(record) for record in whole.records
    ]
    assert not torch.equal(
        vector(whole.adapter), vector(run(tiny_files, **{**changes, "aggregation": {}}).adapter)
    )


class Stopped(Exception):
    """A run that was ended from outside."""


def stopping(config: dict[str, Any], after: int) -> None:
    """Play a run up to the end of a round."""

    def watch(what: str, number: int, client: str, value: float) -> None:
        if what == "client" and number > after:
            raise Stopped

    with pytest.raises(Stopped):
        simulate(config, watch=watch)
