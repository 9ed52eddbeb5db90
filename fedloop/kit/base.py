"""The base model of a kit: its number type, and what its modules are called."""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from torch import nn

from loraprobe.features import leaf_name

from ..errors import DataError
from .design import MODULE_SETS

_ATTENTION = re.compile(r"att(?:n|ention)", re.I)
_QUERY_VALUE = re.compile(
    r"(?:q|v|w[qv]|query|value|qkv|query_key_value|c_attn|wqkv)(?:_|\b)", re.I
)


def best_dtype() -> torch.dtype:
    """bfloat16 where this machine computes in it; on a processor, where that is the faster one."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return min((torch.bfloat16, torch.float32), key=_seconds)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of a few products of matrices."""
    left = torch.ones(256, 1024, dtype=dtype)
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        left @ left.T @ left
        taken.append(time.perf_counter() - began)
    return min(taken)


def module_sets(model: Any) -> dict[str, tuple[str, ...]]:
    """The model's own names for queries and values, all of attention, all linear modules.

    Where queries, keys and values are one module, it stands for "qv".

    Raises:
        DataError: no linear module in an attention, or none that a LoRA may be put on.
    """
    paths = [name for name, module in model.named_modules() if _is_linear(module, model)]
    attention = dict.fromkeys(
        leaf_name(path) for path in paths if _ATTENTION.search(path.rpartition(".")[0])
    )
    everything = dict.fromkeys(map(leaf_name, paths))
    if not attention:
        raise DataError(
            "got a base model without linear modules in an attention; expected a causal language"
            f" model of transformers. Its linear modules: {', '.join(everything) or 'none'}"
        )
    first = [name for name in attention if _QUERY_VALUE.match(name)]
    sets = (tuple(first or attention), tuple(attention), tuple(everything))
    return dict(zip(MODULE_SETS, sets, strict=True))


def _is_linear(module: Any, model: Any) -> bool:
    if module is model.get_output_embeddings():
        return False
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
