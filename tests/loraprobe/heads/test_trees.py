"""Trees as arrays: they score as XGBoost does without it, and nothing hostile becomes a head."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraprobe.errors import ProbeFormatError
from loraprobe.heads import MAX_DEPTH, XGBoostHead
from loraprobe.heads.trees import trees_from_xgboost
from loraprobe.limits import PROBE_TREES

WIDTH = 20


def trained(**options: Any) -> Any:
    """A booster of XGBoost itself, on noise that it can learn."""
    xgboost = pytest.importorskip("xgboost")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, WIDTH)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] ** 2 + 0.3 * rng.standard_normal(200) > 1).astype(int)
    settings = {"objective": "binary:logistic", "nthread": 1, "max_depth": 5, **options}
    return xgboost.train(settings, xgboost.DMatrix(x, label=y), 25)


def document(**options: Any) -> Any:
    return json.loads(bytes(trained(**options).save_raw("json")))


def read(value: Any) -> XGBoostHead:
    return trees_from_xgboost(json.dumps(value).encode(), WIDTH)


@pytest.mark.parametrize("options", [{}, {"base_score": 0.2, "scale_pos_weight": 3.0}])
def test_trees_score_as_xgboost_does(options: dict[str, Any]) -> None:
    booster = trained(**options)
    head = trees_from_xgboost(bytes(booster.save_raw("json")), WIDTH)
    rows = np.random.default_rng(1).standard_normal((500, WIDTH)).astype(np.float32)
    edges = head.value[head.left != -1]  # splits are < and not <=: numbers on the very edge
    rows[: len(edges), 0] = edges[:500]
    expected = booster.inplace_predict(rows)
    assert np.abs(head(rows) - expected).max() <= 1e-6
    assert head(rows).std() > 0.05
    assert np.abs(head(-rows) - expected).max() > 0.1  # negative control
    assert head(rows[:0]).shape == (0,)


def model(value: Any) -> Any:
    return value["learner"]["gradient_booster"]["model"]


def set_in_tree(name: str, node: int, number: Any) -> Callable[[Any], None]:
    def damage(value: Any) -> None:
        model(value)["trees"][1][name][node] = number

    return damage


def set_in_learner(path: str, given: Any) -> Callable[[Any], None]:
    def damage(value: Any) -> None:
        *parents, last = path.split(".")
        target = value["learner"]
        for parent in parents:
            target = target[parent]
        target[last] = given

    return damage


DAMAGE: dict[str, Callable[[Any], None]] = {
    "child beyond the tree": set_in_tree("left_children", 0, 10**6),
    "child of another tree": lambda value: set_in_tree(
        "right_children", 0, len(model(value)["trees"][1]["left_children"])
    )(value),
    "child that is its own parent": set_in_tree("left_children", 0, 0),
    "cycle": set_in_tree("left_children", 2, 1),
    "negative child": set_in_tree("left_children", 0, -2),
    "half a leaf": set_in_tree("left_children", 0, -1),
    "fractional child": set_in_tree("left_children", 0, 1.0),
    "boolean child": set_in_tree("left_children", 0, True),
    "column beyond the width": set_in_tree("split_indices", 0, WIDTH),
    "negative column": set_in_tree("split_indices", 0, -1),
    "split as text": set_in_tree("split_conditions", 0, "0.5"),
    "split beyond float32": set_in_tree("split_conditions", 0, 1e300),
    "split missing": lambda value: model(value)["trees"][1]["split_conditions"].pop(),
    "array missing": lambda value: model(value)["trees"][1].pop("left_children"),
    "categorical split": set_in_tree("split_type", 0, 1),
    "no trees": lambda value: model(value).update(trees=[], tree_info=[]),
    "trees of a second class": lambda value: model(value)["tree_info"].__setitem__(0, 1),
    "another width": set_in_learner("learner_model_param.num_feature", str(WIDTH + 1)),
    "another objective": set_in_learner("objective.name", "reg:squarederror"),
    "another booster": set_in_learner("gradient_booster.name", "dart"),
    "three classes": set_in_learner("learner_model_param.num_class", "3"),
    "certain base score": set_in_learner("learner_model_param.base_score", "[1E0]"),
    "base score NaN": set_in_learner("learner_model_param.base_score", "nan"),
    "base score a number": set_in_learner("learner_model_param.base_score", 0.5),
    "no learner": lambda value: value.pop("learner"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_hostile_model_is_refused(case: str) -> None:
    value = document()
    read(value)  # the control
    DAMAGE[case](value)
    with pytest.raises(ProbeFormatError, match="expected"):
        read(value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b" " * (PROBE_TREES + 1),
    ],
    ids=["empty", "list", "too large"],
)
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(ProbeFormatError, match="expected"):
        trees_from_xgboost(data, WIDTH)


def stump(**arrays: Any) -> dict[str, Any]:
    """One split and two leaves, with some of the arrays replaced."""
    plain = {
        "roots": np.array([0], np.int32),
        "feature": np.array([1, 0, 0], np.int32),
        "value": np.array([0.5, -1.0, 2.0], np.float32),
        "left": np.array([1, -1, -1], np.int32),
        "right": np.array([2, -1, -1], np.int32),
        "intercept": np.array([0.25], np.float32),
    }
    return {**plain, **arrays}


def test_a_stump_is_its_definition() -> None:
    head = XGBoostHead.from_arrays(stump(), 2)
    rows = np.array([[0, 0.49], [0, 0.5], [9, -9]], np.float32)
    logits = np.array([-0.75, 2.25, -0.75])
    assert head(rows) == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-12)


@pytest.mark.parametrize(
    "arrays",
    [
        {"roots": np.array([3], np.int32)},
        {"roots": np.array([-1], np.int32)},
        {"roots": np.zeros(0, np.int32)},
        {"feature": np.array([2, 0, 0], np.int32)},
        {"feature": np.array([-1, 0, 0], np.int32)},
        {"feature": np.array([1, 0], np.int32)},
        {"feature": np.array([1, 0, 0], np.int64)},
        {"value": np.array([np.nan, -1, 2], np.float32)},
        {"value": np.array([0.5, np.inf, 2], np.float32)},
        {"value": np.zeros(3)},
        {"left": np.array([0, -1, -1], np.int32)},
        {"left": np.array([3, -1, -1], np.int32)},
        {"left": np.array([1, 0, -1], np.int32)},
        {"left": np.array([-1, -1, -1], np.int32)},
        {"right": np.array([-1, -1, -1], np.int32)},
        {"right": np.array([2, 2, -1], np.int32)},
        {"intercept": np.array([np.inf], np.float32)},
        {"intercept": np.zeros(2, np.float32)},
        {"extra": np.zeros(1, np.float32)},
    ],
)
def test_arrays_that_are_no_trees_are_refused(arrays: dict[str, Any]) -> None:
    with pytest.raises(ProbeFormatError, match="expected"):
        XGBoostHead.from_arrays(stump(**arrays), 2)


def chain(depth: int) -> dict[str, Any]:
    """A tree whose left child is a split again, `depth` times."""
    inner = np.arange(depth, dtype=np.int32)
    leaves = np.full(depth + 1, -1, np.int32)
    return {
        "roots": np.array([0], np.int32),
        "feature": np.zeros(2 * depth + 1, np.int32),
        "value": np.zeros(2 * depth + 1, np.float32),
        "left": np.concatenate([inner + 1, leaves]),
        "right": np.concatenate([inner + depth + 1, leaves]).clip(max=2 * depth),
        "intercept": np.zeros(1, np.float32),
    }


def test_a_tree_too_deep_to_walk_is_refused() -> None:
    XGBoostHead.from_arrays(chain(MAX_DEPTH), 1)
    with pytest.raises(ProbeFormatError, match=f"more than {MAX_DEPTH} levels"):
        XGBoostHead.from_arrays(chain(MAX_DEPTH + 1), 1)


@given(
    left=st.lists(st.integers(-2, 6), min_size=5, max_size=5),
    right=st.lists(st.integers(-2, 6), min_size=5, max_size=5),
    roots=st.lists(st.integers(-1, 6), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_whatever_is_accepted_can_be_walked(
    left: list[int], right: list[int], roots: list[int]
) -> None:
    arrays = stump(
        roots=np.array(roots, np.int32),
        feature=np.zeros(5, np.int32),
        value=np.arange(5, dtype=np.float32),
        left=np.array(left, np.int32),
        right=np.array(right, np.int32),
    )
    try:
        head = XGBoostHead.from_arrays(arrays, 1)
    except ProbeFormatError:
        return
    assert np.isfinite(head(np.array([[-10.0], [10.0]], np.float32))).all()
