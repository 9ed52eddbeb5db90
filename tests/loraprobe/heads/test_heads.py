"""Heads score what they were given and refuse the rest; fitters learn what is there alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from loraprobe.errors import FitError, LayoutMismatch, NonFiniteError, ProbeFormatError
from loraprobe.fit.data import held_out_mask
from loraprobe.fit.heads import HEAD_FITTERS, fit_head
from loraprobe.fit.options import HEAD_OPTIONS, LinearPaperOptions, head_options
from loraprobe.heads import HEADS, LinearHead, MLPHead

SEEDED = ("linear_paper", "mlp", "xgboost")  # the others take the seed and have no use for it
QUICK: dict[str, dict[str, Any]] = {
    "mlp": {"max_epochs": 40},
    "linear_paper": {"max_epochs": 30},
    "xgboost": {"n_estimators": 40},
}


def rows(n: int, p: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """L2-normalised rows (n, p) around one shared direction, the classes to either side of it,
    four rows to a group.
    """
    rng = np.random.default_rng(seed)
    shared, between = np.linalg.qr(np.random.default_rng(7).normal(size=(p, 2)))[0].T
    groups = np.arange(n) // 4
    y = groups % 2
    x = shared + 0.6 * np.outer(2 * y - 1, between) + 0.5 * rng.normal(size=(n, p)) / np.sqrt(p)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), y, groups


def fit(name: str, x: Any, y: Any, groups: Any, seed: int = 0, **options: Any) -> Any:
    if name == "xgboost":
        pytest.importorskip("xgboost")
    return fit_head(name, x, y, groups, seed=seed, options={**QUICK.get(name, {}), **options})


def an_mlp() -> MLPHead:
    rng = np.random.default_rng(0)
    shapes = [(5, 4), (3, 5), (1, 3)]
    weights = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return MLPHead(weights, tuple(rng.normal(size=n).astype(np.float32) for n, _ in shapes))


@pytest.mark.parametrize("name", HEAD_FITTERS)
def test_input_that_was_not_trained_on_is_refused(name: str) -> None:
    x, y, groups = rows(48, 20, 0)
    head = fit(name, x, y, groups)
    scores = head(x)
    assert scores.shape == (48,)
    assert scores.dtype == np.float64
    assert ((scores >= 0) & (scores <= 1)).all()
    assert head.num_features == 20
    assert head(x[:0]).shape == (0,)
    wrong: Any
    for wrong in (x[:, :19], np.hstack([x, x[:, :1]]), x[0], x[None], x.astype(str), x > 0):
        with pytest.raises(LayoutMismatch, match="expected"):
            head(wrong)
    for value in (np.nan, np.inf, -np.inf, 1e300):
        damaged: Any = x.astype(np.float64)
        damaged[3, 5] = value
        with pytest.raises(NonFiniteError, match="row 3"):
            head(damaged)


@pytest.mark.parametrize("name", HEAD_FITTERS)
def test_saved_and_loaded_heads_score_bit_for_bit_alike(name: str) -> None:
    x, y, groups = rows(48, 20, 0)
    head = fit(name, x, y, groups)
    saved = safetensors.numpy.save(head.arrays())
    loaded = HEADS[head.name].from_arrays(safetensors.numpy.load(saved), 20)
    assert safetensors.numpy.save(loaded.arrays()) == saved
    assert type(loaded) is HEADS[head.name]
    assert (loaded(x) == head(x)).all()
    assert not (fit(name, x[:40], y[:40], groups[:40], seed=1)(x) == head(x)).all()


def test_linear_head_is_the_formula_at_any_logit() -> None:
    head = LinearHead(coef=np.array([1.0, -2.0], np.float32), intercept=0.5)
    x = np.array([[0, 0], [1, 1], [1e30, 0], [-1e30, 0]], np.float32)
    assert head(x) == pytest.approx([1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(0.5)), 1.0, 0.0])


def test_mlp_head_is_the_torch_network() -> None:
    head = an_mlp()
    layers: list[torch.nn.Module] = []
    for weight, bias in zip(head.weights, head.biases, strict=True):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
        layers += [layer, torch.nn.ReLU()]
    x = np.random.default_rng(1).normal(size=(20, 4)).astype(np.float32)
    with torch.no_grad():
        expected = torch.sigmoid(torch.nn.Sequential(*layers[:-1])(torch.tensor(x)))[:, 0]
        without_relu = torch.sigmoid(torch.nn.Sequential(*layers[::2])(torch.tensor(x)))[:, 0]
    assert head(x) == pytest.approx(expected.numpy(), abs=1e-6)
    assert head(x) != pytest.approx(without_relu.numpy(), abs=1e-2)


def test_an_overflowing_network_is_an_error_and_not_a_score() -> None:
    big = np.full((2, 4), 1e30, np.float32)
    biases = (np.zeros(2, np.float32), np.zeros(1, np.float32))
    head = MLPHead(weights=(big, np.array([[1, -1]], np.float32)), biases=biases)
    assert head(np.full((1, 4), 1e-31, np.float32)) == pytest.approx([0.5])
    with pytest.raises(NonFiniteError, match="non-finite logits"):
        head(np.full((1, 4), 1e30, np.float32))


def replaced(name: str, array: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: arrays | {name: array}


ZEROS = np.zeros
Damage = dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]]
MLP_DAMAGE: Damage = {
    "empty": (lambda a: {}, "weight_0"),
    "gap": (lambda a: {k.replace("t_1", "t_7"): v for k, v in a.items()}, "weight_7"),
    "odd": (lambda a: {k: v for k, v in a.items() if k != "bias_2"}, "bias_2|weight_2"),
    "dtype": (replaced("weight_1", ZEROS((3, 5), np.float16)), "'weight_1'.*float16"),
    "width": (replaced("weight_0", ZEROS((5, 3), np.float32)), r"'weight_0'.*\(5, 3\).*\(5, 4\)"),
    "chain": (replaced("weight_1", ZEROS((3, 6), np.float32)), r"'weight_0'.*\(6, 4\)"),
    "two outputs": (replaced("weight_2", ZEROS((2, 3), np.float32)), "'weight_2'"),
    "bias": (replaced("bias_1", ZEROS(4, np.float32)), "'bias_1'"),
    "scalar": (replaced("weight_0", np.float32(0)), "'weight_0'"),
    "NaN": (replaced("bias_0", np.full(5, np.nan, np.float32)), "'bias_0'.*NaN"),
}


@pytest.mark.parametrize("case", MLP_DAMAGE)
def test_damaged_arrays_are_refused_by_name(case: str) -> None:
    """Those of a linear head are damaged in test_format_damage.py."""
    arrays = an_mlp().arrays()
    MLPHead.from_arrays(arrays, 4)  # the control: undamaged arrays load
    damage, message = MLP_DAMAGE[case]
    with pytest.raises(ProbeFormatError, match=message):
        MLPHead.from_arrays(damage(arrays), 4)


@pytest.mark.parametrize("p", [6, 150])
@pytest.mark.parametrize("name", HEAD_FITTERS)
def test_fitters_learn_separable_groups_and_not_permuted_labels(name: str, p: int) -> None:
    x, y, groups = rows(96, p, 0)
    fresh, truth, fresh_groups = rows(200, p, 1)
    assert roc_auc_score(truth, fit(name, x, y, groups)(fresh)) > 0.95
    # labels that cut across the classes have nothing to do with the features
    across = fit(name, x, groups // 2 % 2, groups)(fresh)
    assert 0.4 < roc_auc_score(fresh_groups // 2 % 2, across) < 0.6


@pytest.mark.parametrize("name", HEAD_FITTERS)
def test_fits_are_reproducible_and_leave_global_generators_alone(name: str) -> None:
    x, y, groups = rows(48, 20, 0)

    def states() -> list[Any]:
        return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]

    before = states()
    scores = fit(name, x, y, groups, seed=3)(x)
    assert before == states()
    torch.rand(1)  # a fitter that reads a global generator would now differ
    assert (fit(name, x, y, groups, seed=3)(x) == scores).all()
    assert (fit(name, x, y, groups, seed=4)(x) == scores).all() == (name not in SEEDED)


@pytest.mark.parametrize("p", [10, 200])
def test_linear_is_scikit_learns_solution_also_when_wide(p: int) -> None:
    x, y, groups = rows(60, p, 0)
    y = np.where(groups < 3, 0, y)  # unbalanced and not separable
    head = fit("linear", x, y, groups, seed=0)
    plain = LogisticRegression(C=100.0, class_weight="balanced", max_iter=5000, tol=1e-10)
    plain.fit(x.astype(np.float64), y)
    assert head.coef == pytest.approx(plain.coef_[0], abs=1e-4)
    assert head.intercept == pytest.approx(plain.intercept_[0], abs=1e-4)
    other = fit("linear", x, y, groups, C=50.0)
    assert other.coef != pytest.approx(plain.coef_[0], abs=1e-2)


def test_linear_paper_has_the_papers_constants_and_first_step() -> None:
    """Slow twin of the first epoch: AdamW's first step is -lr times the gradient's sign."""
    trained = {"lr": 0.01, "weight_decay": 2.0, "batch_size": 256, "max_epochs": 100}
    stopped = {"patience": 15, "min_delta": 1e-4, "clip": 0.5, "val_fraction": 0.1}
    assert vars(LinearPaperOptions()) == trained | stopped
    x, y, groups = rows(80, 6, 0)
    y[groups < 5] = 0
    fitted = ~held_out_mask(y, groups, 0.1, 0)
    weight = np.where(y == 1, (y[fitted] == 0).sum() / (y[fitted] == 1).sum(), 1.0)
    gradient = (weight * (0.5 - y))[fitted] @ x[fitted]
    first = fit("linear_paper", x, y, groups, max_epochs=1)
    assert first.coef == pytest.approx(-0.01 * np.sign(gradient), abs=1e-5)
    long, undecayed = (
        fit("linear_paper", x, y, groups, seed=0, max_epochs=100, weight_decay=decay)
        for decay in (2.0, 0.0)
    )
    # lr sign steps against a decay of 2 lr can never pass 1/2 ...
    assert np.abs(long.coef).max() < 0.5 + 1e-6
    assert np.abs(undecayed.coef).max() > 0.5  # ... and without the decay they do


def test_training_ends_at_the_epoch_with_the_lowest_held_out_loss() -> None:
    x, _, groups = rows(80, 40, 0)
    # nothing to learn: the loss falls by chance, then rises
    y = np.random.default_rng(1).permutation(20)[groups] % 2
    held = held_out_mask(y, groups, 0.1, 0)
    losses = []
    options = {"lr": 0.1, "weight_decay": 0.0, "min_delta": 0.0}
    for epochs in range(1, 13):  # the same seed: each run is the beginning of the next
        p = fit("linear_paper", x, y, groups, max_epochs=epochs, **options)(x[held])
        losses.append(float(-np.log(np.where(y[held] == 1, p, 1 - p)).mean()))
    assert (np.diff(losses) <= 1e-6).all()
    # neither the first epoch nor the last one was the best
    assert losses[0] > losses[-1] == losses[-2]


@pytest.mark.parametrize("p", [6, 150])
def test_mlp_folds_its_standardisation_into_the_first_layer(p: int) -> None:
    x, y, groups = rows(64, p, 0)
    scale = np.geomspace(1.0, 8.0, p, dtype=np.float32)
    moved = x * scale + 1.0
    heads = [fit("mlp", data, y, groups, seed=0, max_epochs=20) for data in (x, moved)]
    assert heads[0](x) == pytest.approx(heads[1](moved), abs=5e-3)
    assert heads[0](x) != pytest.approx(heads[1](x), abs=0.1)


def test_mlp_ignores_constant_columns_and_what_lies_outside_the_training_span() -> None:
    x, y, groups = rows(64, 150, 0)
    x[:, 7] = 0.25
    head = fit("mlp", x, y, groups, seed=0, max_epochs=20)
    assert (head.weights[0][:, 7] == 0).all()
    assert (head.weights[0][:, 8] != 0).any()
    with pytest.raises(FitError, match="all the same"):
        fit("mlp", np.tile(x[:1] + 3.3, (64, 1)), y, groups, seed=0)


def test_a_standardized_linear_fit_alone_does_not_depend_on_units() -> None:
    x, y, groups = rows(60, 8, 0)
    rescaled = x * np.array([1e3, 1, 1e-3, 1, 10, 1, 0.1, 1], np.float32) + 5
    plain, other = (
        fit("linear", data, y, groups, standardize=True, C=1.0)(data) for data in (x, rescaled)
    )
    np.testing.assert_allclose(other, plain, atol=1e-3)
    plain, other = (fit("linear", data, y, groups, seed=0, C=0.01)(data) for data in (x, rescaled))
    assert np.abs(other - plain).max() > 0.01


def test_xgboost_keeps_the_trees_up_to_the_best_round() -> None:
    pytest.importorskip("xgboost")
    x, y, groups = rows(96, 6, 0)
    noise = np.random.default_rng(0).permutation(24)[groups] % 2  # nothing to learn: stops early
    options = {"n_estimators": 300, "colsample": 0.5}
    learned, stopped = (len(fit("xgboost", x, one, groups, **options).roots) for one in (y, noise))
    assert 1 <= stopped < 50 < learned < 300


def test_cosine_ranks_by_the_cosine_to_the_mean_benign_direction() -> None:
    x, y, groups = rows(60, 30, 0)
    fresh = rows(60, 30, 1)[0]
    head = fit("cosine", x, y, groups, seed=0)
    mean = x[y == 0].mean(axis=0)
    cosine = fresh @ mean / np.linalg.norm(mean)
    assert (np.argsort(head(fresh)) == np.argsort(-cosine)).all()
    assert not (np.argsort(head(fresh)) == np.argsort(-(fresh @ x[y == 1].mean(axis=0)))).all()
    x[0] = 0.0  # an empty row is a row
    fit("cosine", x, y, groups, seed=0)
    with pytest.raises(FitError, match="L2 norms"):
        fit("cosine", 2 * x, y, groups, seed=0)
    with pytest.raises(FitError, match="mean of benign rows that is zero"):
        fit("cosine", x, y, np.where(y == 0, 0, groups), seed=0)


def test_cosine_is_calibrated_for_rows_that_are_not_in_the_mean() -> None:
    """Rows of pure noise, p >> n: benign rows that are not in the mean are far from it too."""
    x = np.random.default_rng(0).normal(size=(400, 2000))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    y = np.arange(100) % 2
    head = fit("cosine", x[:100], y, None, seed=0)
    assert abs(float(head(x[100:]).mean()) - 0.5) < 0.1
    cosine = x @ head.coef / np.linalg.norm(head.coef)
    # the cut that in-sample cosines would suggest
    cut = (cosine[:100][y == 0].mean() + cosine[:100][y == 1].mean()) / 2
    inside = np.abs(cosine[:100][y == 0]) > abs(cut)
    assert inside.mean() > 0.9 > 0.1 > (np.abs(cosine[100:]) > abs(cut)).mean()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=1, max_size=40),
    st.floats(0.05, 0.95),
    st.integers(0, 5),
)
def test_held_out_groups_stay_whole_and_both_sides_have_both_classes(
    labelled: list[tuple[int, int]], fraction: float, seed: int
) -> None:
    y, groups = np.array(labelled).T
    if min(len(set(groups[y == label])) for label in (0, 1)) < 2:
        with pytest.raises(FitError, match="at least 2 of each"):
            held_out_mask(y, groups, fraction, seed)
        return
    mask = held_out_mask(y, groups, fraction, seed)
    assert not set(groups[mask]) & set(groups[~mask])
    assert set(y[mask]) == set(y[~mask]) == {0, 1}
    assert (mask == held_out_mask(y, groups, fraction, seed)).all()


def test_held_out_share_and_seed() -> None:
    y, groups = np.arange(400) % 2, np.arange(400) // 2 % 100 * 2 + np.arange(400) % 2
    masks = [held_out_mask(y, groups, 0.2, seed) for seed in (0, 1)]
    for mask in masks:
        assert [int(mask[y == label].sum()) for label in (0, 1)] == [40, 40]
    assert (masks[0] != masks[1]).any()


@pytest.mark.parametrize("name", HEAD_FITTERS)
def test_data_that_cannot_be_fitted_is_refused(name: str) -> None:
    x, y, groups = rows(24, 6, 0)
    damaged = x.copy()
    damaged[2, 2] = np.nan
    cases: dict[str, list[tuple[Any, Any, Any]]] = {
        "one label a row|one a row": [
            (x, y[:-1], groups),
            (x, y, groups[:-1]),
            (x, y[:, None], groups),
        ],
        "both classes|only 0": [
            (x, one, groups) for one in (0 * y, y + 1, np.where(y == 1, "a", "b"))
        ],
        "NaN or infinity in 1 of 24 rows": [(damaged, y, groups)],
        "non-empty": [(x[0], y, groups), (x[:, :0], y, groups)],
        "dtype": [(x.astype(str), y, groups)],
        "hashable": [(x, y, [[i] for i in range(24)])],
    }
    for message, wrong in cases.items():
        for bad_x, bad_y, bad_groups in wrong:
            with pytest.raises(FitError, match=message):
                fit(name, bad_x, bad_y, bad_groups)
    if name in SEEDED:
        with pytest.raises(FitError, match="at least 2 of each"):
            fit(name, x, y, np.where(y == 1, 0, groups + 1))
    fit(name, x, y.astype(bool), [f"client {group}" for group in groups])  # the control


def test_unknown_heads_and_options_are_refused_with_the_valid_ones() -> None:
    assert set(HEAD_OPTIONS) == set(HEAD_FITTERS)
    x, y, groups = rows(24, 6, 0)
    assert fit("linear", x, y, groups, C=1.0).num_features == 6
    with pytest.raises(FitError, match=r"liner; expected one of linear, linear_paper, mlp"):
        fit_head("liner", x, y, groups)
    with pytest.raises(FitError, match=r"\['c'\].*\['C', 'max_iter', 'standardize'\]"):
        fit("linear", x, y, groups, c=1.0)
    with pytest.raises(FitError, match="expected none"):
        fit("cosine", x, y, groups, C=1.0)
    with pytest.raises(FitError, match="no convergence"):
        fit("linear", x, y, groups, max_iter=1)


@pytest.mark.parametrize(
    ("name", "option", "wrong"),
    [
        ("linear", "C", (0.0, "1", True)),
        ("linear", "max_iter", (10.0,)),
        ("linear", "standardize", (1,)),
        ("linear_paper", "lr", (float("nan"),)),
        ("linear_paper", "clip", (float("inf"),)),
        ("mlp", "dropout", (1.0,)),
        ("mlp", "hidden", ((0,), 8)),
        ("mlp", "val_fraction", (1.0,)),
        ("mlp", "max_epochs", (0,)),
        ("xgboost", "eta", (-1.0,)),
        ("xgboost", "subsample", (2.0,)),
        ("xgboost", "max_depth", ("3",)),
    ],
)
def test_an_option_of_a_wrong_type_or_range_is_refused_when_it_is_made(
    name: str, option: str, wrong: tuple[Any, ...]
) -> None:
    for value in wrong:
        with pytest.raises(FitError, match=r"got .*; expected"):
            head_options(name, {option: value})
    not_a_mapping: Any = [(option, wrong[0])]
    with pytest.raises(FitError, match=r"got .*; expected"):
        head_options(name, not_a_mapping)
