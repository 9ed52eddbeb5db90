"""The server optimiser's memory and the clients' half of FedProx and SCAFFOLD, on parameters of a
real PEFT model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedloop.client.training import LocalTraining, read_adapter
from fedloop.rules.server_optimizers import SERVER_OPTIMIZERS
from fedloop.run.server_state import ServerSide
from fedloop.sections import AggregationConfig
from loraprobe.adapters.layout import Layout, pack

TRAINING = LocalTraining(lr=0.1, steps=4, batch_size=2)


@pytest.fixture
def model(peft_llama: Any) -> Any:
    return peft_llama(lora_dropout=0.0)


def server(
    model: Any, name: str = "fedavg", proximal: float = 0.5, num_clients: int = 10, **options: Any
) -> ServerSide:
    return ServerSide(
        AggregationConfig(server=name, server_options=options),
        Layout.of(read_adapter(model)),
        proximal,
        num_clients,
    )


def trained(model: Any) -> list[torch.nn.Parameter]:
    """The trained parameters in the model's own order, each with a gradient of zeros."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def packed_gradients(model: Any) -> Tensor:
    """The gradients as a packed adapter would hold them."""
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
        packed = pack(read_adapter(model))[0]
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return packed


def random(model: Any, seed: int, rows: int | None = None) -> Tensor:
    size = Layout.of(read_adapter(model)).size
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, generator=generator)
        if rows is None
        else torch.randn(rows, size, generator=generator)
    )


def test_fedprox_pulls_every_parameter_towards_the_rounds_start(model: Any) -> None:
    start = read_adapter(model)
    adjust = server(model, "fedprox", proximal=0.25).adjustment(model, start, "c")
    assert adjust is not None
    parameters = trained(model)
    adjust(parameters)
    assert not packed_gradients(model).any()  # at the start there is nothing to pull
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter += 0.1 * (number + 1)
    adjust(parameters)
    moved = pack(read_adapter(model))[0] - pack(start)[0]
    assert torch.allclose(packed_gradients(model), 0.25 * moved, atol=1e-6)
    # every parameter was pulled back to its own origin
    assert len(set(moved.round(decimals=3).tolist())) == len(parameters)


def test_other_optimisers_leave_clients_alone(model: Any) -> None:
    for name in SERVER_OPTIMIZERS:
        expected = name in ("fedprox", "scaffold")
        assert (
            server(model, name).adjustment(model, read_adapter(model), "c") is not None
        ) is expected


def test_scaffold_variates_are_the_mean_gradients_and_add_up(model: Any) -> None:
    """c_i = -delta / (steps lr) at first.

    And always N c = the sum of all c_i, absent clients' included.
    """
    side, names = server(model, "scaffold", num_clients=10), ["a", "b", "c"]
    deltas = random(model, 1, 3)
    assert torch.equal(side.step(deltas.mean(0), names, deltas, TRAINING), deltas.mean(0))
    state = side.state_dict()
    for name, delta in zip(names, deltas, strict=True):
        assert torch.allclose(state["client_variates"][name], -delta / (4 * 0.1))
    for seed, present in ((2, ["b", "d"]), (3, ["a", "b", "c", "d"]), (4, ["e"])):
        deltas = random(model, seed, len(present))
        before = side.state_dict()
        side.step(deltas.mean(0), present, deltas, TRAINING)
        state = side.state_dict()
        for name, delta in zip(present, deltas, strict=True):  # option II of SCAFFOLD's Algorithm 1
            former = before["client_variates"].get(name, torch.zeros_like(delta))
            assert torch.allclose(
                state["client_variates"][name],
                former - before["variate"] - delta / (4 * 0.1),
                atol=1e-5,
            )
        assert torch.allclose(
            10 * state["variate"], sum(state["client_variates"].values()), atol=1e-4
        )
    assert set(state["client_variates"]) == {"a", "b", "c", "d", "e"}


def test_scaffold_corrects_a_client_by_the_difference_of_the_variates(model: Any) -> None:
    side = server(model, "scaffold")
    deltas = random(model, 1, 2)
    side.step(deltas.mean(0), ["a", "b"], deltas, TRAINING)
    state = side.state_dict()
    for client in ("a", "never seen"):
        adjust = side.adjustment(model, read_adapter(model), client)
        assert adjust is not None
        adjust(trained(model))
        own = state["client_variates"].get(client, torch.zeros_like(state["variate"]))
        assert torch.allclose(packed_gradients(model), state["variate"] - own, atol=1e-6)
        assert packed_gradients(model).any()
