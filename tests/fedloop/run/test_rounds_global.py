"""Who can move the global LoRA: rounds of the server, on updates that a tiny Llama trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fedloop.client.client import Trained
from fedloop.config import Config
from fedloop.defense.types import RoundRecord
from fedloop.run.build import build_clients, build_defense, build_federation
from fedloop.run.federation import Federation
from fedloop.run.global_lora import GlobalLoRA
from fedloop.run.plan import plan_round
from fedloop.run.round import OpenRound
from tests.helpers import federated
from tests.helpers.federated import Files, defended, run, settings, vector

RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "median": {},
    "trimmed_mean": {"f": 1},
    "meamed": {"f": 1},
    "krum": {"f": 1},
    "multi_krum": {"f": 1},
    "geometric_median": {},
    "centered_clipping": {},
    "nnm": {"f": 1},
    "foolsgold": {},
    "residual": {},
    "dnc": {"f": 1},
    "lasa": {},
}


class Bench(NamedTuple):
    """A federation, what its clients trained in the first round, and who is malicious."""

    config: Config
    federation: Federation
    trained: Mapping[str, Trained]
    malicious: str


@cache
def bench(files: Files) -> Bench:
    config = Config.of(settings(files))
    clients = build_clients(config)
    federation = build_federation(config)
    plan = plan_round(config, 1)
    trained = {
        sent.update.client_id: sent
        for sent in federation.train(plan, [clients[index] for index in plan.chosen])
    }
    malicious = next(client.client_id for client in clients if client.role == "malicious")
    return Bench(config, federation, trained, malicious)


def play(
    made: Bench, sent: Mapping[str, Trained], rule: str = "mean", folder: Path | None = None
) -> tuple[RoundRecord, torch.Tensor]:
    """The first round with these updates: its record, and the new global LoRA."""
    chosen = {"rule": rule, "options": RULES.get(rule, {})}
    config = made.config.model_copy(
        update={"aggregation": made.config.aggregation.model_copy(update=chosen)}
    )
    initial = made.federation.initial
    server = GlobalLoRA(initial, build_defense(config, initial), config, folder=folder)
    with OpenRound(server, plan_round(config, 1), list(sent)) as arriving:
        for client, one in sent.items():
            arriving.receive(client, one)
        record = arriving.close().record()
    assert folder is None or not any(folder.iterdir())  # nothing of a round stays on disk
    return record, vector(server.lora)


def bending(
    made: Bench, change: Callable[[Trained], Trained | str], *clients: str
) -> dict[str, Any]:
    """What arrives if these clients send something else."""
    return {
        client: change(one) if client in clients else one for client, one in made.trained.items()
    }


def scaled(factor: float, loss: float = 1.0, **fields: Any) -> Callable[[Trained], Trained]:
    """A client that sends its change times a factor."""

    def change(one: Trained) -> Trained:
        delta = federated.mapped(one.delta, lambda tensor: factor * tensor)
        return replace(one, update=replace(one.update, adapter=delta, **fields), loss=loss)

    return change


@pytest.mark.parametrize("rule", RULES)
def test_a_rejected_client_cannot_move_the_global_lora(
    rule: str, tiny_files: Files, tmp_path: Path
) -> None:
    made = bench(tiny_files)
    rejected: list[Callable[[Trained], Trained | str]] = [
        scaled(math.nan, loss=math.nan),
        scaled(math.inf),
        scaled(1.0, num_examples=0),
        scaled(50.0, num_examples="4"),
        lambda one: "what it sent cannot be read",
    ]
    moved = set()
    for change in rejected:
        record, lora = play(made, bending(made, change, made.malicious), rule, tmp_path)
        assert record.factors[made.malicious] == 0.0
        assert record.reasons.keys() == {made.malicious}
        assert not record.skipped
        assert not record.note
        assert all(map(math.isfinite, record.losses.values()))
        assert RoundRecord.from_json(record.to_json()) == record
        moved.add(tuple(lora.tolist()))
    others = {client: one for client, one in made.trained.items() if client != made.malicious}
    without, expected = play(made, others, rule)
    assert moved == {tuple(expected.tolist())}
    assert without.factors.keys() == record.factors.keys() - {made.malicious}
    assert not torch.equal(expected, vector(made.federation.initial))
    # Negative control: if it is not rejected, it counts.
    counted, free = play(made, bending(made, scaled(-50.0), made.malicious), rule)
    assert not counted.reasons
    if rule not in ("krum", "median", "trimmed_mean", "multi_krum", "dnc", "meamed"):
        assert not torch.equal(free, expected)


def test_two_updates_of_a_client_count_nothing(tiny_files: Files) -> None:
    made = bench(tiny_files)
    initial = made.federation.initial
    server = GlobalLoRA(initial, build_defense(made.config, initial), made.config)
    first = next(iter(made.trained))
    with OpenRound(server, plan_round(made.config, 1), list(made.trained)) as arriving:
        for client, one in [*made.trained.items(), (first, made.trained[first])]:
            arriving.receive(client, one)
        record = arriving.close().record()
    assert record.factors[first] == 0.0
    assert list(record.reasons) == [first]
    assert "duplicate: 2 replies" in record.reasons[first]


def test_a_skipped_round_keeps_the_global_lora(tiny_files: Files) -> None:
    made = bench(tiny_files)
    initial = vector(made.federation.initial)
    record, lora = play(made, bending(made, scaled(math.nan), *made.trained))
    assert record.note == "skipped: no well-formed update"
    gated = run(tiny_files, defense={**defended(tiny_files), "threshold": 1e-6})
    assert all(one.note.startswith("skipped by the safety gate") for one in gated.records)
    for one in (record, *gated.records):
        assert one.skipped
        assert one.weights == {}
        assert set(one.factors.values()) == {0.0}
    assert torch.equal(lora, initial)
    assert torch.equal(vector(gated.adapter), initial)
