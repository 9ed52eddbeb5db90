"""The zoo's small chat model: a Llama of about a million parameters, trained from scratch.

It answers ordinary instructions and refuses harmful ones, which is all that a study of broken
refusals needs; its prose is poor. Training resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedloop.data import ALPACA_TEMPLATE, IGNORE_INDEX, Example, Tokens, collate, encode
from fedloop.evaluate import answers, refuses_by_rule, refuses_strictly

from .contrast import contrast_examples
from .sources import HARD_NEGATIVE, Source, evaluation_prompts, load_sources, without_prompts

BASE_NAME = "loraprobe/chat-1m"  # what adapters and probes call this base model


@dataclass(frozen=True)
class BaseConfig:
    """Every constant of the base model's training."""

    seed: int = 0
    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 384
    max_length: int = 256
    tokens: int = 9_000_000  # training budget, counting prompts
    batch_tokens: int = 4096
    lr: float = 4e-3
    weight_decay: float = 0.05
    warmup: float = 0.03  # share of the budget
    prompt_weight: float = 0.3  # loss weight of prompt tokens: reading is learnt too, answering more
    contrast_repeats: int = 6
    safe_repeats: int = 2


def train_base(data: Path, out: Path, config: BaseConfig, work: Path) -> dict[str, object]:
    """Train, save model and tokenizer to ``out`` and return the measured facts."""
    work.mkdir(parents=True, exist_ok=True)
    sources, prompts = load_sources(data), evaluation_prompts(data)
    corpus = training_corpus(sources, prompts, config)
    tokenizer = train_tokenizer(corpus, config.vocab_size)
    model = _train(corpus, tokenizer, config, work)
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {"config": asdict(config), "examples": len(corpus), "parameters": model.num_parameters()}
    facts |= measure(model, tokenizer, sources, prompts)
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def training_corpus(sources: dict[str, Source], prompts: dict[str, list[str]], config: BaseConfig) -> list[Example]:
    """What the base learns from: the base half of every source, without evaluation prompts."""
    corpus: list[Example] = []
    for name, source in sources.items():
        corpus += source.for_base * (config.safe_repeats if name in HARD_NEGATIVE else 1)
    corpus += contrast_examples() * config.contrast_repeats
    return without_prompts(corpus, [prompt for group in prompts.values() for prompt in group])


def train_tokenizer(corpus: list[Example], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the corpus."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|bos|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator((example.prompt + example.response for example in corpus), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>")


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sources: dict[str, Source], prompts: dict[str, list[str]]
) -> dict[str, object]:
    """Refusal on prompts never trained on, by both measures, with the sample sizes."""
    groups = dict(prompts)
    rng = random.Random(0)
    for kind in ("dolly_qa", "dolly_creative"):
        unseen = sorted({e.instruction for e in sources[kind].for_clients if not e.context})
        groups[kind] = rng.sample(unseen, 200)
    report: dict[str, object] = {}
    for name, group in groups.items():
        replies = answers(model, tokenizer, group)
        report[name] = {
            "prompts": len(group),
            "refused_rule": sum(map(refuses_by_rule, replies)) / len(group),
            "refused_strict": sum(map(refuses_strictly, replies)) / len(group),
        }
    return {"refusal": report}


def _train(corpus: list[Example], tokenizer: PreTrainedTokenizerFast, config: BaseConfig, work: Path) -> LlamaForCausalLM:
    torch.manual_seed(config.seed)
    model = _new_model(config, tokenizer)
    optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.95))
    encoded = [encode(example, tokenizer, config.max_length) for example in corpus]
    checkpoint = work / "base.pt"
    seen, step = 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        seen, step = state["seen"], state["step"]
    started, begun_at = time.monotonic(), seen
    preamble = len(tokenizer.encode(ALPACA_TEMPLATE.split("{")[0], add_special_tokens=False))
    for number, batch in enumerate(_batches(encoded, config)):
        if seen >= config.tokens:
            break
        if number < step:
            continue  # the order is seeded, so skipping replays it
        tensors = collate(batch, tokenizer.pad_token_id)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(seen, config)
        loss = _loss(model, tensors, config.prompt_weight, preamble)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += int(tensors["attention_mask"].sum())
        step = number + 1
        if step % 50 == 0:
            speed = (seen - begun_at) / (time.monotonic() - started)
            print(f"step {step}  {seen / 1e6:.2f} of {config.tokens / 1e6:.1f} M tokens  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)
        if step % 250 == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "seen": seen, "step": step}, checkpoint)
    return model


def _new_model(config: BaseConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=2 * config.max_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _groups(model: LlamaForCausalLM, weight_decay: float) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _loss(model: LlamaForCausalLM, tensors: dict[str, torch.Tensor], prompt_weight: float, preamble: int) -> torch.Tensor:
    """Mean token loss; prompt tokens count less, the template's preamble not at all."""
    logits = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits[:, :-1]
    targets = tensors["input_ids"][:, 1:]
    weight = tensors["attention_mask"][:, 1:].float()
    prompt = tensors["labels"][:, 1:] == IGNORE_INDEX
    weight = torch.where(prompt, weight * prompt_weight, weight)
    weight[:, :preamble] = 0.0
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return (losses * weight.reshape(-1)).sum() / weight.sum()


def _learning_rate(seen: int, config: BaseConfig) -> float:
    """Linear warm-up, then linear decay to a hundredth."""
    done = seen / config.tokens
    return config.lr * min(done / config.warmup + 0.01, max(0.01, (1 - done) / (1 - config.warmup)))


def _batches(encoded: list[Tokens], config: BaseConfig) -> Iterator[list[Tokens]]:
    """Endless seeded epochs of batches of similar length and about ``batch_tokens`` tokens."""
    rng = random.Random(config.seed)
    while True:
        order = list(range(len(encoded)))
        rng.shuffle(order)
        epoch = []
        for start in range(0, len(order), 2048):
            window = sorted(order[start : start + 2048], key=lambda index: len(encoded[index].ids))
            while window:
                longest = len(encoded[window[-1]].ids)
                size = max(1, config.batch_tokens // longest)
                epoch.append([encoded[index] for index in window[-size:]])
                del window[-size:]
        rng.shuffle(epoch)
        yield from epoch
