"""A run in MLflow: its configuration as parameters, every round's numbers as metrics."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from ..defense.types import RoundRecord
from ..errors import MissingExtra
from .scalars import scalars

_TAG = "fedloop_run"
_BATCH = 1000  # metrics that MLflow takes at once
_NO_KEY = re.compile(r"[^\w\-./: ]")  # what its keys may not hold


class MLflow:
    """Logs a run, or goes on with it.

    Args:
        uri: of the tracking store: "sqlite:///mlflow.db", a folder, or a server.
        name: of the experiment.
        run: the run's own id; a run that MLflow knows by it is gone on with.
        parameters: nested ones are logged as "section.field".

    Raises:
        MissingExtra: MLflow is not installed.
    """

    def __init__(self, uri: str, name: str, run: str, parameters: Mapping[str, Any]) -> None:
        try:
            from mlflow.entities import Metric
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise MissingExtra("mlflow", "mlflow", "output.mlflow") from error
        self._metric = Metric
        self._client = MlflowClient(tracking_uri=uri)
        former = self._client.get_experiment_by_name(name)
        experiment = former.experiment_id if former else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.{_TAG} = '{run}'", max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            return
        self._run = self._client.create_run(experiment, tags={_TAG: run}).info.run_id
        for section, values in parameters.items():
            fields = values.items() if isinstance(values, Mapping) else [("", values)]
            for field, value in fields:
                key = f"{section}.{field}".removesuffix(".")
                self._client.log_param(self._run, key, str(value)[:500])

    def __call__(self, record: RoundRecord) -> None:
        """Log one round."""
        now = int(time.time() * 1000)
        metrics = [
            self._metric(_NO_KEY.sub("_", name)[:250], value, now, record.round)
            for name, value in scalars(record).items()
        ]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run, metrics=metrics[start : start + _BATCH])

    def close(self) -> None:
        """Say that nothing more comes for now."""
        self._client.set_terminated(self._run)
