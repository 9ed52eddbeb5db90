"""Trackers of experiments, with their own stores on this machine; skipped where not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloop.callbacks import MLflow, WandB
from fedloop.callbacks.scalars import scalars
from fedloop.defense.types import RoundRecord


def record(number: int) -> RoundRecord:
    return RoundRecord(number, {"a": (0.1,)}, {"a": 1.0, "m": 0.0}, {"a": 1.0, "m": 0.0})


@pytest.mark.filterwarnings("ignore")  # its own, of SQLAlchemy
def test_mlflow_goes_on_with_its_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for number in (1, 2):
        board = MLflow(uri, "defended", "run-1", {"training": {"lr": 0.001}, "seed": 3})
        board(record(number))
        board.close()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("defended")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"training.lr": "0.001", "seed": "3"}
    assert run.info.status == "FINISHED"
    name, value = next(iter(scalars(record(1)).items()))
    logged = client.get_metric_history(run.info.run_id, name)
    assert [(metric.step, metric.value) for metric in logged] == [(1, value), (2, value)]


def test_wandb_keeps_a_run_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    board = WandB("project", "defended", "run-1", {"seed": 3}, tmp_path)
    board(record(1))
    board.close()
    [kept] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert kept.stat().st_size > 0
