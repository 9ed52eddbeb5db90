"""The server optimiser of a run, with the clients' half of those that have one (FedProx,
SCAFFOLD), and its memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, pack

from ..client.training import LocalTraining
from ..rules.server_optimizers import (
    make_server_optimizer,
    proximal_gradient,
    scaffold_client_variate,
    scaffold_server_variate,
)
from ..sections import AggregationConfig

if TYPE_CHECKING:
    from peft import PeftModel

Adjust = Callable[[list[torch.nn.Parameter]], None]
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.[^.]+\.weight")


@dataclass(frozen=True)
class GradientChange:
    """What the server optimiser asks of one client's gradients before every local step.

    The clients' half of it.

    Attributes:
        proximal: FedProx's mu; None for no pull to the round's start.
        correction: SCAFFOLD's, packed (d,), to be added; None for none.
    """

    proximal: float | None = None
    correction: Tensor | None = None

    def adjuster(self, model: PeftModel, layout: Layout, start: Adapter) -> Adjust | None:
        """The change for `local_steps`, None if nothing is asked.

        `start` is the round's global LoRA.
        """
        if self.proximal is not None:
            mu, origins = self.proximal, _by_parameter(model, layout, pack(start, layout)[0])
            return lambda parameters: _add(
                parameters,
                [
                    proximal_gradient(p.detach(), o, mu)
                    for p, o in zip(parameters, origins, strict=True)
                ],
            )
        if self.correction is not None:
            correction = _by_parameter(model, layout, self.correction)
            return lambda parameters: _add(parameters, correction)
        return None


class ServerSide:
    """A named server optimiser and its state.

    Args:
        proximal: FedProx's mu.
        num_clients: of the whole federation, which SCAFFOLD's variates are averaged over.

    Raises:
        ConfigError: an option of the optimiser is not valid.
    """

    def __init__(
        self, aggregation: AggregationConfig, layout: Layout, proximal: float, num_clients: int
    ) -> None:
        self._name = aggregation.server
        self._layout = layout
        self._proximal = proximal
        self._num_clients = num_clients
        self._optimizer = make_server_optimizer(aggregation.server, **aggregation.server_options)
        self._state = self._optimizer.init(layout.size)
        self._variate = torch.zeros(layout.size)
        self._client_variates: dict[str, Tensor] = {}

    def asks(self, client: str) -> GradientChange:
        """What this client's gradients have to go through in the coming round."""
        if self._name == "fedprox":
            return GradientChange(proximal=self._proximal)
        if self._name == "scaffold":
            variate = self._client_variates.get(client, torch.zeros_like(self._variate))
            return GradientChange(correction=self._variate - variate)
        return GradientChange()

    def adjustment(self, model: PeftModel, start: Adapter, client: str) -> Adjust | None:
        """What changes this client's gradients before every local step, if the optimiser asks for
        it.
        """
        return self.asks(client).adjuster(model, self._layout, start)

    def step(
        self,
        delta: Tensor,
        clients: Sequence[str],
        deltas: Iterable[Tensor],
        training: LocalTraining,
    ) -> Tensor:
        """What to add to the global LoRA, (d,), given the aggregate (d,) and the deltas, n times
        (d,), of the clients that counted. SCAFFOLD alone reads them, and keeps one a client.
        """
        applied, self._state = self._optimizer.step(self._state, delta)
        if self._name == "scaffold":
            former = [
                self._client_variates.get(client, torch.zeros_like(self._variate))
                for client in clients
            ]
            renewed = [
                scaffold_client_variate(
                    self._variate, variate, row.float(), steps=training.steps, lr=training.lr
                )
                for variate, row in zip(former, deltas, strict=True)
            ]
            changes = torch.stack(renewed) - torch.stack(former)
            self._variate = scaffold_server_variate(
                self._variate, changes, torch.ones(len(clients)), num_clients=self._num_clients
            )
            self._client_variates.update(zip(clients, renewed, strict=True))
        return applied

    def forget(self, clients: Iterable[str]) -> None:
        """Drop SCAFFOLD's variates of clients that are gone."""
        for client in clients:
            self._client_variates.pop(client, None)

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors."""
        return {
            "optimizer": dict(self._state),
            "variate": self._variate,
            "client_variates": dict(self._client_variates),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._state = dict(state["optimizer"])
        self._variate, self._client_variates = state["variate"], dict(state["client_variates"])


def _by_parameter(model: PeftModel, layout: Layout, vector: Tensor) -> list[Tensor]:
    """The parts of a packed vector in the order, the shapes and on the device of the model's
    trained parameters.
    """
    parts = torch.split(vector, [slot.size for slot in layout.slots])
    by_slot = {
        (slot.module, slot.factor): part.view(slot.shape)
        for slot, part in zip(layout.slots, parts, strict=True)
    }
    trained = [
        (_FACTOR.fullmatch(name), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return [by_slot[match[1], match[2]].to(parameter) for match, parameter in trained if match]  # type: ignore[index]


def _add(parameters: Sequence[torch.nn.Parameter], changes: Sequence[Tensor]) -> None:
    for parameter, change in zip(parameters, changes, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(change)
