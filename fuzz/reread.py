"""Readers that share nothing with loraprobe's.

What an adapter's files say, in a few lines each, for files that loraprobe accepted.

They check nothing but that no key occurs twice: they answer what the values are if the file is to
    be believed at all.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np

Matrices = dict[tuple[str, str], np.ndarray]  # (module, "A" | "B") -> numbers

_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def safetensors(data: bytes) -> Matrices:
    """The matrices of a .safetensors file, half precision as float32."""
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in unambiguous(data[8:start]).items():
        if name == "__metadata__" or name.endswith("rotary_emb.inv_freq"):
            continue
        # Rust's library reads an entry that is a list field by field too.
        dtype, shape, (begin, end) = (
            (entry["dtype"], entry["shape"], entry["data_offsets"])
            if isinstance(entry, dict)
            else entry
        )
        body = data[start + begin : start + end]
        numbers = (
            (np.frombuffer(body, "<u2").astype("<u4") << 16).view("<f4")
            if dtype == "BF16"
            else np.frombuffer(body, _NUMPY[dtype])
        )
        found[_key(name)] = _wide(numbers.reshape(shape))
    return found


def scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r or alpha / sqrt(r) of a module, with PEFT's own regular expression for the
    patterns.
    """
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def unambiguous(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: a key occurs twice: another reader may take the other value.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]!a:.300}")
        return dict(pairs)

    found: dict[str, Any] = json.loads(data, object_pairs_hook=once)
    return found


def _key(name: str) -> tuple[str, str]:
    match = _NAME.fullmatch(name)
    assert match, name
    return match[1], match[2]


def _wide(numbers: np.ndarray) -> np.ndarray:
    return numbers if numbers.dtype == np.float64 else numbers.astype(np.float32)
