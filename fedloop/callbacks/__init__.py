"""Who is told of every round: trackers of experiments, and alerts.

A callback takes a `RoundRecord` once its round is saved; `simulate(config, callbacks=[...])`, and
`on_record=` of the plug-ins. What it raises ends the run, which can be resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import missing_extra

try:
    from ..config import Config
    from ..defense.types import RoundRecord
    from .alerts import Alerts
    from .mlflow import MLflow
    from .tensorboard import Board
    from .wandb import WandB
except ImportError as error:
    raise missing_extra(error, __name__) from error

Callback = Callable[[RoundRecord], Any]

__all__ = ["Alerts", "Board", "Callback", "MLflow", "WandB", "close_all", "configured"]


def configured(config: Config, folder: Path | None, run: str, rounds: int) -> list[Callback]:
    """The trackers that a configuration names.

    Args:
        folder: of the run; None for a run that is not written.
        run: the run's id, under which a tracker goes on with it.
        rounds: how many are finished.

    Raises:
        MissingExtra: one is not installed.
    """
    output = config.output
    callbacks: list[Callback] = []
    if output.tensorboard and folder is not None:
        callbacks.append(Board(folder, rounds))
    plain = config.model_dump(mode="json")
    if output.mlflow is not None:
        callbacks.append(MLflow(output.mlflow, config.name, run, plain))
    if output.wandb is not None:
        callbacks.append(WandB(output.wandb, config.name, run, plain, folder))
    return callbacks


def close_all(callbacks: Iterable[Callback]) -> None:
    """Have them write what is pending, those that can."""
    for callback in callbacks:
        close = getattr(callback, "close", None)
        if close is not None:
            close()
