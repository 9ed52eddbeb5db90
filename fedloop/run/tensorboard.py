"""A run's scalars for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..defense.types import RoundRecord
from ..errors import MissingExtra


class Board:
    """Writes factors, weights, scores, losses, metrics and seconds of every round.

    Args:
        folder: of the run; None writes nothing.
        rounds: how many are finished; what a killed run wrote of later ones is dropped.

    Raises:
        MissingExtra: tensorboard is not installed.
    """

    def __init__(self, folder: Path | None, rounds: int) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", "tensorboard", "output.tensorboard") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=rounds + 1)

    def write(self, record: RoundRecord) -> None:
        """Write one round."""
        if self._writer is None:
            return
        groups = {
            "factor": record.factors,
            "weight": record.weights,
            "score": {client: scores[-1] for client, scores in record.scores.items()},
            "loss": record.losses,
            "metric": record.metrics,
            "seconds": record.seconds,
        }
        for group, values in groups.items():
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, record.round)

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.close()
