"""Which round was the best by a metric, and when to stop waiting for a better one.

Both follow from the records alone, so that a resumed run decides alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..defense.types import RoundRecord
from ..errors import ConfigError
from ..sections import EvaluationConfig


class Best:
    """Judges measured rounds by the metric that a configuration names.

    Args:
        names: of the metrics that are measured; None if that is not known here.

    Raises:
        ConfigError: it is none of them.
    """

    def __init__(self, config: EvaluationConfig, names: Sequence[str] | None = None) -> None:
        self._sign = -1.0 if (config.best or "").startswith("-") else 1.0
        self._metric = (config.best or "").removeprefix("-")
        self._patience = config.patience
        if self._metric and names is not None and self._metric not in names:
            raise ConfigError(
                f"evaluation.best: got {config.best!r}; expected one of {', '.join(names)}, with a"
                " minus where less is better"
            )

    def is_new(self, records: Sequence[RoundRecord]) -> bool:
        """Whether the last round was measured, and is better than every one before it."""
        return bool(records) and self._metric in records[-1].metrics and self._since(records) == 0

    def is_stalled(self, records: Sequence[RoundRecord]) -> bool:
        """Whether the run has been measured so often without a better round that it stops."""
        since = self._since(records)
        return self._patience is not None and since is not None and since >= self._patience

    def _since(self, records: Sequence[RoundRecord]) -> int | None:
        """How many measurements there were since the best one; None without any."""
        measured = [record.metrics for record in records if self._metric in record.metrics]
        values = [self._sign * metrics[self._metric] for metrics in measured]
        if not values:
            return None
        return len(values) - 1 - values.index(max(values))
