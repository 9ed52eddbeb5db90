"""Small adapters as other tools write them, with the product that each stands for.

    pip install mlx[cpu]==0.32.4 mlx-lm==0.32.2         # python make.py mlx-lm
    pip install torchtune==0.6.1 torchao==0.9.0        # python make.py torchtune
    pip install diffusers==0.42.1 peft==0.21.2                  # python make.py diffusers

Each goes to a folder beside this file, written by the tool's own code; product.safetensors in it
holds what is added to the weight of every adapted module, computed without loraprobe. Factors are
random: sizes are of no model.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
WIDTH, HEADS, RANK = 16, 2, 2


def mlx_lm() -> dict[str, np.ndarray]:
    """What `mlx_lm.lora` trains and saves (mlx_lm/tuner/trainer.py), of one Llama layer."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    mx.random.seed(0)
    parts = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "vocab_size": 8}
    arguments = ModelArgs(
        "llama", num_hidden_layers=1, num_attention_heads=HEADS, rms_norm_eps=1e-5, **parts
    )
    model = Model(arguments)
    model.freeze()
    options = {"rank": RANK, "dropout": 0.0, "scale": 20.0}
    linear_to_lora_layers(model, 1, options)
    factors = dict(tree_flatten(model.trainable_parameters()))
    trained = [(name, mx.random.normal(factor.shape)) for name, factor in factors.items()]
    model.load_weights(trained, strict=False)
    folder = HERE / "mlx-lm"
    folder.mkdir(exist_ok=True)
    save_config(
        {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": options, "model": "llama"},
        folder / "adapter_config.json",
    )
    adapters = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), adapters)
    products = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_a"):
            before = np.array(layer.linear.weight)
            products[name] = np.array(layer.fuse().weight) - before
    return products


def torchtune() -> dict[str, np.ndarray]:
    """What its checkpointer writes (training/checkpointing): PEFT's names, and its own."""
    import torch
    from safetensors.torch import save_file as save_torch
    from torchtune.models.convert_weights import (
        tune_to_hf,
        tune_to_peft_adapter_config,
        tune_to_peft_adapter_weights,
    )
    from torchtune.models.llama3 import lora_llama3
    from torchtune.modules.peft import (
        get_adapter_params,
        get_lora_module_names,
        get_merged_lora_ckpt,
    )

    torch.manual_seed(0)
    chosen: list[Any] = ["q_proj", "v_proj", "output_proj"]
    model = lora_llama3(
        chosen,
        apply_lora_to_mlp=True,
        vocab_size=8,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        embed_dim=WIDTH,
        max_seq_len=8,
        intermediate_dim=2 * WIDTH,
        lora_rank=RANK,
        lora_alpha=4,
    )
    own = get_adapter_params(model)
    for tensor in own.values():
        torch.nn.init.normal_(tensor)
    own = {name: tensor.detach().clone() for name, tensor in own.items()}
    folder = HERE / "torchtune"
    folder.mkdir(exist_ok=True)
    sizes = {"num_heads": HEADS, "num_kv_heads": HEADS, "dim": WIDTH}
    save_torch(
        tune_to_peft_adapter_weights(dict(own), **sizes), folder / "adapter_model.safetensors"
    )
    names = get_lora_module_names(chosen, apply_lora_to_mlp=True, apply_lora_to_output=False)
    stated = {
        "r": RANK,
        "lora_alpha": 4,
        "target_modules": names,
        "peft_type": "LORA",
    }  # its recipes'
    config = tune_to_peft_adapter_config(stated, "org/base")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (HERE / "torchtune-own").mkdir(exist_ok=True)
    save_torch(own, HERE / "torchtune-own" / "adapter_0.safetensors")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = {name: tensor.clone() for name, tensor in state.items() if "lora" not in name}
    after = tune_to_hf(get_merged_lora_ckpt(state, RANK, 4), **sizes)
    before = tune_to_hf(plain, **sizes)
    return {
        name.removesuffix(".weight"): (after[name] - before[name]).numpy()
        for name in before
        if not torch.equal(after[name], before[name])
    }


def diffusers() -> dict[str, np.ndarray]:
    """What its pipelines save (loaders/lora_pipeline.py) of a UNet, and the same as kohya's."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(4,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=4,
    )
    unet.add_adapter(LoraConfig(r=RANK, target_modules=["to_q"]))
    state = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(HERE / "diffusers", unet_lora_layers=state)
    (HERE / "kohya").mkdir(exist_ok=True)
    written = load_file(HERE / "diffusers" / "pytorch_lora_weights.safetensors")
    save_torch(convert_state_dict_to_kohya(written), HERE / "kohya" / "lora.safetensors")
    return {}


if __name__ == "__main__":
    tool = sys.argv[1]
    products = {"mlx-lm": mlx_lm, "torchtune": torchtune, "diffusers": diffusers}[tool]()
    folder = HERE / tool
    if products:
        save_file(products, folder / "product.safetensors", {"tool": f"{tool} {version(tool)}"})
    print(tool, version(tool), sorted(products))
