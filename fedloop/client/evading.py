"""Malicious clients who know the server's probe and stay hidden from it while they train.

Projected gradient descent: what is minimised is the attack's own loss, and after every local step
the factors are moved, as little as it takes, to where the probe's logit is at most what was asked
for. Poison is learnt again under that bound, where a projection after training only takes it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.pair import LoRAPair
from loraprobe.heads import LinearHead
from loraprobe.probe import Probe

from ..errors import ConfigError
from .training import read_adapter, write_adapter

if TYPE_CHECKING:
    from peft import PeftModel

_STEPS = 60  # at most; a logit that is not reached by then is left where it is
_DAMPING = 0.5  # of a Newton step: the logit is not linear in the factors
_NEAR = 0.01  # nats above the bound that count as reached
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class ProductLogit:
    """A linear probe of products B A, as a function of factors that has a gradient.

    Attributes:
        blocks: module -> left basis (d_out, k), right basis (d_in, k), center and coefficients of
            the module's features.
        names: the features, in `loraprobe.features.invariant.PRODUCT_FEATURES`.
        intercept: of the head.
    """

    blocks: Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    names: tuple[str, ...]
    intercept: float

    @classmethod
    def of(cls, probe: Probe) -> ProductLogit:
        """The function of a probe.

        Raises:
            ConfigError: its head is not linear, or it does not read products.
        """
        bases, head = probe.featurizer.bases, probe.head
        if bases is None or not isinstance(head, LinearHead):
            raise ConfigError(
                f"clients.evade_probe: got the probe {probe!r}; expected a linear one that reads"
                " products. Of one on flattened slices, use update_attack = 'probe_evasion'."
            )
        names = probe.featurizer.recipe.features
        widths = bases.widths(names)
        ends = np.cumsum(list(widths.values()))
        blocks = {}
        for module, end in zip(widths, ends, strict=True):
            part = slice(end - widths[module], end)
            arrays = (bases.left[module], bases.right[module], bases.center[part], head.coef[part])
            blocks[module] = tuple(torch.from_numpy(a.astype(np.float64)) for a in arrays)
        return cls(blocks, names, float(head.intercept))  # type: ignore[arg-type]

    def __call__(self, changes: Factors) -> torch.Tensor:
        """The logit of module -> (left (d_out, r), right (r, d_in)), both float64.

        A module whose change is zero says nothing, as in the probe.
        """
        total = torch.full((), self.intercept, dtype=torch.float64)
        for module, (left, right) in changes.items():
            if module not in self.blocks:
                continue
            left_basis, right_basis, center, coefficients = self.blocks[module]
            gram = right @ right.T
            square = ((left.T @ left) * gram).sum()
            if square <= 0:
                continue
            seen = left_basis.T @ left / square.sqrt()  # (k, r)
            parts = []
            if "product" in self.names:
                parts.append((seen @ (right @ right_basis)).reshape(-1))
            if "gram" in self.names:
                found = seen @ gram @ seen.T
                rows, columns = torch.triu_indices(len(found), len(found))
                scale = torch.where(rows == columns, 1.0, 2**0.5).double()
                parts.append(found[rows, columns] * scale)
            total = total + (torch.cat(parts) - center) @ coefficients
        return total


def moved_below(adapter: Adapter, start: Adapter, logit: ProductLogit, bound: float) -> Adapter:
    """Factors near an adapter's whose change since `start` has at most this logit.

    Damped Newton steps along the gradient with respect to all factors.

    Args:
        adapter, start: kind "weights", of the same modules and shapes.
        bound: nats.
    """
    leaves = {
        name: tuple(torch.tensor(np.asarray(m, np.float64), requires_grad=True) for m in factors)
        for name, factors in ((name, (pair.B, pair.A)) for name, pair in adapter.items())
    }
    flat = [leaf for pair in leaves.values() for leaf in pair]
    fixed = {
        name: tuple(torch.tensor(np.asarray(m, np.float64)) for m in (pair.B, pair.A))
        for name, pair in start.items()
    }
    scalings = {name: pair.scaling for name, pair in adapter.items()}
    for _ in range(_STEPS):
        changes = {name: _change(leaves[name], fixed[name], scalings[name]) for name in leaves}
        excess = logit(changes) - bound
        if float(excess.detach()) <= _NEAR:
            break
        gradients = torch.autograd.grad(excess, flat, allow_unused=True, materialize_grads=True)
        size = sum(float((g * g).sum()) for g in gradients)
        if size == 0:
            break
        with torch.no_grad():
            for leaf, gradient in zip(flat, gradients, strict=True):
                leaf -= _DAMPING * float(excess.detach()) / size * gradient
    pairs = {
        name: LoRAPair(
            A.detach().numpy().astype(np.float32),
            B.detach().numpy().astype(np.float32),
            scalings[name],
        )
        for name, (B, A) in leaves.items()
    }
    return Adapter(pairs, base_model=adapter.base_model)


def _change(
    after: tuple[torch.Tensor, ...], before: tuple[torch.Tensor, ...], scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """s (B A - B_0 A_0) as two factors, in which nothing large cancels."""
    (B, A), (B_0, A_0) = after, before
    left, right = B - B_0, A
    if bool(B_0.any()):
        left, right = torch.cat([left, B_0], 1), torch.cat([A, A - A_0])
    return scaling * left, right


@contextmanager
def hidden(model: PeftModel, start: Adapter, logit: ProductLogit, bound: float) -> Iterator[None]:
    """While this is open, every optimiser step of this process ends below the bound.

    Args:
        start: the round's global LoRA, kind "weights"; the server reads changes since it.
        bound: of the logit, nats.
    """

    def project(*_: Any) -> None:
        write_adapter(
            model, moved_below(read_adapter(model, start.base_model), start, logit, bound)
        )

    handle = register_optimizer_step_post_hook(project)
    try:
        yield
    finally:
        handle.remove()
