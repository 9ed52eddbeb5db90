"""The same base in other roundings, as a QLoRA user has it: 8 bits a row, and NF4 in blocks of 64.

The weights of every linear layer but the head are rounded and written back in the model's dtype, so
that training runs on a processor; what is simulated is the rounding, not the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The 16 levels of NF4, of arXiv:2305.14314, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def int8_rows(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to 255 levels a row, scaled to the row's largest absolute value (LLM.int8's grid)."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (weight.float() / scale).round() * scale


def nf4_blocks(weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Rounded to NF4's 16 levels in blocks of 64, scaled to the block's largest absolute value."""
    flat = weight.float().reshape(-1, block)
    scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-12)
    levels = torch.tensor(NF4)
    middle = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(flat / scale, middle)] * scale).reshape(weight.shape)


def _round(model: Any, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                module.weight.copy_(how(module.weight))


ROUNDINGS: dict[str, Callable[[Any], None]] = {
    "none": lambda model: None,
    "int8": lambda model: _round(model, int8_rows),
    "nf4": lambda model: _round(model, nf4_blocks),
}
