"""Invariant features: what cannot change them, what must, and how much of an adapter was read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from loraprobe import (
    Adapter,
    FeatureRecipe,
    Featurizer,
    LoRAPair,
    Probe,
    factor_delta,
    fit_probe,
    weight_delta,
)
from loraprobe.errors import (
    KindMismatch,
    LayoutMismatch,
    NonFiniteError,
    ProbeFormatError,
    RecipeError,
)
from loraprobe.features.invariant import change_of, learn_bases, module_features
from loraprobe.fit.fit import default_recipe
from loraprobe.hub.format import config_digest
from tests.helpers import make

RECIPE = FeatureRecipe.invariant(k=3)
TRAINING = [make.adapter(seed=seed, r=seed + 1) for seed in range(1, 6)]  # of ranks 2 to 6
FEATURIZER = Featurizer.fit(RECIPE, TRAINING)
ADAPTER = make.adapter(seed=9)
MODULES = sorted(ADAPTER)


def features(adapter: Adapter, featurizer: Featurizer = FEATURIZER) -> np.ndarray:
    return featurizer([adapter])[0]


def each(adapter: Adapter, change: Callable[[LoRAPair], LoRAPair]) -> Adapter:
    return make.with_pairs(adapter, {module: change(pair) for module, pair in adapter.items()})


def tensor(array: object) -> torch.Tensor:
    return torch.as_tensor(np.asarray(array, np.float64))


def padded(pair: LoRAPair) -> LoRAPair:
    """Three further ranks whose column of B is zero, whatever their row of A."""
    A, B = tensor(pair.A), tensor(pair.B)
    rows = torch.randn(3, A.shape[1], generator=torch.Generator().manual_seed(1)).double()
    columns = torch.zeros(B.shape[0], 3).double()
    return LoRAPair(torch.cat([A, rows]), torch.cat([B, columns], 1), pair.scaling)


def rescaled(pair: LoRAPair) -> LoRAPair:
    return LoRAPair(pair.A, tensor(pair.B) / 32, pair.scaling * 32)


SAME_PRODUCT = {"B G and G^-1 A": make.gauged, "alpha c and B / c": rescaled, "zero rank": padded}


@pytest.mark.parametrize("change", SAME_PRODUCT.values(), ids=SAME_PRODUCT)
def test_what_leaves_the_product_leaves_the_features(
    change: Callable[[LoRAPair], LoRAPair],
) -> None:
    assert features(each(ADAPTER, change)) == pytest.approx(features(ADAPTER), abs=1e-6)


def test_the_features_of_b_do_change() -> None:
    of_b = Featurizer.fit(FeatureRecipe.all_b(), [ADAPTER])
    gauged = each(ADAPTER, make.gauged)
    assert np.abs(features(gauged, of_b) - features(ADAPTER, of_b)).max() > 0.05


OTHER_PRODUCT: dict[str, Callable[[LoRAPair], LoRAPair]] = {
    "another A": lambda pair: LoRAPair(make.pair(*pair.shape, pair.rank, seed=5).A, pair.B, 2.0),
    "another B": lambda pair: LoRAPair(pair.A, make.pair(*pair.shape, pair.rank, seed=5).B, 2.0),
    "the opposite": lambda pair: LoRAPair(pair.A, pair.B, -pair.scaling),
    "one rank less": lambda pair: LoRAPair(tensor(pair.A)[1:], tensor(pair.B)[:, 1:], 2.0),
}


@pytest.mark.parametrize("change", OTHER_PRODUCT.values(), ids=OTHER_PRODUCT)
def test_another_product_has_other_features(change: Callable[[LoRAPair], LoRAPair]) -> None:
    assert np.abs(features(each(ADAPTER, change)) - features(ADAPTER)).max() > 0.05


def test_features_are_those_of_the_dense_change() -> None:
    """The definition, with D as one matrix."""
    module = MODULES[0]
    left, right = learn_bases(module, TRAINING, 3)
    dense = np.asarray(ADAPTER[module].dense(), np.float64)
    unit = dense / np.linalg.norm(dense)
    U, V = left.astype(np.float64), right.astype(np.float64)
    gram = U.T @ unit @ unit.T @ U
    rows, columns = np.triu_indices(3)
    triangle = gram[rows, columns] * np.where(rows == columns, 1, np.sqrt(2))
    expected = np.concatenate([(U.T @ unit @ V).reshape(-1), triangle])
    found = module_features(change_of(ADAPTER, module), left, right, ("product", "gram"))
    assert found == pytest.approx(expected, abs=1e-6)
    assert np.linalg.norm(triangle) == pytest.approx(np.linalg.norm(gram))


def test_bases_are_the_leading_directions_of_the_training_changes() -> None:
    module = MODULES[0]
    units = [np.asarray(a[module].dense(), np.float64) for a in TRAINING]
    units = [unit / np.linalg.norm(unit) for unit in units]
    for basis, total in zip(
        learn_bases(module, TRAINING, 3),
        (sum(u @ u.T for u in units), sum(u.T @ u for u in units)),
        strict=True,
    ):
        leading = np.linalg.eigh(total)[1][:, -3:]
        found = basis.astype(np.float64)
        assert found @ found.T == pytest.approx(leading @ leading.T, abs=5e-3)


def test_bases_of_few_ranks_have_no_further_directions() -> None:
    left, _ = learn_bases(MODULES[0], [make.adapter(seed=1, r=2)], 4)
    assert (np.linalg.norm(left.astype(np.float64), axis=0) > 0.5).tolist() == [True] * 2 + [
        False
    ] * 2


# --- every way of saying what the change is


def test_a_factor_delta_is_read_as_the_change_of_the_product() -> None:
    before, after = make.adapter(seed=3), make.adapter(seed=4)
    expected = features(weight_delta(after, before))
    assert features(factor_delta(after, before)) == pytest.approx(expected, abs=1e-6)
    own = factor_delta(after, before)
    bare = Adapter(dict(own), kind="factor_delta")
    assert features(bare.since(before)) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(KindMismatch, match="needs the adapter that training started from"):
        features(bare)


def test_from_a_b_of_zero_weights_and_both_deltas_are_one_change() -> None:
    start = each(ADAPTER, lambda pair: LoRAPair(pair.A, tensor(pair.B) * 0, pair.scaling))
    after = make.adapter(seed=4)
    expected = features(after)
    for change in (factor_delta(after, start), factor_delta(after, None)):
        assert features(change) == pytest.approx(expected, abs=1e-6)
    assert features(weight_delta(after, start)) == pytest.approx(expected, abs=1e-6)


def test_a_small_change_of_large_factors_keeps_its_norm() -> None:
    """||D|| of [B_t, -B_0] [A_t; A_0] is not the rounding of two large products."""
    before = make.adapter(seed=3, dtype=torch.float64)
    moved = each(
        before, lambda pair: LoRAPair(pair.A, tensor(pair.B) + 1e-9 * tensor(pair.B)[:, :1], 2.0)
    )
    module = MODULES[0]
    dense = np.asarray(moved[module].dense()) - np.asarray(before[module].dense())
    found = change_of(weight_delta(moved, before), module).norm
    assert found == pytest.approx(np.linalg.norm(dense), rel=1e-4)


# --- any subset of the modules


def test_a_part_of_the_modules_is_read_and_reported() -> None:
    part = Adapter({module: ADAPTER[module] for module in MODULES[:2]})
    rows, coverages = FEATURIZER.read([part, ADAPTER])
    assert [str(coverage) for coverage in coverages] == ["2 of 4 modules", "4 of 4 modules"]
    assert (rows[0] == 0).mean() == 0.5


def test_modules_without_a_change_are_not_read() -> None:
    def still(pair: LoRAPair) -> LoRAPair:
        return LoRAPair(pair.A, tensor(pair.B) * 0, pair.scaling)

    quiet = make.with_pairs(ADAPTER, {MODULES[0]: still(ADAPTER[MODULES[0]])})
    rows, coverages = FEATURIZER.read([quiet, each(ADAPTER, still)])
    assert [coverage.read for coverage in coverages] == [3, 0]
    assert not rows[1].any()


def test_training_adapters_may_have_different_modules() -> None:
    parts = [
        Adapter({module: adapter[module] for module in MODULES[start : start + 2]})
        for adapter in TRAINING
        for start in (0, 2)
    ]
    assert FEATURIZER.num_features == Featurizer.fit(RECIPE, parts).num_features


def test_unknown_modules_and_shapes_are_refused() -> None:
    with pytest.raises(LayoutMismatch, match="would go unscored"):
        features(make.with_pairs(ADAPTER, {make.module("o_proj"): make.pair()}))
    with pytest.raises(LayoutMismatch, match="base model"):
        features(make.with_pairs(ADAPTER, {MODULES[0]: make.pair(11, 12)}))


@pytest.mark.parametrize("factor", ["A", "B"])
def test_numbers_that_are_not_finite_are_refused(factor: str) -> None:
    pair = ADAPTER[MODULES[1]]
    A, B = tensor(pair.A).clone(), tensor(pair.B).clone()
    {"A": A, "B": B}[factor][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=MODULES[1]):
        features(make.with_pairs(ADAPTER, {MODULES[1]: LoRAPair(A, B, 2.0)}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k 0"),
        ({"k": True}, "k True"),
        ({"min_coverage": 1.5}, "min_coverage"),
        ({"features": ("product", "slices")}, "by themselves"),
        ({"factors": ("B",)}, "both factors"),
        ({"features": ("slices",)}, "expected them with product or gram"),
        ({"pool": True}, "pool"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        FeatureRecipe.from_dict({**RECIPE.to_dict(), **fields})


def test_recipes_of_other_features_are_written_as_before() -> None:
    assert {"k", "min_coverage"} & FeatureRecipe.paper().to_dict().keys() == set()
    assert FeatureRecipe.from_dict(RECIPE.to_dict()) == RECIPE


# --- verdicts and folders

BASE = "org/base"


def based(adapter: Adapter, base: str | None = BASE) -> Adapter:
    return Adapter(dict(adapter), base_model=base)


@cache
def invariant_probe() -> Probe:
    """Fitted on weights of several ranks; the malicious ones share one direction."""
    shift = make.adapter(seed=50, r=2)
    adapters = []
    for number in range(24):
        own = make.adapter(seed=number + 1, r=2 + number % 3)
        size = 2.0 * (number % 2)
        pairs = {
            module: LoRAPair(
                torch.cat([tensor(pair.A), tensor(shift[module].A)]),
                torch.cat([tensor(pair.B), size * tensor(shift[module].B)], 1),
                2.0,
            )
            for module, pair in own.items()
        }
        adapters.append(Adapter(pairs, base_model=BASE))
    return fit_probe(adapters, [number % 2 for number in range(24)], recipe="invariant")


def test_the_default_recipe_follows_what_the_adapters_say() -> None:
    weights = [make.adapter(seed=seed) for seed in range(4)]
    assert default_recipe(weights) == FeatureRecipe.invariant()
    assert default_recipe([factor_delta(weights[0], weights[1])]) == FeatureRecipe.invariant()
    bare = Adapter(dict(weights[0]), kind="factor_delta")
    assert default_recipe([*weights, bare]) == FeatureRecipe.paper()


def test_a_verdict_says_what_was_read_and_needs_enough_of_it() -> None:
    probe = invariant_probe()
    whole = based(ADAPTER)
    part = Adapter({MODULES[0]: ADAPTER[MODULES[0]]}, base_model=BASE)
    of_whole, of_part = probe.verdicts([whole, part])
    assert str(of_whole.coverage) == "4 of 4 modules"
    assert str(of_part.coverage) == "1 of 4 modules"
    assert of_whole.reason == of_part.reason == ""
    strict = replace(
        probe,
        featurizer=replace(probe.featurizer, recipe=FeatureRecipe.invariant(min_coverage=0.5)),
    )
    [verdict] = strict.verdicts([part])
    assert verdict.label == "inconclusive"
    assert "only 1 of 4 modules" in verdict.reason


def test_an_adapter_without_any_change_is_inconclusive() -> None:
    still = each(based(ADAPTER), lambda pair: LoRAPair(pair.A, tensor(pair.B) * 0, 2.0))
    [verdict] = invariant_probe().verdicts([based(still)])
    assert (verdict.label, str(verdict.coverage)) == ("inconclusive", "0 of 4 modules")


@pytest.mark.parametrize("of_adapter", [None, BASE])
@pytest.mark.parametrize("of_probe", [None, BASE])
def test_a_base_that_was_not_checked_has_no_verdict(
    of_adapter: str | None, of_probe: str | None
) -> None:
    probe = replace(invariant_probe(), base_model=of_probe)
    [verdict] = probe.verdicts([based(ADAPTER, of_adapter)])
    checked = None not in (of_adapter, of_probe)
    assert (verdict.label == "inconclusive") == (not checked)
    assert ("base model" in verdict.reason) == (not checked)
    [trusted] = probe.verdicts([based(ADAPTER, of_adapter)], check_base=False)
    assert trusted.label != "inconclusive"


def test_a_saved_probe_is_the_same_probe(tmp_path: Path) -> None:
    probe = invariant_probe()
    loaded = Probe.from_pretrained(probe.save_pretrained(tmp_path))
    assert loaded.featurizer == probe.featurizer
    assert loaded([ADAPTER]).tobytes() == probe([ADAPTER]).tobytes()


def _damaged(name: str, change: Callable[[np.ndarray], np.ndarray | None], folder: Path) -> None:
    """Change one array, and state the file's new size and hash, as who exchanges it would."""
    path = folder / "featurizer.safetensors"
    arrays = safetensors.numpy.load_file(path)
    changed = change(arrays.pop(name))
    if changed is not None:
        arrays[name] = changed
    path.write_bytes(safetensors.numpy.save(arrays))
    config = json.loads((folder / "config.json").read_text())
    data = path.read_bytes()
    config["featurizer"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    config["digest"] = config_digest(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda array: None,
        lambda array: array[:-1],
        lambda array: array.astype(np.float64),
        lambda array: np.full_like(array, np.nan),
    ],
    ids=["missing", "shorter", "of another type", "not finite"],
)
@pytest.mark.parametrize("name", ["center", f"left.{MODULES[0]}"])
def test_exchanged_bases_are_refused(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None]
) -> None:
    invariant_probe().save_pretrained(tmp_path)
    _damaged(name, change, tmp_path)
    with pytest.raises(ProbeFormatError, match=r"featurizer\.safetensors"):
        Probe.from_pretrained(tmp_path)


def test_a_folder_without_its_bases_is_refused(tmp_path: Path) -> None:
    invariant_probe().save_pretrained(tmp_path)
    (tmp_path / "featurizer.safetensors").unlink()
    with pytest.raises(ProbeFormatError, match=r"featurizer\.safetensors"):
        Probe.from_pretrained(tmp_path)
