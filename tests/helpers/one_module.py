"""An adapter of one module, and what the tests of reading adapters do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import load_adapter
from tests.helpers import make

Q = make.module()
A_KEY, B_KEY = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


def tiny() -> dict[str, Tensor]:
    """The tensors of one module."""
    return make.tensors(Adapter({Q: make.pair()}))


def read(source: Path, **arguments: Any) -> Adapter:
    """load_adapter, and then every module: shapes and types are checked when they are asked for."""
    return load_adapter(source, **arguments).load()


def assert_same(got: Adapter, expected: Adapter) -> None:
    assert list(got) == list(expected)
    for module, pair in expected.items():
        assert np.array_equal(got[module].A, pair.A)
        assert np.array_equal(got[module].B, pair.B)
        assert got[module].scaling == pair.scaling
