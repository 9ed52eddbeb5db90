"""Federations on a real model: rounds of the small example base, the rival's screen, the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedloop.client.training import LocalTraining
from fedloop.config import Config
from fedloop.defense.types import Assessment
from fedloop.errors import ConfigError
from fedloop.run.build import build_clients
from fedloop.run.plan import plan_round
from loraprobe import Adapter
from loraprobe.adapters.deltas import add_delta
from loraprobe.adapters.layout import pack
from paper_repro.federation import page
from paper_repro.federation.cells import ATTACKS, ROWS, Cell, table
from paper_repro.federation.engine import Federation, Trainer, reference_of
from paper_repro.federation.repair import Late
from paper_repro.federation.run import LINES, read_lines
from paper_repro.federation.screens import MIXTURES, rival

EXAMPLE = Path("fedloop/example/example.toml")


@pytest.fixture(scope="module")
def config() -> Config:
    small = {"rounds": 1, "defense": {"level": "none"}, "evaluation": {}}
    values = {**Config.read(EXAMPLE).model_dump(), **small}
    values["training"] |= {"steps": 2, "max_length": 96}
    values["lora"]["dropout"] = 0.0
    return Config.of(values)


@pytest.fixture(scope="module")
def trainer(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(config, tmp_path_factory.mktemp("kept"))


def vector(adapter: Adapter) -> np.ndarray:
    return np.asarray(pack(adapter)[0])


def test_what_was_trained_once_is_not_trained_again(config: Config, trainer: Trainer) -> None:
    examples = build_clients(config)[0].examples
    training = LocalTraining(1e-2, 2, 8, 96)
    first, loss, seconds = trainer.update(examples, trainer.initial, training, 1)
    again, *facts = trainer.update(examples, trainer.initial, training, 1)
    assert np.array_equal(vector(first), vector(again))
    assert facts == pytest.approx([loss, seconds])
    for other in (
        trainer.update(examples, trainer.initial, replace(training, lr=2e-2), 1),
        trainer.update(examples, trainer.initial, training, 2),
        trainer.update(examples, add_delta(trainer.initial, first), training, 1),
        trainer.update(examples[8:], trainer.initial, training, 1),
    ):
        assert not np.array_equal(vector(first), vector(other[0]))


def test_a_screened_round_is_the_mean_of_those_it_keeps(config: Config, trainer: Trainer) -> None:
    clients = build_clients(config)
    plan = plan_round(config, 1)
    poison = next(client.examples for client in clients if client.role == "malicious")
    reference = reference_of(trainer, poison, 4, 1e-2)
    federation = Federation(trainer, config, rival("mixture", reference))
    federation.round(plan, clients)
    (kept,) = federation.kept
    assert {client.role for client in clients if not kept[client.client_id]} == {"malicious"}
    updates = [
        trainer.update(client.examples, trainer.initial, plan.training, seed)[0]
        for client, seed in zip(clients, plan.seeds, strict=True)
        if kept[client.client_id]
    ]
    moved = vector(federation.lora) - vector(trainer.initial)
    assert np.allclose(moved, np.mean([vector(one) for one in updates], axis=0), atol=1e-6)


def test_taking_a_client_out_makes_the_mean_that_it_was_never_in(
    config: Config, trainer: Trainer
) -> None:
    clients = build_clients(config)
    ended = []
    for known_after in (1, 0):
        federation = Late(trainer, config, clients, known_after)
        federation.round(plan_round(config, 1), clients)
        federation.repair()
        ended.append(vector(federation.lora))
    assert np.allclose(*ended, atol=1e-6)
    assert not np.allclose(ended[0], vector(trainer.initial), atol=1e-6)


def test_two_components_always_split_and_the_bic_does_not(config: Config, trainer: Trainer) -> None:
    clients = [client for client in build_clients(config) if client.role == "benign"]
    training = LocalTraining(1e-2, 2, 8, 96)
    updates = {
        str(seed): trainer.update(clients[seed % 2].examples, trainer.initial, training, seed)[0]
        for seed in range(6)
    }
    assessment = Assessment(1, {}, {}, {}, accepted=updates)
    reference = add_delta(trainer.initial, updates["0"])
    dropped = {
        name: sum(not kept for kept in rival(name, reference)(assessment, trainer.initial).values())
        for name in MIXTURES
    }
    assert dropped["mixture"] >= dropped["mixture_by_bic"]
    assert dropped["mixture"] > 0


def test_every_cell_has_one_name() -> None:
    cells = list(table((0, 1)))
    assert len({str(cell) for cell in cells}) == len(cells)
    assert all(Cell.named(str(cell)) == cell for cell in cells[:20])
    assert {(cell.malicious, cell.share) for cell in cells} == set(ATTACKS)
    with pytest.raises(ConfigError, match="got the cell 'ours'; expected ROW"):
        Cell.named("ours")


def test_the_page_says_what_the_lines_say() -> None:
    assert page.rendered() == page.PAGE.read_text(encoding="utf-8")
    lines = read_lines(LINES)
    assert {line["row"] for line in lines} <= set(ROWS)
    for line in lines:
        assert set(line["malicious_clients"]) <= set(line["clients"])
        assert len(line["malicious_clients"]) == line["malicious"]
        assert all(0 <= hits <= n for hits, n in line["refused"].values())
