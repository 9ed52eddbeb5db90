"""Edits of an XGBoost model that keep it JSON: children, parents, splits, sizes.

And other models that are whole in themselves.

Unchecked, edits like these end in a segmentation fault inside XGBoost rather than in an error.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from .corpus import NO_PARENT, tree
from .mutate_bytes import Mutation
from .mutate_json import NUMBERS, Edit, on_text

Json = Any

_NODE_ARRAYS = (
    "base_weights",
    "loss_changes",
    "split_conditions",
    "sum_hessian",
    "default_left",
    "left_children",
    "parents",
    "right_children",
    "split_indices",
    "split_type",
)
_INTEGERS = (
    -(2**31),
    -2,
    -1,
    0,
    1,
    2,
    5,
    14,
    15,
    100,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**63,
    True,
    1.0,
    "1",
)
_FLOATS = (0.0, -0.0, 1e-45, 1e38, 3.4e38, -3.4e38, 1e39, 1e308, 0, None, "1")


def one_node(model: Json, trees: Json, rng: np.random.Generator) -> None:
    """One entry of one array of nodes replaced."""
    target = trees[rng.integers(len(trees))]
    name = _NODE_ARRAYS[rng.integers(len(_NODE_ARRAYS))]
    values = _FLOATS if name in _NODE_ARRAYS[:4] else (*_INTEGERS, *range(len(target[name])))
    target[name][rng.integers(len(target[name]))] = values[rng.integers(len(values))]


def links(model: Json, trees: Json, rng: np.random.Generator) -> None:
    """Children and parents changed together, so that each looks right to the other.

    Cycles, twins, orphans, chains.
    """
    target = trees[rng.integers(len(trees))]
    n = len(target["parents"])
    node, child = int(rng.integers(n)), int(rng.integers(n))
    target[("left_children", "right_children")[rng.integers(2)]][node] = child
    target["parents"][child] = node
    if rng.random() < 0.3:
        target["left_children"][node] = target["right_children"][node] = (child, -1)[
            rng.integers(2)
        ]
    if rng.random() < 0.2:
        target["parents"][0] = int(rng.integers(-1, n))


def sizes(model: Json, trees: Json, rng: np.random.Generator) -> None:
    """Arrays shorter or longer, alone or all of a tree, with or without the number that says how
    long they are.
    """
    target = trees[rng.integers(len(trees))]
    chosen = (
        _NODE_ARRAYS if rng.random() < 0.5 else (_NODE_ARRAYS[rng.integers(len(_NODE_ARRAYS))],)
    )
    step = int(rng.choice((-5, -1, 1, 3, 1000)))
    for name in chosen:
        target[name] = target[name][:step] if step < 0 else target[name] + target[name][-1:] * step
    if rng.random() < 0.5:
        target["tree_param"]["num_nodes"] = str(len(target["parents"]))


def parameters(model: Json, trees: Json, rng: np.random.Generator) -> None:
    """A parameter of the model or of a tree: counts, widths, objective, base score."""
    learner, booster = model["learner"], model["learner"]["gradient_booster"]["model"]
    holders = (
        trees[rng.integers(len(trees))]["tree_param"],
        learner["learner_model_param"],
        booster["gbtree_model_param"],
        learner["objective"],
        learner["objective"]["reg_loss_param"],
        learner["gradient_booster"],
    )
    holder = holders[rng.integers(len(holders))]
    names = [name for name, value in holder.items() if isinstance(value, str)]
    values = (
        "0",
        "1",
        "2",
        "-1",
        "7",
        "1000000",
        "2147483647",
        "4294967296",
        "",
        "nan",
        "1E400",
        "[5E-1]",
        "[9E-1]",
        "[0E0]",
        "[1E0]",
        "[5E-1,5E-1]",
        "5E-1",
        "3",
        "dart",
        "gblinear",
        "binary:logitraw",
        "multi:softprob",
        "reg:squarederror",
        "1E-40",
        "1E30",
        "[1E-7]",
        "[1E-6]",
    )
    holder[names[rng.integers(len(names))]] = values[rng.integers(len(values))]


def forest(model: Json, trees: Json, rng: np.random.Generator) -> None:
    """Trees left out, repeated or exchanged, with or without the tables that count them."""
    booster = model["learner"]["gradient_booster"]["model"]
    chosen = [dict(trees[at]) for at in rng.integers(0, len(trees), int(rng.integers(0, 12)))]
    booster["trees"] = chosen
    if rng.random() < 0.7:
        booster["trees"] = [{**one, "id": number} for number, one in enumerate(chosen)]
    if rng.random() < 0.7:
        booster["gbtree_model_param"]["num_trees"] = str(len(chosen))
        booster["tree_info"] = [0] * len(chosen)
        booster["iteration_indptr"] = list(range(len(chosen) + 1))
    if rng.random() < 0.3:
        table = booster[("tree_info", "iteration_indptr")[rng.integers(2)]]
        if table:
            table[rng.integers(len(table))] = _INTEGERS[rng.integers(len(_INTEGERS))]


def categories(model: Json, trees: Json, rng: np.random.Generator) -> None:
    """Tables of categorical splits, which this kind of model does not have."""
    target = trees[rng.integers(len(trees))]
    n = len(target["parents"])
    target["split_type"] = (
        [int(rng.integers(2)) for _ in range(n)] if rng.random() < 0.7 else target["split_type"]
    )
    target["categories_nodes"], target["categories_sizes"], target["categories_segments"] = (
        [0],
        [int(rng.choice((1, 2**31 - 1, 2**63)))],
        [0],
    )
    target["categories"] = [int(rng.choice((0, 1, 2**31 - 1, -1)))] * int(rng.integers(3))


def another(model: Json, trees: Json, rng: np.random.Generator) -> None:
    """Whole trees of other depths and leaves, some as large as float32 holds.

    Nothing is wrong with them but that they are another model.
    """
    width = int(model["learner"]["learner_model_param"]["num_feature"])
    at = int(rng.integers(len(trees)))
    trees[at] = tree(at, width, rng, depth=int(rng.integers(0, 7)))
    if rng.random() < 0.5:
        trees[at]["split_conditions"] = [
            float(rng.choice((3.4e38, -3.4e38, 1e-45, 0.0, 1e30))) for _ in trees[at]["parents"]
        ]


def chain(model: Json, trees: Json, rng: np.random.Generator) -> None:
    """A tree as deep as it has splits."""
    at, depth = int(rng.integers(len(trees))), int(rng.choice((1, 20, 63, 64, 65, 66, 300, 3000)))
    n = 2 * depth + 1
    target = trees[at]
    for name in _NODE_ARRAYS:
        target[name] = [0.5] * n if name in _NODE_ARRAYS[:4] else [0] * n
    target["left_children"] = [
        node + 1 if node % 2 == 0 and node < n - 1 else -1 for node in range(n)
    ]
    target["right_children"] = [
        node + 2 if node % 2 == 0 and node < n - 1 else -1 for node in range(n)
    ]
    target["parents"] = [NO_PARENT, *((node - 1) // 2 * 2 for node in range(1, n))]
    target["tree_param"]["num_nodes"] = str(n)


def numbers(model: Json, trees: Json, rng: np.random.Generator) -> None:
    """One array of nodes filled with one number."""
    target = trees[rng.integers(len(trees))]
    name = _NODE_ARRAYS[rng.integers(len(_NODE_ARRAYS))]
    target[name] = [NUMBERS[rng.integers(len(NUMBERS))]] * len(target[name])


EDITS = {
    "trees: node": one_node,
    "trees: links": links,
    "trees: sizes": sizes,
    "trees: parameters": parameters,
    "trees: forest": forest,
    "trees: categories": categories,
    "trees: another": another,
    "trees: chain": chain,
    "trees: numbers": numbers,
}


def _edited(edit: Any) -> Edit:
    def on_document(document: Json, rng: np.random.Generator) -> Json:
        with suppress(
            TypeError, LookupError, ValueError, AttributeError
        ):  # a second edit, of what the first one left
            edit(document, document["learner"]["gradient_booster"]["model"]["trees"], rng)
        return document

    return on_document


MUTATIONS: dict[str, Mutation] = {name: on_text(_edited(edit)) for name, edit in EDITS.items()}
