"""A run in Weights & Biases. WANDB_MODE=offline keeps it on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..defense.types import RoundRecord
from ..errors import MissingExtra
from .scalars import scalars


class WandB:
    """Logs a run, or goes on with it.

    Args:
        project: of Weights & Biases.
        name: of the run.
        run: the run's own id.
        config: what is shown beside it.
        folder: where its files go; None for the working directory.

    Raises:
        MissingExtra: wandb is not installed.
    """

    def __init__(
        self, project: str, name: str, run: str, config: Mapping[str, Any], folder: Path | None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra("wandb", "wandb", "output.wandb") from error
        self._run = wandb.init(
            project=project,
            name=name,
            id=run,
            resume="allow",
            config=dict(config),
            dir=None if folder is None else str(folder),
        )

    def __call__(self, record: RoundRecord) -> None:
        """Log one round."""
        self._run.log(scalars(record), step=record.round)

    def close(self) -> None:
        """Write what is pending."""
        self._run.finish()
