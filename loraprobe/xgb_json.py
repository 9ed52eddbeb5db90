"""A strict reader of XGBoost's JSON model format, for models somebody else published.

XGBoost trusts its own files: a JSON model with edited indices or sizes kills the process (a
segmentation fault) instead of raising. So every field of a published model is checked here before a
byte of it reaches XGBoost, and anything the writer of XGBoost 3 does not put into a plain
binary-classification model (``gbtree``, numeric splits, one target) is refused, known dangerous or
not.

Checking the text is not enough on its own, because two JSON parsers may read one text differently
(duplicate keys, escapes, encodings). The caller therefore hands XGBoost ``json.dumps`` of the
returned document, never the bytes that came in.

Source: the layout was read from ``Booster.save_raw("json")`` of XGBoost 3.2.0; the trees are
described at https://xgboost.readthedocs.io/en/stable/tutorials/saving_model.html
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import ProbeFormatError

MAX_BYTES = 32 * 2**20
MAX_DEPTH = 64
"""Deepest tree accepted.

XGBoost walks some trees recursively, and no useful probe comes near this.
"""

_FLOAT32_MAX = (
    3.4028234663852886e38  # XGBoost stores float32: 1e300 is finite as read here and infinite there
)
_JSON_NUMBER = re.compile(
    r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
)  # float() also takes "1_0", " 1", ".5", "nan" and "infinity"
_WEIGHT_MIN = (
    1e-30  # XGBoost cannot read a negative scale_pos_weight or one that underflows float32
)
_SCORE_MARGIN = 1e-6  # nearer to 0 or 1 than float32 can tell, the logit of base_score is infinite
_NO_PARENT = 2**31 - 1  # what XGBoost writes as the parent of a root
_FLOAT_ARRAYS = ("base_weights", "loss_changes", "split_conditions", "sum_hessian")
_CATEGORY_ARRAYS = ("categories", "categories_nodes", "categories_segments", "categories_sizes")
_INT_ARRAYS = (
    "default_left",
    "left_children",
    "parents",
    "right_children",
    "split_indices",
    "split_type",
)


def validate_xgboost_json(
    data: bytes, num_features: int, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Check that ``data`` is a well-formed XGBoost 3 binary classifier over ``num_features``
    columns.

    Checked: exact key sets at every level; array lengths = ``num_nodes``; child, parent, split and
    ``tree_info`` entries in range; each tree one tree (acyclic, every node reached exactly once,
    parents agreeing with children, at most ``MAX_DEPTH`` deep); every number finite in float32;
    ``gbtree`` only; no categorical split; one target; ``binary:logistic``; ``num_feature``;
    ``base_score`` in (0, 1).

    Args:
        data: the bytes of a file written by ``Booster.save_raw("json")`` or by
            ``XGBoostHead.to_json``.
        num_features: the width the probe was trained on; a model of another width is refused.
        max_bytes: larger files are refused unread.

    Returns:
        The parsed document. Give ``json.dumps`` of it to XGBoost, not ``data``.

    Raises:
        ProbeFormatError: naming the JSON path at fault.
    """
    root = _object(_parse(data, max_bytes), "$", ("learner", "version"))
    version = _ints(root["version"], "$.version", 3, 0, 999)
    if version[0] != 3:
        _fail("$.version", _show(version), "a model written by XGBoost 3.x")
    path = "$.learner"
    names = (
        "attributes",
        "feature_names",
        "feature_types",
        "gradient_booster",
        "learner_model_param",
        "objective",
    )
    learner = _object(root["learner"], path, names)
    _object(learner["attributes"], f"{path}.attributes", ())
    _ints(learner["feature_names"], f"{path}.feature_names", 0, 0, 0)
    _ints(learner["feature_types"], f"{path}.feature_types", 0, 0, 0)
    _check_parameters(learner, path, num_features)
    booster = _object(learner["gradient_booster"], f"{path}.gradient_booster", ("model", "name"))
    _literal(booster["name"], f"{path}.gradient_booster.name", ("gbtree",))
    _check_model(booster["model"], f"{path}.gradient_booster.model", num_features)
    return root


def _parse(data: bytes, max_bytes: int) -> Any:
    if not isinstance(data, bytes):
        _fail("$", type(data).__name__, "bytes")
    if len(data) > max_bytes:
        _fail("$", f"{len(data)} bytes", f"at most {max_bytes} bytes")
    try:
        # Decoding here keeps json from guessing UTF-16 or UTF-32; XGBoost itself writes ASCII for
        # such a model.
        return json.loads(
            data.decode("ascii"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except RecursionError as error:
        raise ProbeFormatError(
            _message("$", "JSON nested too deeply to parse", "an XGBoost model")
        ) from error
    except ProbeFormatError:
        raise
    except (
        ValueError
    ) as error:  # UnicodeDecodeError, JSONDecodeError, and integers of more than 4,300 digits
        raise ProbeFormatError(
            _message("$", f"unreadable JSON ({error})", "an XGBoost model saved as JSON in ASCII")
        ) from error


def _refuse_constant(name: str) -> NoReturn:
    _fail("$", f"the constant {name}", "finite numbers only")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            _fail("$", f"the key {_show(key)} twice in one object", "each key once")
        found[key] = value
    return found


def _check_parameters(learner: dict[str, Any], path: str, num_features: int) -> None:
    """Objective and global parameters: one logistic output over ``num_features`` columns."""
    names = ("base_score", "boost_from_average", "num_class", "num_feature", "num_target")
    param = _object(learner["learner_model_param"], f"{path}.learner_model_param", names)
    path_param = f"{path}.learner_model_param"
    _literal(param["num_feature"], f"{path_param}.num_feature", (str(num_features),))
    _literal(param["num_class"], f"{path_param}.num_class", ("0",))
    _literal(param["num_target"], f"{path_param}.num_target", ("1",))
    _literal(param["boost_from_average"], f"{path_param}.boost_from_average", ("0", "1"))
    base_score = param["base_score"]
    if (
        isinstance(base_score, str) and base_score[:1] == "[" and base_score[-1:] == "]"
    ):  # "[5E-1]" since XGBoost 3.1, "5E-1" before
        base_score = base_score[1:-1]
    if not _SCORE_MARGIN <= _number(base_score, f"{path_param}.base_score") <= 1.0 - _SCORE_MARGIN:
        _fail(
            f"{path_param}.base_score",
            _show(base_score),
            f"one probability at least {_SCORE_MARGIN} away from 0 and 1",
        )
    objective = _object(learner["objective"], f"{path}.objective", ("name", "reg_loss_param"))
    _literal(objective["name"], f"{path}.objective.name", ("binary:logistic",))
    loss = _object(
        objective["reg_loss_param"], f"{path}.objective.reg_loss_param", ("scale_pos_weight",)
    )
    if (
        _number(loss["scale_pos_weight"], f"{path}.objective.reg_loss_param.scale_pos_weight")
        < _WEIGHT_MIN
    ):
        _fail(
            f"{path}.objective.reg_loss_param.scale_pos_weight",
            _show(loss["scale_pos_weight"]),
            f"at least {_WEIGHT_MIN}",
        )


def _check_model(value: Any, path: str, num_features: int) -> None:
    """The list of trees and the tables that index it."""
    names = ("gbtree_model_param", "iteration_indptr", "tree_info", "trees")
    model = _object(value, path, names, optional=("cats",))
    if "cats" in model:  # written since XGBoost 3.1, empty unless a column is categorical
        cats = _object(model["cats"], f"{path}.cats", ("enc", "feature_segments", "sorted_idx"))
        for name in cats:
            _ints(cats[name], f"{path}.cats.{name}", 0, 0, 0)
    trees = model["trees"]
    if not isinstance(trees, list) or not trees:
        _fail(f"{path}.trees", _show(trees), "a non-empty list of trees")
    param = _object(
        model["gbtree_model_param"],
        f"{path}.gbtree_model_param",
        ("num_parallel_tree", "num_trees"),
    )
    _literal(param["num_trees"], f"{path}.gbtree_model_param.num_trees", (str(len(trees)),))
    _literal(param["num_parallel_tree"], f"{path}.gbtree_model_param.num_parallel_tree", ("1",))
    _ints(model["tree_info"], f"{path}.tree_info", len(trees), 0, 0)
    indptr = _ints(
        model["iteration_indptr"], f"{path}.iteration_indptr", len(trees) + 1, 0, len(trees)
    )
    if indptr != list(range(len(trees) + 1)):
        _fail(
            f"{path}.iteration_indptr", _show(indptr), f"0, 1, ..., {len(trees)}: one tree a round"
        )
    for index, tree in enumerate(trees):
        _check_tree(tree, f"{path}.trees[{index}]", index, num_features)


def _check_tree(value: Any, path: str, index: int, num_features: int) -> None:
    """One tree: parameters, then the per-node arrays, each (num_nodes,), then its shape."""
    tree = _object(
        value, path, ("id", "tree_param", *_FLOAT_ARRAYS, *_CATEGORY_ARRAYS, *_INT_ARRAYS)
    )
    _ints([tree["id"]], f"{path}.id", 1, index, index)
    param = _object(
        tree["tree_param"],
        f"{path}.tree_param",
        ("num_deleted", "num_feature", "num_nodes", "size_leaf_vector"),
    )
    left = tree["left_children"]
    if not isinstance(left, list) or not left:
        _fail(f"{path}.left_children", _show(left), "a non-empty list of node numbers")
    n = len(left)
    _literal(param["num_nodes"], f"{path}.tree_param.num_nodes", (str(n),))
    _literal(param["num_feature"], f"{path}.tree_param.num_feature", (str(num_features),))
    _literal(param["num_deleted"], f"{path}.tree_param.num_deleted", ("0",))
    _literal(param["size_leaf_vector"], f"{path}.tree_param.size_leaf_vector", ("1",))
    for name in _FLOAT_ARRAYS:
        _floats(tree[name], f"{path}.{name}", n)
    for name in _CATEGORY_ARRAYS:
        _ints(tree[name], f"{path}.{name}", 0, 0, 0)
    _ints(left, f"{path}.left_children", n, -1, n - 1)
    right = _ints(tree["right_children"], f"{path}.right_children", n, -1, n - 1)
    parents = _ints(tree["parents"], f"{path}.parents", n, 0, _NO_PARENT)
    _ints(tree["split_indices"], f"{path}.split_indices", n, 0, num_features - 1)
    _ints(tree["split_type"], f"{path}.split_type", n, 0, 0)  # 1 would be a categorical split
    _ints(tree["default_left"], f"{path}.default_left", n, 0, 1)
    _check_shape(left, right, parents, path)


def _check_shape(
    left: Sequence[int], right: Sequence[int], parents: Sequence[int], path: str
) -> None:
    """The child links form one binary tree rooted at node 0, and the parent links are the same
    tree seen from below.
    """
    if parents[0] != _NO_PARENT:
        _fail(f"{path}.parents[0]", _show(parents[0]), f"{_NO_PARENT}, the mark of a root")
    reached = {0}
    level = [0]
    for _ in range(MAX_DEPTH + 1):
        below: list[int] = []
        for node in level:
            if left[node] == -1 and right[node] == -1:
                continue
            for name, child in (("left_children", left[node]), ("right_children", right[node])):
                if child == -1 or child in reached:
                    _fail(
                        f"{path}.{name}[{node}]",
                        _show(child),
                        "a node that nothing else points to, or -1 on both sides for a leaf",
                    )
                if parents[child] != node:
                    _fail(
                        f"{path}.parents[{child}]",
                        _show(parents[child]),
                        f"{node}, whose child it is",
                    )
                reached.add(child)
                below.append(child)
        level = below
    if level:
        _fail(
            f"{path}.left_children",
            f"a tree deeper than {MAX_DEPTH}",
            f"at most {MAX_DEPTH} levels of splits",
        )
    if len(reached) != len(left):
        _fail(
            f"{path}.left_children",
            f"{len(reached)} of {len(left)} nodes reachable from the root",
            "every node reachable",
        )


def _object(
    value: Any, path: str, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(path, _show(value), "an object")
    missing = sorted(set(required) - set(value))
    unknown = sorted(set(value) - set(required) - set(optional))
    if missing or unknown:
        _fail(
            path,
            f"missing keys {_show(missing)} and unknown keys {_show(unknown)}",
            f"the keys {sorted(required)}",
        )
    return value


def _literal(value: Any, path: str, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        _fail(path, _show(value), " or ".join(repr(text) for text in allowed))


def _number(value: Any, path: str) -> float:
    """A number that XGBoost writes as a string, such as "6.286234E-1", and reads back with a JSON
    parser.
    """
    if (
        not isinstance(value, str)
        or not _JSON_NUMBER.fullmatch(value)
        or not abs(float(value)) <= _FLOAT32_MAX
    ):
        _fail(path, _show(value), "one finite number as a string")
    return float(value)


def _ints(value: Any, path: str, length: int, low: int, high: int) -> list[int]:
    _check_length(value, path, length)
    for index, item in enumerate(value):
        if (
            type(item) is not int or not low <= item <= high
        ):  # bool is an int to isinstance, and not to XGBoost
            _fail(f"{path}[{index}]", _show(item), f"an integer in [{low}, {high}]")
    return value  # type: ignore[no-any-return]


def _floats(value: Any, path: str, length: int) -> None:
    _check_length(value, path, length)
    for index, item in enumerate(value):
        if type(item) is not float or not abs(item) <= _FLOAT32_MAX:
            _fail(
                f"{path}[{index}]",
                _show(item),
                "a number with a decimal point or exponent, finite in float32",
            )


def _check_length(value: Any, path: str, length: int) -> None:
    if not isinstance(value, list):
        _fail(path, _show(value), f"a list of length {length}")
    if len(value) != length:
        _fail(path, f"a list of length {len(value)}", f"length {length}")


def _show(value: Any) -> str:
    """A short, escaped form.

    What a stranger's file holds may be huge, or may be terminal control codes.
    """
    return reprlib.repr(value)


def _message(path: str, got: str, expected: str) -> str:
    return (
        f"XGBoost model, {path}: got {got}, expected {expected}. Download the probe again or fit it"
        " anew; do not load this file."
    )


def _fail(path: str, got: str, expected: str) -> NoReturn:
    raise ProbeFormatError(_message(path, got, expected))
