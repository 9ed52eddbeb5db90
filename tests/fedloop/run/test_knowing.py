"""Attackers of a simulation who know the defence: hidden in training, waiting, in parts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloop.client.evading import ProductLogit, moved_below
from fedloop.config import Config
from fedloop.errors import ConfigError
from fedloop.flower.deploy.launch import run_on_loopback
from fedloop.flower.server import _config
from fedloop.flower.settings import EngineSettings
from fedloop.run.build import build_clients
from loraprobe import FeatureRecipe, Probe, factor_delta, fit_probe
from tests.helpers import federated, probes
from tests.helpers.federated import Files, defended, experiment, run, settings, vector

BOUND = -8.0  # far below what anybody scores by chance


@pytest.fixture(scope="module")
def reading_products(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("products") / "probe"
    return Files(tiny_files.base, product_probe().save_pretrained(folder))


def product_probe() -> Probe:
    data = probes.labelled(24, 2, **{**federated.LORA, "kind": "weights"})
    recipe = FeatureRecipe.invariant(k=4)
    return fit_probe(data.adapters, data.labels, recipe=recipe, groups=data.groups)


def logits(result: Any) -> dict[str, list[list[float]]]:
    """Role -> of every round and client."""
    found: dict[str, list[list[float]]] = {}
    for record in result.records:
        for client, scores in record.scores.items():
            odds = [math.log(score / (1 - score)) for score in scores]
            found.setdefault(result.roles[client]["role"], []).append(odds)
    return found


def test_the_logit_is_the_probes_and_moves_below_the_bound() -> None:
    probe = product_probe()
    start, after = (
        probes.labelled_adapter(seed, True, 1.0, **{**federated.LORA, "kind": "weights"})
        for seed in (1, 2)
    )
    logit = ProductLogit.of(probe)
    moved = moved_below(after, start, logit, BOUND)
    before, there = (float(probe([factor_delta(one, start)])[0]) for one in (after, moved))
    assert math.log(before / (1 - before)) > BOUND + 1
    assert math.log(there / (1 - there)) == pytest.approx(BOUND, abs=0.02)
    for name in after:  # as little as it takes
        step = np.linalg.norm(np.asarray(moved[name].B) - np.asarray(after[name].B))
        assert step < np.linalg.norm(np.asarray(after[name].B))


def test_who_evades_in_training_is_read_below_the_bound(reading_products: Files) -> None:
    defense = defended(reading_products, "client")
    plain, evading = (
        run(reading_products, defense=defense, clients={"malicious": 2, **clients})
        for clients in ({}, {"evade_probe": BOUND})
    )
    assert all(odds < BOUND + 0.05 for one in logits(evading)["malicious"] for odds in one)
    assert all(odds > BOUND + 1 for one in logits(plain)["malicious"] for odds in one)
    assert logits(evading)["benign"][0] == logits(plain)["benign"][0]  # of the first round
    losses = [result.records[0].losses for result in (plain, evading)]
    assert losses[0] != losses[1]
    assert all(math.isfinite(loss) for loss in losses[1].values())


def test_who_waits_is_benign_until_its_round(tiny_files: Files) -> None:
    scaled = {"update_attack": "scaling", "update_attack_options": {"factor": 50.0}}
    nobody = {"malicious": 0, "malicious_source": None}

    waited, at_once, spared = (
        run(tiny_files, clients=clients)
        for clients in ({**scaled, "attack_from": 2}, scaled, nobody)
    )
    first = [result.records[0].losses for result in (waited, at_once, spared)]
    assert first[0] == first[2]
    assert first[1] != first[2]  # negative control
    unscaled = run(tiny_files, clients={"attack_from": 2})
    far, near = (
        float((vector(result.adapter) - vector(spared.adapter)).norm())
        for result in (waited, unscaled)
    )
    assert far > 5 * near > 0


def test_colluders_of_a_run_send_their_poison_between_them(tiny_files: Files) -> None:
    hidden = {"update_attack": "collusion", "update_attack_options": {"times": 4.0}}
    plain, colluding = (
        run(tiny_files, rounds=1, clients={"malicious": 2, **clients}) for clients in ({}, hidden)
    )
    moved = vector(plain.adapter)
    assert torch.allclose(vector(colluding.adapter), moved, atol=1e-4 * float(moved.norm()))
    assert not torch.equal(vector(colluding.adapter), moved)


@pytest.mark.parametrize(
    ("clients", "probe", "message"),
    [
        ({"evade_probe": -4.0}, None, "without a defense.probe"),
        ({"evade_probe": -4.0}, "slices", "a linear one that reads products"),
        ({"evade_probe": -4.0, "malicious": 0}, None, "evade_probe without malicious clients"),
    ],
)
def test_what_attackers_cannot_know_is_refused(
    tiny_files: Files, clients: dict[str, Any], probe: str | None, message: str
) -> None:
    defense = defended(tiny_files) if probe else {}
    with pytest.raises(ConfigError, match=message):
        run(tiny_files, clients=clients, defense=defense)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients": {"attack_from": 3}}, "attack_from 3 and 2 rounds"),
        ({"aggregation": {"lora": "frozen_a"}}, "lora 'frozen_a'"),
        ({"defense": {"level": "shadow"}}, "level 'shadow'"),
        ({"defense": {"level": "none", "probe": None}}, "without a defense.probe and a"),
    ],
)
def test_attacks_that_would_not_be_what_they_say_are_refused(
    reading_products: Files, changes: dict[str, Any], message: str
) -> None:
    values = settings(
        reading_products, clients={"evade_probe": -4.0}, defense=defended(reading_products)
    )
    for table, fields in changes.items():
        values[table] = {**values.get(table, {}), **fields}
    with pytest.raises(ConfigError, match=message):
        Config.of(values)


@pytest.mark.parametrize("clients", [{"evade_probe": -4.0}, {"attack_from": 2}])
def test_nodes_are_not_told_of_it(
    reading_products: Files, tmp_path: Path, clients: dict[str, Any]
) -> None:
    values = settings(reading_products, clients=clients, defense=defended(reading_products))
    path = experiment(tmp_path / "run.toml", values)
    assert build_clients(Config.read(path))
    with pytest.raises(ConfigError, match=f"clients.{next(iter(clients))}; .*one process"):
        _config(path, tmp_path / "out")
    with pytest.raises(ConfigError, match="one process"):
        run_on_loopback(Config.read(path), EngineSettings())  # before a folder is asked for
