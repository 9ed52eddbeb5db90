"""Server optimisers: what of the round's aggregated delta is applied to the global LoRA, and what
is remembered.

Pure functions, `init(d) -> state` and `step(state, delta, **options) -> (applied, state)`: the new
global parameters are the old ones plus `applied`. A state is a plain dict of tensors and ints,
returned and never modified. The delta of any aggregation rule is the pseudo-gradient, with its sign
turned: x <- x + step.

FedProx and SCAFFOLD change what clients compute; their server step is FedAvg's, and the functions
at the end are their clients' half. `variant="official"` is what Safe-FedLLM's code computes
(OpenFedLLM's federated averaging): the momentum starts at the first delta instead of at zero, and
the second moment is that of the momentum. Its adaptive optimisers follow the mean of equal weights,
whatever num_examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import AggregationError
from .rows import Array, vector, weighted_rows

State = dict[str, Tensor | int]
Variant = Literal["textbook", "official"]


@dataclass(frozen=True)
class ServerOptimizer:
    """One server optimiser.

    Attributes:
        init: d -> the state before the first round.
        step: (state, delta (d,), **options) -> (what to add to the global parameters (d,), the next
            state). It raises AggregationError for a delta that is not finite, not the state's
            length, or options out of range.
    """

    init: Callable[[int], State]
    step: Callable[..., tuple[Tensor, State]]


def init_plain(d: int) -> State:
    """The state of an optimiser without memory: the rounds so far and the length of a delta."""
    return {"rounds": 0, "size": _length(d)}


def init_momentum(d: int) -> State:
    """The same, and momentum (d,) float64."""
    return {**init_plain(d), "momentum": torch.zeros(d, dtype=torch.float64)}


def init_adaptive(d: int) -> State:
    """The same, and second moments (d,) float64; the first step starts these at tau squared."""
    return {**init_momentum(d), "second": torch.zeros(d, dtype=torch.float64)}


def fedavg(
    state: Mapping[str, Tensor | int], delta: Array, *, lr: float = 1.0
) -> tuple[Tensor, State]:
    """lr x delta. Also the server's half of FedProx and, with a delta of equal weights, of
    SCAFFOLD.

    Source: McMahan et al. 2017 (arXiv:1602.05629).
    """
    change = _delta(state, delta, lr=lr)
    return _applied(lr * change.double(), change), {**state, "rounds": _rounds(state) + 1}


def fedavgm(
    state: Mapping[str, Tensor | int],
    delta: Array,
    *,
    lr: float = 1.0,
    beta1: float = 0.9,
    variant: Variant = "textbook",
) -> tuple[Tensor, State]:
    """Server momentum: m <- beta1 m + delta, apply lr x m.

    Args:
        variant: "official" takes m <- beta1 m + (1 - beta1) delta from the second round on, ten
            times less in the long run.

    Source: Hsu et al. 2019 (arXiv:1909.06335).
    """
    change = _delta(state, delta, lr=lr, beta1=beta1, variant=variant)
    fresh = 1.0 if variant == "textbook" or _rounds(state) == 0 else 1 - beta1
    momentum = beta1 * _moment(state, "momentum") + fresh * change.double()
    return _applied(lr * momentum, change), {
        **state,
        "rounds": _rounds(state) + 1,
        "momentum": momentum,
    }


def fedadagrad(
    state: Mapping[str, Tensor | int],
    delta: Array,
    *,
    lr: float = 1e-3,
    beta1: float = 0.0,
    tau: float = 1e-3,
    variant: Variant = "textbook",
) -> tuple[Tensor, State]:
    """m <- beta1 m + (1 - beta1) delta, v <- v + delta^2, apply lr x m / (sqrt(v) + tau).

    V starts at tau^2.

    Source: Reddi et al. 2021 (arXiv:2003.00295), Algorithm 2, FedAdagrad; beta1 = 0 as in its
        experiments.
    """
    return _adaptive(
        state,
        delta,
        lambda second, square: second + square,
        lr=lr,
        beta1=beta1,
        tau=tau,
        variant=variant,
    )


def fedyogi(
    state: Mapping[str, Tensor | int],
    delta: Array,
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    variant: Variant = "textbook",
) -> tuple[Tensor, State]:
    """As FedAdagrad, with v <- v - (1 - beta2) delta^2 sign(v - delta^2).

    Source: Reddi et al. 2021 (arXiv:2003.00295), Algorithm 2, FedYogi.
    """
    _check_options(beta2=beta2)
    return _adaptive(
        state,
        delta,
        lambda second, square: second - (1 - beta2) * square * torch.sign(second - square),
        lr=lr,
        beta1=beta1,
        tau=tau,
        variant=variant,
    )


def fedadam(
    state: Mapping[str, Tensor | int],
    delta: Array,
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    variant: Variant = "textbook",
) -> tuple[Tensor, State]:
    """As FedAdagrad, with v <- beta2 v + (1 - beta2) delta^2.

    Source: Reddi et al. 2021 (arXiv:2003.00295), Algorithm 2, FedAdam.
    """
    _check_options(beta2=beta2)
    return _adaptive(
        state,
        delta,
        lambda second, square: beta2 * second + (1 - beta2) * square,
        lr=lr,
        beta1=beta1,
        tau=tau,
        variant=variant,
    )


SERVER_OPTIMIZERS: dict[str, ServerOptimizer] = {
    "fedavg": ServerOptimizer(init_plain, fedavg),
    "fedprox": ServerOptimizer(init_plain, fedavg),
    "scaffold": ServerOptimizer(init_plain, fedavg),
    "fedavgm": ServerOptimizer(init_momentum, fedavgm),
    "fedadagrad": ServerOptimizer(init_adaptive, fedadagrad),
    "fedyogi": ServerOptimizer(init_adaptive, fedyogi),
    "fedadam": ServerOptimizer(init_adaptive, fedadam),
}


def server_optimizer(name: str) -> ServerOptimizer:
    """The server optimiser of this name.

    Raises:
        AggregationError: there is none; the message lists the names there are.
    """
    if name not in SERVER_OPTIMIZERS:
        raise AggregationError(
            f"got server optimiser {name!r}; expected one of {', '.join(SERVER_OPTIMIZERS)}"
        )
    return SERVER_OPTIMIZERS[name]


def proximal_gradient(parameters: Tensor, start: Tensor, mu: float) -> Tensor:
    """What FedProx adds to a client's gradient.

    Mu x (parameters - start), of the loss mu / 2 |parameters - start|^2.

    Args:
        start: the round's global parameters, of the same shape.

    Source: Li et al. 2020 (arXiv:1812.06127).
    """
    _same_shape(parameters, start, "start")
    if not 0 <= mu < float("inf"):
        raise AggregationError(f"got mu={mu}; expected a finite number of at least 0")
    return mu * (parameters - start)


def scaffold_correction(server_variate: Tensor, client_variate: Tensor) -> Tensor:
    """What SCAFFOLD adds to a client's gradient in every local step: c - c_i.

    Source: Karimireddy et al. 2020 (arXiv:1910.06378), Algorithm 1.
    """
    _same_shape(server_variate, client_variate, "client_variate")
    return server_variate - client_variate


def scaffold_client_variate(
    server_variate: Tensor, client_variate: Tensor, delta: Tensor, *, steps: int, lr: float
) -> Tensor:
    """The client's next control variate, option II.

    C_i - c - delta / (steps x lr), delta being after - before.

    It follows from the submitted delta, so a server that keeps the variates needs no claim of the
    client's. It is the mean gradient of plain SGD steps; under another local optimiser it is one
    only in name.

    Source: Karimireddy et al. 2020 (arXiv:1910.06378), Algorithm 1, option II.
    """
    _same_shape(server_variate, client_variate, "client_variate")
    _same_shape(server_variate, delta, "delta")
    if steps < 1 or not 0 < lr < float("inf"):
        raise AggregationError(
            f"got steps={steps}, lr={lr}; expected at least 1 step and a learning rate above 0"
        )
    return client_variate - server_variate - delta / (steps * lr)


def scaffold_server_variate(
    server_variate: Array, changes: Array, weights: Array, *, num_clients: int
) -> Tensor:
    """The server's next control variate.

    C + the sum of the changes of c_i, divided by the number of all clients.

    Args:
        changes: (n, d), next less former variate of the round's clients.
        weights: (n,); clients of weight 0 are left out, the others count alike, as published.
        num_clients: of the whole federation (N), not of the round.

    Source: Karimireddy et al. 2020 (arXiv:1910.06378), Algorithm 1.
    """
    rows, _, _ = weighted_rows(changes, weights)
    before = vector(server_variate, rows.shape[1], "server_variate")
    if num_clients < len(rows):
        raise AggregationError(
            f"got num_clients={num_clients}; expected at least the {len(rows)} clients of this"
            " round"
        )
    return (before + rows.double().sum(dim=0) / num_clients).to(before.dtype)


def _adaptive(
    state: Mapping[str, Tensor | int],
    delta: Array,
    second_moment: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float,
    beta1: float,
    tau: float,
    variant: Variant,
) -> tuple[Tensor, State]:
    change = _delta(state, delta, lr=lr, beta1=beta1, tau=tau, variant=variant)
    first = _rounds(state) == 0
    fresh = 1.0 if variant == "official" and first else 1 - beta1
    momentum = beta1 * _moment(state, "momentum") + fresh * change.double()
    before = torch.full_like(momentum, tau**2) if first else _moment(state, "second")
    second = second_moment(
        before, torch.square(momentum if variant == "official" else change.double())
    )
    applied = _applied(lr * momentum / (second.sqrt() + tau), change)
    return applied, {**state, "rounds": _rounds(state) + 1, "momentum": momentum, "second": second}


def _applied(step: Tensor, change: Tensor) -> Tensor:
    applied = step.to(change.dtype)
    if not applied.isfinite().all():
        raise AggregationError(
            "the server optimiser's step overflows; expected a smaller delta or learning rate"
        )
    return applied


def _delta(
    state: Mapping[str, Tensor | int], delta: Array, *, variant: str = "textbook", **options: float
) -> Tensor:
    """The delta, checked together with the options."""
    if variant not in ("textbook", "official"):
        raise AggregationError(f"got variant {variant!r}; expected one of textbook, official")
    _check_options(**options)
    return vector(delta, _integer(state, "size"), "delta")


def _check_options(**options: float) -> None:
    for name, value in options.items():
        if name.startswith("beta"):
            if not 0 <= value < 1:
                raise AggregationError(f"got {name}={value}; expected at least 0 and less than 1")
        elif not 0 < value < float("inf"):
            raise AggregationError(f"got {name}={value}; expected a finite number above 0")


def _moment(state: Mapping[str, Tensor | int], key: str) -> Tensor:
    value = state.get(key)
    if not isinstance(value, Tensor) or value.shape != (_integer(state, "size"),):
        raise AggregationError(
            f"got a server state with {sorted(state)}; expected one with a tensor {key!r}, made by"
            " this optimiser's init"
        )
    return value


def _integer(state: Mapping[str, Tensor | int], key: str) -> int:
    value = state.get(key)
    if not isinstance(value, int):
        raise AggregationError(
            f"got a server state with {sorted(state)}; expected one with the whole number {key!r},"
            " made by this optimiser's init"
        )
    return value


def _rounds(state: Mapping[str, Tensor | int]) -> int:
    return _integer(state, "rounds")


def _length(d: int) -> int:
    if d < 1:
        raise AggregationError(f"got d={d}; expected the length of a delta, at least 1")
    return int(d)


def _same_shape(first: Tensor, second: Tensor, name: str) -> None:
    if first.shape != second.shape:
        raise AggregationError(
            f"got {name} of shape {tuple(second.shape)}; expected {tuple(first.shape)}"
        )
