"""XGBoost's JSON of a binary classifier -> the arrays of `loraprobe.heads.XGBoostHead`.

XGBoost trusts its own files: one with edited indices kills the process. So it never sees them: the
JSON is parsed here, what could change a score is checked, and the arrays are checked by the head.

Source: `Booster.save_raw("json")` of XGBoost 3.2; the fields are described at
https://xgboost.readthedocs.io/en/stable/tutorials/saving_model.html
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..adapters.strict_json import read_json
from ..errors import ProbeFormatError, quoted
from ..limits import PROBE_TREES
from . import MAX_NODES, XGBoostHead

_MARGIN = 1e-6  # nearer to 0 or 1 than float32 can tell, the logit of base_score is infinite


def trees_from_xgboost(data: bytes, num_features: int) -> XGBoostHead:
    """The trees of a model saved by XGBoost 3.x as JSON.

    Args:
        data: what `Booster.save_raw("json")` gives, or the head.json of a probe of version 1 or 2.
        num_features: the width that the probe was trained on.

    Raises:
        ProbeFormatError: not such a model, of another width, or anything but numeric splits of one
            logistic output.
    """
    if len(data) > PROBE_TREES:
        raise _refused(f"{len(data)} bytes", f"at most {PROBE_TREES}")
    try:
        learner = read_json(data)["learner"]
        model = learner["gradient_booster"]["model"]
        parameters = learner["learner_model_param"]
        _expect("booster", learner["gradient_booster"]["name"], "gbtree")
        _expect("objective", learner["objective"]["name"], "binary:logistic")
        _expect("num_feature", parameters["num_feature"], str(num_features))
        _expect("num_class", parameters["num_class"], "0")
        _expect("num_target", parameters["num_target"], "1")
        trees = model["trees"]
        _expect("tree_info", model["tree_info"], [0] * len(trees))
        sizes = [len(tree["left_children"]) for tree in trees]
        if not sizes or sum(sizes) > MAX_NODES:
            raise _refused(f"{len(sizes)} trees of {sum(sizes)} nodes", f"1 to {MAX_NODES} nodes")
        starts = np.cumsum([0, *sizes[:-1]])
        nodes = [_nodes(tree, int(start)) for tree, start in zip(trees, starts, strict=True)]
        intercept = _logit(parameters["base_score"])
    except ProbeFormatError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _refused(quoted(f"{type(error).__name__}: {error}", 200), "XGBoost's JSON") from None
    feature, value, left, right = (np.concatenate(column) for column in zip(*nodes, strict=True))
    return XGBoostHead(
        starts.astype(np.int32), feature, value, left, right, intercept, num_features
    )


def _nodes(tree: dict[str, Any], start: int) -> tuple[np.ndarray, ...]:
    """feature, value, left and right of one tree whose first node gets the number `start`."""
    left, right, feature, kind = (
        _whole(name, tree[name])
        for name in ("left_children", "right_children", "split_indices", "split_type")
    )
    value = tree["split_conditions"]
    if not all(type(number) is float for number in value):
        raise _refused("a split that is no decimal number", "one a node")
    if kind.any() or tree["categories_nodes"]:
        raise _refused("a categorical split", "numeric ones")
    leaf = left == -1
    if (right[leaf] != -1).any() or not len({len(left), len(right), len(value), len(feature)}) == 1:
        raise _refused("arrays that do not belong together", "one entry a node in each")
    for child in (left, right):
        if (child < -1).any() or (child >= len(left)).any():
            raise _refused("a child outside of its tree", "one of its nodes")
    with np.errstate(over="ignore"):  # beyond float32 becomes inf, which the head refuses
        values = np.array(value, np.float32)
    return (
        np.where(leaf, 0, feature).astype(np.int32),
        values,
        *(np.where(leaf, -1, child + start).astype(np.int32) for child in (left, right)),
    )


def _whole(name: str, values: Any) -> np.ndarray:
    if not all(type(value) is int and -1 <= value < 2**31 for value in values):
        raise _refused(f"{name} with something else than node numbers", "whole numbers")
    return np.array(values, np.int64)


def _logit(base_score: str) -> float:
    """The logit of "5E-1", or "[5E-1]" since XGBoost 3.1."""
    score = float(base_score.removeprefix("[").removesuffix("]"))
    if not _MARGIN <= score <= 1 - _MARGIN:
        raise _refused(f"base_score {quoted(base_score)}", "a probability away from 0 and 1")
    return -math.log(1.0 / score - 1.0)


def _expect(name: str, got: object, expected: object) -> None:
    if got != expected:
        raise _refused(f"{name} {quoted(got)}", quoted(expected))


def _refused(got: str, expected: str) -> ProbeFormatError:
    return ProbeFormatError(
        f"XGBoost model: got {got}; expected {expected}. Download the probe again or fit it anew"
    )
