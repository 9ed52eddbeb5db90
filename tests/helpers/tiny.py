"""A random two-layer Llama and a tokenizer of single characters, for the tests of training and of
answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHARACTERS = "\n !#'(),-.0123456789:;?abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 64


def tokenizer() -> Any:
    """Lower-cased characters, one token each; <pad>, <end> and <unk> come first."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel(
            {text: number for number, text in enumerate(["<pad>", "<end>", "<unk>", *CHARACTERS])},
            unk_token="<unk>",
        )
    )
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def llama(seed: int = 0, std: float = 0.02) -> Any:
    """A Llama with random weights of this deviation, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=std,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def saved(folder: Path) -> Path:
    """The model and its tokenizer in a folder that transformers loads."""
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def greedy(model: Any, tokenizer: Any, ids: list[int], most: int) -> str:
    """The most probable token, one after the other, until the end of sequence."""
    start = len(ids)
    with torch.inference_mode():
        while len(ids) < start + most and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))
