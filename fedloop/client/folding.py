"""Residuals of exact aggregation, folded into the base model's frozen weights (FedEx-LoRA,
arXiv:2410.09432).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..errors import AggregationError

if TYPE_CHECKING:
    from peft import PeftModel


class ResidualSum:
    """The sum of a run's residuals: what a server keeps of them that has no model."""

    def __init__(self) -> None:
        self._residual: dict[str, torch.Tensor] = {}

    @property
    def residual(self) -> dict[str, torch.Tensor]:
        """Module -> (d_out, d_in) float32, the sum of everything added so far."""
        return self._residual

    def add(self, residual: Mapping[str, torch.Tensor]) -> None:
        """Add one round's residual, module -> (d_out, d_in).

        Raises:
            AggregationError: it is folded into a base that is quantised, so that a small residual
                would be lost in rounding.
        """
        self.set(
            {
                module: self._residual.get(module, 0) + change.float()
                for module, change in residual.items()
            }
        )

    def set(self, residual: Mapping[str, torch.Tensor]) -> None:
        """Take this sum in place of the former one.

        Raises:
            AggregationError: as `add`.
        """
        self._residual = dict(residual)


class FoldedBase(ResidualSum):
    """A model's adapted weights as they were loaded, and the sum of residuals that is on them now.

    It keeps a copy of every adapted weight once the first residual comes: folding always starts
    from the loaded weights, so that rounding does not depend on how often a run was resumed.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self._model = model
        self._loaded: dict[str, torch.Tensor] = {}

    def set(self, residual: Mapping[str, torch.Tensor]) -> None:
        """Put this sum of residuals on the loaded weights, instead of the former one.

        Raises:
            AggregationError: as `add`.
        """
        for module in self._loaded.keys() - residual.keys():
            self._weight(module).copy_(self._loaded[module])
        for module, change in residual.items():
            weight = self._weight(module)
            if module not in self._loaded:
                if not weight.is_floating_point():
                    raise AggregationError(
                        f"{module} has {weight.dtype} weights; exact aggregation needs a base that"
                        " is not quantised"
                    )
                self._loaded[module] = weight.clone()
            weight.copy_((self._loaded[module].float() + change.to(weight.device)).to(weight.dtype))
        super().set(residual)

    @contextmanager
    def unfolded(self) -> Iterator[None]:
        """The base as it was loaded: shadows start where probes were trained."""
        for module, loaded in self._loaded.items():
            self._weight(module).copy_(loaded)
        try:
            yield
        finally:
            self.set(self._residual)

    def _weight(self, module: str) -> torch.Tensor:
        weight: torch.Tensor = self._model.get_submodule(
            f"base_model.model.{module}.base_layer"
        ).weight.data  # type: ignore[assignment]
        return weight
