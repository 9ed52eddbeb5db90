"""Which clients of SmolLM2 are trained: `fedloop.kit.design` with its module names."""

from __future__ import annotations

from fedloop.kit.design import BATCH, Client, plan

__all__ = ["BASES", "BATCH", "MODULES", "Client", "plan"]

BASES = {  # what adapters and probes call the two base models
    "plain": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "safe": "loraprobe/smollm2-135m-safe",
}
MODULES = {
    "qv": ("q_proj", "v_proj"),
    "qkvo": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
