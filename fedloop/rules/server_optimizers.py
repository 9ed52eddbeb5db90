"""Server optimisers: what of the round's delta is applied to the global LoRA, and what is kept.

    optimizer = make_server_optimizer("fedadam", lr=1e-3)
    state = optimizer.init(d)
    applied, state = optimizer.step(state, delta)

The new global parameters are the old ones plus `applied`. A state is a plain dict of tensors and
ints, returned and never modified. The delta of any aggregation rule is the pseudo-gradient, with
its sign turned: x <- x + step.

FedProx and SCAFFOLD change what clients compute; their server step is FedAvg's, and the functions
at the end are their clients' half. `variant="official"` is what Safe-FedLLM's code computes
(OpenFedLLM's federated averaging): the momentum starts at the first delta instead of at zero, and
the second moment is that of the momentum. Its adaptive optimisers follow the mean of equal weights,
whatever num_examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..checks import Checked, Validity, named, number, one_of
from ..errors import AggregationError, OptionError
from .rows import Array, vector, weighted_rows

State = dict[str, Tensor | int]
StateView = Mapping[str, Tensor | int]
Variant = Literal["textbook", "official"]

# Field -> what is valid; a name means the same in every optimiser that has it.
_VALID: Mapping[str, Validity] = {
    **dict.fromkeys(("lr", "tau"), number(above=0)),
    **dict.fromkeys(("beta1", "beta2"), number(at_least=0, below=1)),
    "variant": one_of(("textbook", "official")),
}


class _Options(Checked):
    valid = _VALID
    moments: ClassVar[tuple[str, ...]] = ()

    def init(self, d: int) -> State:
        """The state before the first round, of deltas (d,); momenta are zero."""
        if d < 1:
            raise AggregationError(f"got d={d}; expected the length of a delta, at least 1")
        return {
            "rounds": 0,
            "size": int(d),
            **{name: torch.zeros(d, dtype=torch.float64) for name in self.moments},
        }


@dataclass(frozen=True)
class FedAvg(_Options):
    """Apply lr x delta. Also the server's half of FedProx, and of SCAFFOLD with equal weights.

    Source: McMahan et al. 2017 (arXiv:1602.05629).
    """

    lr: float = 1.0

    def step(self, state: StateView, delta: Array) -> tuple[Tensor, State]:
        """What to add to the global parameters (d,), and the next state.

        Raises:
            AggregationError: a delta that is not finite or not of the state's length, or a state
                that this optimiser did not make (so for every optimiser here).
        """
        change = _delta(state, delta)
        return _applied(self.lr * change.double(), change), _next(state)


@dataclass(frozen=True)
class FedAvgM(_Options):
    """Server momentum: m <- beta1 m + delta, apply lr x m.

    Attributes:
        variant: "official" takes m <- beta1 m + (1 - beta1) delta from the second round on, ten
            times less in the long run.

    Source: Hsu et al. 2019 (arXiv:1909.06335).
    """

    lr: float = 1.0
    beta1: float = 0.9
    variant: Variant = "textbook"
    moments = ("momentum",)

    def step(self, state: StateView, delta: Array) -> tuple[Tensor, State]:
        """What to add to the global parameters (d,), and the next state."""
        change = _delta(state, delta)
        first = _integer(state, "rounds") == 0
        fresh = 1.0 if self.variant == "textbook" or first else 1 - self.beta1
        momentum = self.beta1 * _moment(state, "momentum") + fresh * change.double()
        return _applied(self.lr * momentum, change), _next(state, momentum=momentum)


@dataclass(frozen=True)
class FedAdagrad(_Options):
    """m <- beta1 m + (1 - beta1) delta, v <- v + delta^2, apply lr x m / (sqrt(v) + tau).

    v starts at tau^2.

    Source: Reddi et al. 2021 (arXiv:2003.00295), Algorithm 2, FedAdagrad; beta1 = 0 as in its
        experiments.
    """

    lr: float = 1e-3
    beta1: float = 0.0
    tau: float = 1e-3
    variant: Variant = "textbook"
    moments = ("momentum", "second")

    def step(self, state: StateView, delta: Array) -> tuple[Tensor, State]:
        """What to add to the global parameters (d,), and the next state."""
        change = _delta(state, delta)
        first = _integer(state, "rounds") == 0
        official = self.variant == "official"
        fresh = 1.0 if official and first else 1 - self.beta1
        momentum = self.beta1 * _moment(state, "momentum") + fresh * change.double()
        # The first step starts second moments at tau squared.
        start = torch.full_like(momentum, self.tau**2)
        before = start if first else _moment(state, "second")
        second = self.second(before, torch.square(momentum if official else change.double()))
        applied = _applied(self.lr * momentum / (second.sqrt() + self.tau), change)
        return applied, _next(state, momentum=momentum, second=second)

    def second(self, before: Tensor, square: Tensor) -> Tensor:
        """The next second moment (d,), of the former one and the delta squared."""
        return before + square


@dataclass(frozen=True)
class FedYogi(FedAdagrad):
    """As FedAdagrad, with v <- v - (1 - beta2) delta^2 sign(v - delta^2).

    Source: Reddi et al. 2021 (arXiv:2003.00295), Algorithm 2, FedYogi.
    """

    beta1: float = 0.9
    beta2: float = 0.99

    def second(self, before: Tensor, square: Tensor) -> Tensor:
        """The next second moment (d,), of the former one and the delta squared."""
        return before - (1 - self.beta2) * square * torch.sign(before - square)


@dataclass(frozen=True)
class FedAdam(FedAdagrad):
    """As FedAdagrad, with v <- beta2 v + (1 - beta2) delta^2.

    Source: Reddi et al. 2021 (arXiv:2003.00295), Algorithm 2, FedAdam.
    """

    beta1: float = 0.9
    beta2: float = 0.99

    def second(self, before: Tensor, square: Tensor) -> Tensor:
        """The next second moment (d,), of the former one and the delta squared."""
        return self.beta2 * before + (1 - self.beta2) * square


ServerOptimizer = FedAvg | FedAvgM | FedAdagrad

SERVER_OPTIMIZERS: Mapping[str, type[ServerOptimizer]] = {
    "fedavg": FedAvg,
    "fedprox": FedAvg,
    "scaffold": FedAvg,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedyogi": FedYogi,
    "fedadam": FedAdam,
}


def make_server_optimizer(name: str, /, **options: Any) -> ServerOptimizer:
    """The server optimiser of this name with these options, checked now.

    Raises:
        ConfigError: no such optimiser or option (the message lists the valid ones), or a value that
            is not valid.
    """
    return named("server", name, SERVER_OPTIMIZERS, options, OptionError)


def proximal_gradient(parameters: Tensor, start: Tensor, mu: float) -> Tensor:
    """What FedProx adds to a client's gradient: that of mu / 2 |parameters - start|^2.

    Args:
        start: the round's global parameters, of the same shape.

    Source: Li et al. 2020 (arXiv:1812.06127).
    """
    return mu * (parameters - start)


def scaffold_client_variate(
    server_variate: Tensor, client_variate: Tensor, delta: Tensor, *, steps: int, lr: float
) -> Tensor:
    """The client's next control variate, option II: c_i - c - delta / (steps x lr).

    In every local step a client adds c - c_i to its gradient; delta is after - before. It follows
    from the submitted delta, so a server that keeps the variates needs no claim of the client's. It
    is the mean gradient of plain SGD steps; under another local optimiser it is one only in name.

    Source: Karimireddy et al. 2020 (arXiv:1910.06378), Algorithm 1, option II.
    """
    return client_variate - server_variate - delta / (steps * lr)


def scaffold_server_variate(
    server_variate: Array, changes: Array, weights: Array, *, num_clients: int
) -> Tensor:
    """The server's next control variate: c + the sum of the changes of c_i / all clients.

    Args:
        changes: (n, d), next less former variate of the round's clients.
        weights: (n,); clients of weight 0 are left out, the others count alike, as published.
        num_clients: of the whole federation (N), not of the round.

    Source: Karimireddy et al. 2020 (arXiv:1910.06378), Algorithm 1.
    """
    rows, _, _ = weighted_rows(changes, weights)
    before = vector(server_variate, rows.shape[1], "server_variate")
    return (before + rows.double().sum(dim=0) / num_clients).to(before.dtype)


def _next(state: StateView, **moments: Tensor) -> State:
    return {**state, "rounds": _integer(state, "rounds") + 1, **moments}


def _applied(step: Tensor, change: Tensor) -> Tensor:
    applied = step.to(change.dtype)
    if not applied.isfinite().all():
        raise AggregationError(
            "the server optimiser's step overflows; expected a smaller delta or learning rate"
        )
    return applied


def _delta(state: StateView, delta: Array) -> Tensor:
    return vector(delta, _integer(state, "size"), "delta")


def _moment(state: StateView, key: str) -> Tensor:
    value = state.get(key)
    if not isinstance(value, Tensor) or value.shape != (_integer(state, "size"),):
        raise AggregationError(
            f"got a server state with {sorted(state)}; expected one with a tensor {key!r}, made by"
            " this optimiser's init"
        )
    return value


def _integer(state: StateView, key: str) -> int:
    value = state.get(key)
    if not isinstance(value, int):
        raise AggregationError(
            f"got a server state with {sorted(state)}; expected one with the whole number {key!r},"
            " made by this optimiser's init"
        )
    return value
