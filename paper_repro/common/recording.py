"""What programs share that record a federation's updates round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta
from loraprobe.adapters.layout import Layout, flattened, unpack


def averaged(start: Adapter, deltas: Sequence[torch.Tensor]) -> Adapter:
    """The global LoRA after the mean of packed factor deltas (d,)."""
    layout = replace(Layout.of(start), kind="factor_delta")
    mean = torch.stack(list(deltas)).mean(dim=0)
    return add_delta(start, unpack(mean, layout, base_model=start.base_model))


def read_b(delta: Adapter) -> np.ndarray:
    """B of all layers as it is, in the order of a featurizer: (p,)."""
    return flattened(delta, Layout.of(delta, factors=("B",)).slots)
