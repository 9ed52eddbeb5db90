"""The undamaged files that the cases start from.

Small, and the same bytes on every machine and with every version of the libraries.

Trees are made here and not by XGBoost, arrays by NumPy's PCG64, so that a case is what (target,
seed, number) says. A test checks that XGBoost reads these trees as it reads its own.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from loraprobe.adapters.layout import Layout, Slot
from loraprobe.calibration import Calibration
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.heads import Head, LinearHead, MLPHead
from loraprobe.heads.trees import trees_from_xgboost
from loraprobe.hub.format import config_digest
from loraprobe.probe import Probe

Files = dict[str, bytes]  # name -> content, of one folder

BASE = "org/base"
RANK, LAYERS, DIMS = 2, 2, {"q_proj": (6, 5), "v_proj": (3, 5)}  # name -> (d_out, d_in)
MODULES = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in range(LAYERS)
    for name, shape in DIMS.items()
}
NO_PARENT = 2**31 - 1


@cache
def probes() -> tuple[Files, ...]:
    """Saved probes: every kind of head, both calibrations, four recipes, trees of version 2 too."""
    isotonic = Calibration("isotonic", (0.125, 0.5, 0.75), (0.0, 0.25, 1.0), "adapter", 40, 8)
    platt = Calibration("platt", (1.5,), (-0.25,), "step", 40, 8)
    facts = {
        "metrics": [{"metric": "auroc", "value": 0.9, "n": 40}],
        "data": [{"name": "Ärger", "role": "train"}],
        "licence": "apache-2.0",
    }
    made = [
        Probe(featurizer, head(featurizer.num_features), 0.75, low, calibration, base, facts)
        for featurizer, head, low, calibration, base in (
            (_featurizer(FeatureRecipe.paper()), linear_head, 0.5, isotonic, BASE),
            (_featurizer(FeatureRecipe.all_b()), mlp_head, None, platt, BASE),
            (_featurizer(FeatureRecipe.paper()), xgboost_head, 0.25, None, None),
            (_featurizer(FeatureRecipe.spectral()), linear_head, None, platt, BASE),
            (_featurizer(FeatureRecipe.norm_only()), xgboost_head, None, isotonic, BASE),
        )
    ]
    old = [_of_version_2(probe) for probe in made if probe.head.name == "xgboost"]
    return (*map(_saved, made), *old)


def _saved(probe: Probe) -> Files:
    with tempfile.TemporaryDirectory() as name:
        probe.save_pretrained(name)
        return {
            path.name: path.read_bytes()
            for path in sorted(Path(name).iterdir())
            if path.name != "README.md"
        }


def _of_version_2(probe: Probe) -> Files:
    """The folder of a probe of trees as version 2 had it: XGBoost's JSON in head.json."""
    files = _saved(probe)
    trees = json.dumps(model(probe.head.num_features, trees=5)).encode()
    config = json.loads(files["config.json"])
    config["format_version"] = 2
    config["head"] |= {
        "file": "head.json",
        "bytes": len(trees),
        "sha256": hashlib.sha256(trees).hexdigest(),
    }
    config["digest"] = config_digest(config)
    rest = {name: data for name, data in files.items() if name != "head.safetensors"}
    return {**rest, "config.json": json.dumps(config, indent=2).encode(), "head.json": trees}


def _featurizer(recipe: FeatureRecipe) -> Featurizer:
    chosen = [module for module in MODULES if recipe.layers == "all" or ".0." in module]
    slots = tuple(
        Slot(module, factor, shape_of(module, factor))
        for module in chosen
        for factor in recipe.factors
    )
    return Featurizer(
        recipe, Layout(slots, dict.fromkeys(chosen, 2.0), "factor_delta"), frozenset(MODULES)
    )


def shape_of(module: str, factor: str) -> tuple[int, int]:
    """Of A (r, d_in) or B (d_out, r)."""
    d_out, d_in = MODULES[module]
    return (RANK, d_in) if factor == "A" else (d_out, RANK)


def linear_head(width: int) -> Head:
    """A linear head with random weights."""
    return LinearHead(np.random.default_rng(1).standard_normal(width).astype(np.float32), 0.25)


def mlp_head(width: int) -> Head:
    """A perceptron with one hidden layer of four."""
    rng = np.random.default_rng(2)
    weights, biases = (
        (rng.standard_normal((4, width)), rng.standard_normal((1, 4))),
        (rng.standard_normal(4), rng.standard_normal(1)),
    )
    return MLPHead(
        tuple(w.astype(np.float32) for w in weights), tuple(b.astype(np.float32) for b in biases)
    )


def xgboost_head(width: int) -> Head:
    """Five random trees."""
    return trees_from_xgboost(json.dumps(model(width, trees=5)).encode(), width)


def model(width: int, trees: int, seed: int = 3) -> dict[str, Any]:
    """A document as XGBoost 3.2 writes it, of random trees over `width` columns."""
    rng = np.random.default_rng(seed)
    return {
        "learner": {
            "attributes": {},
            "feature_names": [],
            "feature_types": [],
            "gradient_booster": {
                "model": {
                    "cats": {"enc": [], "feature_segments": [], "sorted_idx": []},
                    "gbtree_model_param": {"num_parallel_tree": "1", "num_trees": str(trees)},
                    "iteration_indptr": list(range(trees + 1)),
                    "tree_info": [0] * trees,
                    "trees": [tree(index, width, rng) for index in range(trees)],
                },
                "name": "gbtree",
            },
            "learner_model_param": {
                "base_score": "[5E-1]",
                "boost_from_average": "1",
                "num_class": "0",
                "num_feature": str(width),
                "num_target": "1",
            },
            "objective": {"name": "binary:logistic", "reg_loss_param": {"scale_pos_weight": "1"}},
        },
        "version": [3, 2, 0],
    }


def tree(index: int, width: int, rng: np.random.Generator) -> dict[str, Any]:
    """One random tree of depth 3 at most, its nodes numbered level by level."""
    left, right, parents, level = [-1], [-1], [NO_PARENT], [0]
    for step in range(3):
        below = []
        for node in level:
            if step == 0 or rng.random() < 0.6:
                left[node], right[node] = len(left), len(left) + 1
                left, right, parents = left + [-1, -1], right + [-1, -1], parents + [node, node]
                below += [left[node], right[node]]
        level = below
    n = len(left)
    # The shortest decimals that float32 reads back, as XGBoost writes them.
    arrays = ("base_weights", "loss_changes", "split_conditions", "sum_hessian")
    floats = {
        name: [float(str(number)) for number in rng.normal(size=n).astype(np.float32)]
        for name in arrays
    }
    return {
        **floats,
        "categories": [],
        "categories_nodes": [],
        "categories_segments": [],
        "categories_sizes": [],
        "default_left": [0] * n,
        "id": index,
        "left_children": left,
        "parents": parents,
        "right_children": right,
        "split_indices": rng.integers(0, width, n).tolist(),
        "split_type": [0] * n,
        "tree_param": {
            "num_deleted": "0",
            "num_feature": str(width),
            "num_nodes": str(n),
            "size_leaf_vector": "1",
        },
    }


def tensors(dtype: torch.dtype = torch.float32, seed: int = 4) -> dict[str, torch.Tensor]:
    """PEFT's names -> random factors of the modules."""
    rng = np.random.default_rng(seed)
    names = {
        f"base_model.model.{module}.lora_{factor}.weight": shape_of(module, factor)
        for module in MODULES
        for factor in "AB"
    }
    return {
        name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)
        for name, shape in names.items()
    }


CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 4,
        "base_model_name_or_path": BASE,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "use_rslora": False,
        "lora_dropout": 0.05,
        "inference_mode": True,
    },
    {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 4.0,
        "base_model_name_or_path": BASE,
        "target_modules": r".*\.self_attn\.(q|v)_proj",
        "use_rslora": True,
        "fan_in_fan_out": True,
        "rank_pattern": {
            "q_proj": RANK,
            "^model.layers.1.self_attn.v_proj": RANK,
            "layers.0.self_attn.v_proj": RANK,
        },
        "alpha_pattern": {"v_proj": 6},
    },
)


@cache
def adapters() -> tuple[Files, ...]:
    """PEFT folders with .safetensors of three types, one with metadata."""
    return tuple(
        {
            "adapter_model.safetensors": safetensors.torch.save(tensors(dtype), metadata),
            "adapter_config.json": json.dumps(config, indent=2).encode(),
        }
        for dtype, metadata, config in (
            (torch.float32, None, CONFIGS[0]),
            (torch.bfloat16, {"format": "pt"}, CONFIGS[1]),
            (torch.float16, {"format": "pt"}, CONFIGS[0]),
        )
    )
