"""A run's scalars for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from ..defense.types import RoundRecord
from ..errors import MissingExtra
from .scalars import scalars


class Board:
    """Writes every round's numbers to `tensorboard/` in the run's folder.

    Args:
        rounds: how many are finished; what a killed run wrote of later ones is dropped.

    Raises:
        MissingExtra: tensorboard is not installed.
    """

    def __init__(self, folder: Path, rounds: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", "tensorboard", "output.tensorboard") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=rounds + 1)

    def __call__(self, record: RoundRecord) -> None:
        """Write one round."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.round)

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()
