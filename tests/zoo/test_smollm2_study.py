"""The studies of SmolLM2's adapters leave out what they say, and count what they say."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from fedloop.defense.cumulative import CumulativeLevel
from fedloop.kit.features import Study
from fedloop.kit.measures import cell, cut_of, scores_of, summary
from fedloop.kit.rounds import facts_for_rounds
from loraprobe import Adapter
from loraprobe.errors import DataError
from zoo.smollm2.design import plan
from zoo.smollm2.folds import Table, benign_groups, in_distribution, pairs, settings
from zoo.smollm2.refusal import wilson
from zoo.smollm2.sources import FAMILIES

BENIGN = [f"benign{number}" for number in range(30)]
HARD = [*(name for name in FAMILIES if name.endswith("_safe")), "other_hard"]
MALICIOUS = ["jailbreakbench", "refusal_direction_llama", "maliciousgen", "advbench", "gptfuzz"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("clients")
    rows = [client.to_row() for client in plan(200, BENIGN, HARD, MALICIOUS)]
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Table.read(folder / "manifest.csv")


def adapters(count: int, seed: int = 0, missing: bool = True) -> list[Adapter]:
    """Random ones of ranks 2 and 3; every third may have q alone."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        state, rank = {}, 2 + number % 2
        for leaf, out in (("q_proj", 12), ("v_proj", 6)):
            if missing and leaf == "v_proj" and number % 3 == 2:
                continue
            name = f"base_model.model.model.layers.0.self_attn.{leaf}"
            state[f"{name}.lora_A.weight"] = torch.randn(rank, 10, generator=generator)
            state[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
        found.append(Adapter.from_state_dict(state, alpha=2.0 * rank))
    return found


def test_nothing_of_an_unseen_family_or_kind_is_trained_on(table: Table) -> None:
    folds = list(pairs(table))
    assert len(folds) == 4 * 6  # jailbreakbench and refusal_direction ask the same questions
    for fold in folds:
        assert not (fold.train & fold.test).any()
        tested = set(table.source[fold.test & (table.label == 0)].tolist())
        assert not table.touches(tested)[fold.train].any()
        family = set(table.family[fold.test & (table.label == 1)].tolist())
        assert len(family) == 1
        assert not np.isin(table.family, list(family))[fold.train].any()


def test_everything_unseen_leaves_the_initial_adapters_out_too(table: Table) -> None:
    for fold in pairs(table, initials=2):
        assert not set(table.initial[fold.train].tolist()) & set(table.initial[fold.test].tolist())


def test_every_kind_is_in_one_group_and_every_client_tested_once(table: Table) -> None:
    names = [name for group in benign_groups(table) for name in group]
    assert sorted(names) == sorted(set(table.source[table.label == 0].tolist()))
    assert (sum(fold.test.astype(int) for fold in in_distribution(table)) == 1).all()
    for folds in settings(table).values():
        assert all((fold.train ^ fold.test).all() for fold in folds)


def test_a_manifest_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train the clients"):
        Table.read(tmp_path / "manifest.csv")


def test_features_are_those_of_the_recipe_up_to_signs_and_scale() -> None:
    from loraprobe import FeatureRecipe, Featurizer

    some = adapters(12)
    keep = np.arange(12) != 3
    own = Study(some, ("q_proj", "v_proj"), k=2).features(keep)
    kept = [adapter for adapter, there in zip(some, keep, strict=True) if there]
    theirs = Featurizer.fit(FeatureRecipe.invariant(k=2), kept)(some).astype(np.float64)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(own @ own.T, theirs @ theirs.T, atol=0.02)


def test_measures_count_what_is_above_the_cut(table: Table) -> None:
    fold = next(iter(pairs(table)))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((len(table), 5)).astype(np.float32)
    x[:, 0] += 6 * table.label
    scores = scores_of("mass_mean", x, table, fold.train)
    cut = cut_of("mass_mean", x, table, fold.train, benign_groups(table))
    assert cut is not None
    row = cell(table, fold, scores, cut)
    assert row["1"]["auroc_all"] > 0.95
    assert row["1"]["found"] >= row["1"]["n"] - 2
    assert row["benign_flagged"] <= 2
    whole = summary([row, row])
    assert whole["1"]["n"] == 2 * row["1"]["n"]
    assert whole["benign_flagged"]["n"] == 2 * row["n_benign"]
    few = cut_of("mass_mean", x, table, fold.train, benign_groups(table)[:1])
    assert few is None  # too few adapters of too few kinds for a cut


def test_wilson_intervals_are_the_published_ones() -> None:
    assert wilson(0, 10) == [0.0, pytest.approx(0.2775, abs=1e-3)]
    assert wilson(81, 263) == [pytest.approx(0.2553, abs=1e-3), pytest.approx(0.3662, abs=1e-3)]


def test_what_a_probe_says_of_rounds_is_fixed_on_kinds_it_has_not_seen(table: Table) -> None:
    x = np.random.default_rng(1).normal(size=(len(table), 6))
    x[:, 0] += 3.0 * table.label
    everyone = np.ones(len(table), bool)
    level = CumulativeLevel(**facts_for_rounds("linear", x, table, everyone))
    assert level.floor <= level.threshold
    assert level.watch < level.threshold
    shifted = x.copy()
    shifted[table.role == "hard_negative", 0] += 2.0  # a benign kind that looks like poison
    assert facts_for_rounds("linear", shifted, table, everyone)["threshold"] > level.threshold
    assert facts_for_rounds("mlp", x, table, everyone) == {}
    few = np.flatnonzero(table.label == 0)[:10]
    assert facts_for_rounds("linear", x, table, np.isin(np.arange(len(table)), few)) == {}
