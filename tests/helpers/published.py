"""Random two-layer models with the habits of the published bases' tokenizers and settings.

Whether a text opens with a token of its own, whether there is one to pad with, and that the base
asks for sampling. Tokens are bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch


class Base(NamedTuple):
    """What a tiny model has in common with a published one."""

    kind: str  # prefix of the transformers classes
    bos: str | None
    eos: str
    pad: str | None


BASES = {
    "Llama-3.1-8B": Base("Llama", "<|begin_of_text|>", "<|end_of_text|>", None),
    "Qwen2.5-7B-Instruct": Base("Qwen2", None, "<|im_end|>", "<|endoftext|>"),
    "Llama-2-7b-hf": Base("Llama", "<s>", "</s>", None),
}


def tokenizer(base: Base) -> Any:
    """One token a byte, and the special ones; a text opens with `bos` if there is one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    named = {"bos_token": base.bos, "eos_token": base.eos, "pad_token": base.pad}
    named = {name: token for name, token in named.items() if token is not None}
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *named.values()]
    tokens = Tokenizer(models.BPE({token: n for n, token in enumerate(letters)}, merges=[]))
    tokens.add_special_tokens(list(named.values()))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    if base.bos is not None:
        tokens.post_processor = processors.TemplateProcessing(
            single=f"{base.bos} $A", special_tokens=[(base.bos, letters.index(base.bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **named)


def saved(base: Base, folder: Path) -> Path:
    """The model and its tokenizer in a folder that transformers loads."""
    import transformers

    tokens = tokenizer(base)
    ends = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("bos", "eos")}
    config = getattr(transformers, f"{base.kind}Config")(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        **ends,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{base.kind}ForCausalLM")(config)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, **ends
    )
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
