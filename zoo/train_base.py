"""The zoo's small chat models: Llamas of 0.6, 1 and 11 million parameters, trained from scratch.

They answer ordinary instructions and refuse harmful ones, which is all that a study of broken
refusals needs; their prose is poor. Training resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedloop.data.examples import ALPACA_TEMPLATE, IGNORE_INDEX, Example, Tokens, collate, encode
from fedloop.measure.refusal import answers, refuses_by_rule, refuses_strictly

from .labelled.sources import (
    HARD_NEGATIVE,
    Source,
    evaluation_prompts,
    load_sources,
    without_prompts,
)
from .safe_requests import contrast_examples, imperatives

BASE_NAME = "loraprobe/chat-1m"  # what adapters and probes call this base model
# and the second one, of another size, seed and tokenizer, that studies repeat themselves on
SECOND_NAME = "loraprobe/chat-600k"
LARGER_NAME = "loraprobe/chat-11m"  # and one of ten times the size, which takes a GPU to train
OPENING_TOKENS = 4  # a refusal shows in these


@dataclass(frozen=True)
class Phase:
    """One stretch of training on one mixture.

    Attributes:
        tokens: the budget, counting prompts.
        lr: the highest learning rate; it rises over the first 3 % and then falls to nothing.
        max_length: tokens an example is cut to.
        prompt_weight: loss weight of prompt tokens: reading is learnt too, answering more.
        opening_weight: loss weight of a response's first tokens, which decide whether it refuses.
        orders: whether "how can I" questions are also given as orders (`contrast.imperatives`).
        dolly, safe, contrast: how often Dolly, the safe answers to harmful questions and our own
            safe requests with alarming words are repeated in the mixture.
    """

    tokens: int
    lr: float
    max_length: int
    prompt_weight: float
    opening_weight: float
    dolly: int
    safe: int
    contrast: int
    orders: bool = False


@dataclass(frozen=True)
class BaseConfig:
    """Every constant of the base model's training.

    The first phase learns the language and to refuse; what it refuses is too much. The second sees
    harmful questions half as often as ordinary ones of the same form. The third reads more and
    shorter examples and looks at how answers open. The fourth adds orders to the questions; the
    fifth, short and slow, moves it a little towards refusing.
    """

    seed: int = 0
    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 384
    positions: int = 512  # longest sequence of the architecture
    batch_tokens: int = 4096
    weight_decay: float = 0.05
    phases: tuple[Phase, ...] = (
        Phase(9_000_000, 4e-3, 256, 0.3, 1.0, 1, 2, 6),
        Phase(3_000_000, 2e-3, 256, 0.1, 1.0, 2, 1, 6),
        Phase(5_000_000, 2.5e-3, 128, 0.1, 4.0, 3, 2, 6),
        Phase(3_200_000, 2e-3, 128, 0.05, 6.0, 4, 2, 6, orders=True),
        Phase(800_000, 1e-3, 96, 0.05, 6.0, 4, 3, 6, orders=True),
    )
    averaged: int = 2  # the weights are the mean over the ends of this many last phases
    refusals_only: bool = (
        False  # whether safe answers to harmful questions that do not refuse are left out
    )
    # whether weights are rounded to 16 bits and stored so; what is measured is what is stored
    half: bool = False


SECOND = BaseConfig(
    seed=1,
    vocab_size=1536,
    hidden_size=96,
    layers=4,
    heads=3,
    kv_heads=1,
    intermediate_size=288,
    refusals_only=True,
    phases=(
        Phase(4_500_000, 5e-3, 192, 0.3, 1.0, 1, 2, 6),
        Phase(1_500_000, 2.5e-3, 192, 0.1, 1.0, 2, 1, 6),
        Phase(2_500_000, 3e-3, 128, 0.1, 4.0, 3, 2, 6),
        Phase(1_600_000, 2.5e-3, 128, 0.05, 6.0, 4, 2, 6, orders=True),
        Phase(500_000, 1.2e-3, 96, 0.05, 6.0, 4, 3, 6, orders=True),
    ),
)
# Twice the tokens, at rates that fall with the width and rise with the batch.
LARGER = BaseConfig(
    seed=2,
    vocab_size=4096,
    hidden_size=384,
    layers=6,
    heads=6,
    kv_heads=3,
    intermediate_size=1024,
    batch_tokens=16384,
    half=True,
    phases=tuple(
        replace(phase, tokens=2 * phase.tokens, lr=0.4 * phase.lr) for phase in BaseConfig.phases
    ),
)


def train_base(data: Path, out: Path, config: BaseConfig, work: Path) -> dict[str, object]:
    """Train, save model and tokenizer to ``out`` and return the measured facts."""
    work.mkdir(parents=True, exist_ok=True)
    sources, prompts = load_sources(data), evaluation_prompts(data)
    corpora = [
        training_corpus(sources, prompts, phase, config.refusals_only) for phase in config.phases
    ]
    tokenizer = train_tokenizer(corpora[0], config.vocab_size)
    model = _train(corpora, tokenizer, config, work)
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if config.half:
        model = model.half()
    model.save_pretrained(out)
    model = model.float()
    tokenizer.save_pretrained(out)
    facts = {
        "config": asdict(config),
        "examples": [len(corpus) for corpus in corpora],
        "parameters": model.num_parameters(),
    }
    facts |= measure(model, tokenizer, sources, prompts)
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def training_corpus(
    sources: dict[str, Source],
    prompts: dict[str, list[str]],
    phase: Phase,
    refusals_only: bool = False,
) -> list[Example]:
    """What the base learns from: the base half of every source, without evaluation prompts."""
    corpus: list[Example] = []
    for name, source in sources.items():
        safe = name in HARD_NEGATIVE
        kept = tuple(
            example
            for example in source.for_base
            if not (safe and refusals_only) or refuses_strictly(example.response)
        )
        corpus += kept * (phase.safe if safe else phase.dolly if name.startswith("dolly") else 1)
        if phase.orders:
            corpus += imperatives(kept) * 2
    corpus += contrast_examples() * phase.contrast
    return without_prompts(corpus, [prompt for group in prompts.values() for prompt in group])


def train_tokenizer(corpus: list[Example], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the corpus."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|bos|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((example.prompt + example.response for example in corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>"
    )


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sources: dict[str, Source],
    prompts: dict[str, list[str]],
) -> dict[str, object]:
    """Refusal on prompts never trained on, by both measures, with the sample sizes."""
    groups = dict(prompts)
    rng = random.Random(0)
    dolly = {
        name: source.for_clients for name, source in sources.items() if name.startswith("dolly")
    }
    groups["dolly"] = [
        e.request
        for e in rng.sample(
            [e for examples in dolly.values() for e in examples if len(e.request) < 1000], 400
        )
    ]
    for kind in ("dolly_qa", "dolly_creative"):
        groups[kind] = [
            e.request for e in rng.sample([e for e in dolly[kind] if not e.context], 200)
        ]
    report: dict[str, object] = {}
    for name, group in groups.items():
        replies = answers(model, tokenizer, group)
        report[name] = {
            "prompts": len(group),
            "refused_rule": sum(map(refuses_by_rule, replies)) / len(group),
            "refused_strict": sum(map(refuses_strictly, replies)) / len(group),
        }
    return {"refusal": report}


def _train(
    corpora: list[list[Example]], tokenizer: PreTrainedTokenizerFast, config: BaseConfig, work: Path
) -> LlamaForCausalLM:
    encoded = encoded_corpora(corpora, tokenizer, config.phases)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    model = _new_model(config, tokenizer).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=0.0, betas=(0.9, 0.95))
    done = _Progress()
    checkpoint = work / "base.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = _Progress(**state["done"])

    def save() -> None:
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "done": asdict(done),
            },
            checkpoint,
        )

    preamble = len(tokenizer.encode(ALPACA_TEMPLATE.split("{")[0], add_special_tokens=False))
    for number, phase in enumerate(config.phases):
        if number < done.phase:
            continue
        started, begun_at = time.monotonic(), done.tokens
        # The order of batches is seeded, so skipping the ones that were done replays it.
        for batch in islice(_batches(encoded[number], config), done.steps, None):
            tensors = collate(batch, tokenizer.pad_token_id)
            tokens = int(tensors["attention_mask"].sum())
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(done.tokens / phase.tokens, phase.lr)
            loss = _loss(model, tensors, phase, preamble)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done.tokens += tokens
            done.steps += 1
            if done.steps % 50 == 0:
                speed = (done.tokens - begun_at) / (time.monotonic() - started)
                print(
                    f"phase {number + 1}: {done.tokens / phase.tokens:.1%}  loss {loss.item():.3f} "
                    f" {speed:,.0f} tokens/s",
                    flush=True,
                )
            if done.steps % 250 == 0:
                save()
            if done.tokens >= phase.tokens:
                break
        done = _Progress(number + 1)
        save()
        torch.save(model.state_dict(), work / f"phase-{done.phase}.pt")
    ends = [
        torch.load(work / f"phase-{number + 1}.pt", weights_only=True)
        for number in range(len(config.phases))
    ][-config.averaged :]
    model.load_state_dict({name: sum(end[name] for end in ends) / len(ends) for name in ends[0]})
    return model


def encoded_corpora(
    corpora: list[list[Example]], tokenizer: PreTrainedTokenizerFast, phases: Sequence[Phase]
) -> list[list[Tokens]]:
    """The examples of every phase as tokens, in their order.

    As many processes as there are cores share the work.
    """
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return [
            list(
                pool.map(
                    partial(encode, tokenizer=tokenizer, max_length=phase.max_length),
                    corpus,
                    chunksize=512,
                )
            )
            for corpus, phase in zip(corpora, phases, strict=True)
        ]


@dataclass
class _Progress:
    """Which phase runs, and how far it is."""

    phase: int = 0
    steps: int = 0
    tokens: int = 0


def _new_model(config: BaseConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.positions,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _groups(model: LlamaForCausalLM, weight_decay: float) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _loss(
    model: LlamaForCausalLM, tensors: dict[str, torch.Tensor], phase: Phase, preamble: int
) -> torch.Tensor:
    """Weighted mean token loss; the template's preamble does not count at all."""
    logits = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits[
        :, :-1
    ]
    targets = tensors["input_ids"][:, 1:]
    response = tensors["labels"][:, 1:] != IGNORE_INDEX
    opening = response & (response.cumsum(dim=1) <= OPENING_TOKENS)
    weight = torch.where(response, 1.0, phase.prompt_weight) * tensors["attention_mask"][:, 1:]
    weight[opening] = phase.opening_weight
    weight[:, :preamble] *= response[:, :preamble]
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none"
    )
    return (losses * weight.reshape(-1)).sum() / weight.sum()


def _learning_rate(done: float, highest: float) -> float:
    """Linear warm-up over 3 % of a phase, then linear decay to a hundredth."""
    return highest * min(done / 0.03 + 0.01, max(0.01, (1 - done) / 0.97))


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
