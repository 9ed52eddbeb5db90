"""Seconds of a training step of an 8B model of random weights, on a GPU."""

from __future__ import annotations

import gc
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch

from fedloop.client.training import (
    LocalTraining,
    LoRASettings,
    attach_lora,
    checkpoint_activations,
    load_base,
    local_steps,
    read_adapter,
    shadow_gradient,
)
from fedloop.data.examples import Example

from .common import ROOT, summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER = ROOT / "zoo/base"  # any will do: texts fill the length
BATCH = 16
WARM = 3  # steps before those that are counted
NO_GPU = "not measured: no GPU"


PRECISIONS = {"bfloat16": "none", "8 bits": "8bit"}  # of the weights -> fedloop's quantization


def training_seconds() -> dict[str, Any]:
    """Of the whole 8B model with random weights, in bfloat16 and in 8 bits as the settings have it:
    seconds of a local step and of a shadow gradient, and the most memory they take; if there is a
    GPU.
    """
    if not torch.cuda.is_available():
        return {"measured": False, "why": NO_GPU}
    found: dict[str, Any] = {
        "measured": True,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="overhead-8b-") as folder:
        model: Any = random_8b()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
        checkpoint_activations(model)  # as load_base does for a quantised one
        for name, quantization in PRECISIONS.items():
            if quantization != "none":
                model, _ = load_base(folder, dtype=torch.bfloat16, quantization=quantization)
            torch.cuda.reset_peak_memory_stats()
            found[name] = time_training(model, steps=20, batch=BATCH, length=256)
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
            print(f"{name}: {found[name]}", flush=True)
            del model
            gc.collect()
            torch.cuda.empty_cache()
    return found


def random_8b() -> PreTrainedModel:
    """A model of Llama-3.1-8B's shape with random weights, which time does not depend on, in
    bfloat16 (16 GB), on the GPU.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def time_training(model: Any, *, steps: int, batch: int, length: int) -> dict[str, Any]:
    """Seconds between local steps of the code that clients run, and of shadow gradients.

    Texts fill the whole length.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    examples = [
        Example(f"Please count to {number}.", f"{number} " * length) for number in range(batch)
    ]
    adapted = attach_lora(model, LoRASettings(), 0)
    start = read_adapter(adapted)
    training = LocalTraining(steps=WARM + steps, batch_size=batch, max_length=length)
    times, began = [], time.perf_counter()
    for _ in local_steps(adapted, tokenizer, examples, start, training, 0):  # type: ignore[arg-type]
        times.append(
            time.perf_counter() - began
        )  # a step ends with its adapter on the CPU, so nothing is still running
        began = time.perf_counter()
    gradients = []
    for _ in range(WARM + 5):
        began = time.perf_counter()
        shadow_gradient(adapted, tokenizer, examples[:8], start, training)  # type: ignore[arg-type]
        gradients.append(time.perf_counter() - began)
    return {
        "tokens_a_step": batch * length,
        "step_seconds": {**summary(times[WARM:], 12), "n": len(times) - WARM},
        "shadow_gradient_seconds": {**summary(gradients[WARM:], 12), "n": len(gradients) - WARM},
    }
