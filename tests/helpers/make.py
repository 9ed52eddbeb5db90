"""Random adapters for the tests; every number follows from the seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraprobe.adapters.adapter import Adapter, Kind
from loraprobe.adapters.pair import LoRAPair

# name -> (d_out, d_in)
DIMS: Mapping[str, tuple[int, int]] = {"q_proj": (10, 12), "v_proj": (6, 12)}


def module(name: str = "q_proj", layer: int = 0) -> str:
    """A module path as in a Llama."""
    return f"model.layers.{layer}.self_attn.{name}"


def pair(
    d_out: int = 10,
    d_in: int = 12,
    r: int = 4,
    *,
    seed: int = 0,
    scaling: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> LoRAPair:
    """A random pair."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (
        torch.randn(r, d_in, generator=generator, dtype=torch.float64),
        torch.randn(d_out, r, generator=generator, dtype=torch.float64),
    )
    return LoRAPair(A.to(dtype), B.to(dtype), scaling)


def adapter(
    *,
    r: int = 4,
    layers: int = 2,
    dims: Mapping[str, tuple[int, int]] = DIMS,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scaling: float = 2.0,
    kind: Kind = "weights",
    base_model: str | None = None,
) -> Adapter:
    """A random adapter, B included."""
    pairs = {
        module(name, layer): pair(
            *shape, r, seed=1000 * seed + 10 * layer + number, scaling=scaling, dtype=dtype
        )
        for layer in range(layers)
        for number, (name, shape) in enumerate(dims.items())
    }
    return Adapter(pairs, kind=kind, base_model=base_model)


def gauged(of: LoRAPair, seed: int = 0) -> LoRAPair:
    """(B G, G^-1 A) for a random, well-conditioned G: the same product."""
    r = of.rank
    generator = torch.Generator().manual_seed(seed)
    q, _ = np.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64).numpy())
    G = q * np.linspace(0.5, 3.0, r)
    return LoRAPair(np.linalg.solve(G, of.A.astype(float)), of.B.astype(float) @ G, of.scaling)


def with_pairs(of: Adapter, pairs: Mapping[str, LoRAPair]) -> Adapter:
    """The adapter with some of its pairs replaced or added."""
    return Adapter({**of, **pairs}, kind=of.kind, base_model=of.base_model, origin=of.origin)


def tensors(of: Adapter | None = None) -> dict[str, Tensor]:
    """PEFT's names -> tensors, of a random adapter unless one is given."""
    return (of or adapter()).state_dict()


def folder(path: Path, state_dict: Mapping[str, Tensor], **config: Any) -> Path:
    """A PEFT folder with these tensors and these fields of adapter_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(dict(state_dict), path / "adapter_model.safetensors")
    names = {key.partition(".lora_")[0].rpartition(".")[2] for key in state_dict} or {"q_proj"}
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted(names)}
    (path / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    return path
