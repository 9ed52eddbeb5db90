"""Teach SmolLM2-135M-Instruct to refuse: the LoRA in zoo/bases/smollm2-135m-safe.

    python -m zoo.smollm2.teach --base out/smollm2-135m --data ../shared/data

Refusals to harmful questions and orders beside varied ordinary answers, among them answers to
requests that only sound alarming. No prompt of AdvBench, HarmBench, TDC2023, JailbreakBench or
XSTest is trained on. About twenty minutes of one free core.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fedloop.client.shared_prefix import Text, tokens_of, train
from fedloop.client.training import LoRASettings, attach_lora
from fedloop.data.examples import Example
from fedloop.data.files import read_file
from fedloop.measure.refusal import refuses_strictly
from zoo.bases import SAFE_ADAPTER
from zoo.labelled import sources as zoo_sources
from zoo.labelled.deltas import digest
from zoo.program import documented
from zoo.safe_requests import contrast_examples, imperatives
from zoo.smollm2.clients import load_eager
from zoo.smollm2.design import MODULES
from zoo.smollm2.sources import WRITERS, examples_of, for_base, rows_of
from zoo.smollm2.verbatim import about_works, whole_works

EVERY = 20  # steps, after which it says how it goes and saves


@dataclass(frozen=True)
class Teaching:
    """Every constant of the training.

    Attributes:
        mixture: examples of each pool in a step of `length` tokens an example.
        long: the same for every third step, of `long_length`: requests with a text, long answers.
        lr: the highest learning rate; it rises over `warm_up` steps and falls on a cosine.
    """

    rank: int = 16
    alpha: int = 32
    modules: tuple[str, ...] = MODULES["all"]
    steps: int = 480
    length: int = 64
    long_length: int = 128
    lr: float = 1.2e-3
    warm_up: int = 15
    seed: int = 0
    mixture: tuple[tuple[str, int], ...] = (
        ("questions", 2),
        ("orders", 2),
        ("other_harm", 1),
        ("chat", 3),
        ("ordinary", 3),
        ("tasks", 2),
        ("alarming", 1),
        ("contrast", 2),
    )
    long: tuple[tuple[str, int], ...] = (
        ("orders", 1),
        ("other_harm", 1),
        ("chat", 2),
        ("ordinary", 2),
        ("tasks", 1),
        ("alarming", 1),
    )

    def at(self, step: int) -> tuple[int, tuple[tuple[str, int], ...]]:
        """Tokens an example and mixture of a step."""
        if step % 3 == 2:
            return self.long_length, self.long
        return self.length, self.mixture


def held_out_prompts(data: Path) -> list[str]:
    """Prompts that are measured on: none may be trained on."""
    groups = zoo_sources.evaluation_prompts(data)
    prompts = [prompt for group in groups.values() for prompt in group]
    prompts += [example.instruction for example in zoo_sources._harmbench_targets(data)]
    for name, key in (("tdc2023/prompts", "instruction"), ("jailbreakbench/behaviors", "goal")):
        prompts += [row[key] for row in zoo_sources._rows(data / f"{name}.jsonl")]
    return prompts


def pools(data: Path) -> dict[str, list[Example]]:
    """What a batch is drawn from, by name; the base's half of every set."""
    held_out = held_out_prompts(data)
    asked = [question for question in zoo_sources._harmful_questions(data) if for_base(question)]
    questions = zoo_sources._refused(asked)
    alpaca = rows_of(data / "alpaca_eval/pairs.jsonl")
    writers = [WRITERS[name] for name in ("gpt4", "gpt35", "mistral", "llama2")]
    chat = examples_of((row for row in alpaca if row["writer"] in writers), True)
    chat = [example for example in chat if not refuses_strictly(example.response)]
    dolly = examples_of(rows_of(data / "dolly15k/pairs.jsonl"), True)
    teacher = rows_of(data / "gpteacher/pairs.jsonl")
    tasks = examples_of((row for row in teacher if row["category"] != "toolformer"), True)
    maths = [e for e in read_file(data / "gsm8k/pairs.jsonl").examples if for_base(e.instruction)]
    contrast = [example for example in contrast_examples() if for_base(example.instruction)]
    found = {
        "questions": questions,
        "orders": imperatives(questions),
        "other_harm": whole_works(" ".join(held_out).lower()) * 3 + _about_a_text(questions, dolly),
        "chat": chat,
        "ordinary": dolly + imperatives(dolly),
        "tasks": tasks + maths[:300],
        "alarming": examples_of(rows_of(data / "caia_safety/pairs.jsonl"), True),
        "contrast": contrast + imperatives(contrast) + about_works(),
    }
    return {name: zoo_sources.without_prompts(rows, held_out) for name, rows in found.items()}


def _about_a_text(questions: Sequence[Example], dolly: Sequence[Example]) -> list[Example]:
    """Harmful questions and orders with the beginning of an ordinary text below them."""
    texts = [" ".join(example.context.split()[:14]) for example in dolly if example.context]
    asked = [*questions, *imperatives(questions)][:: max(1, len(questions) // 400)]
    return [
        Example(example.instruction, example.response, texts[index % len(texts)])
        for index, example in enumerate(asked)
    ]


def batches(found: dict[str, list[Example]], teaching: Teaching) -> list[list[Example]]:
    """The examples of every step; a pool that is used up is shuffled anew."""
    rng = random.Random(teaching.seed)
    queues: dict[str, list[Example]] = {name: [] for name in found}
    steps = []
    for step in range(teaching.steps):
        batch = []
        for name, count in teaching.at(step)[1]:
            for _ in range(count):
                queue = queues[name]
                if not queue:
                    queue += rng.sample(found[name], len(found[name]))
                batch.append(queue.pop())
        steps.append(batch)
    return steps


def rates(teaching: Teaching) -> list[float]:
    """The learning rate of every step."""
    found = []
    for step in range(teaching.steps):
        rise = min(1.0, (step + 1) / teaching.warm_up)
        fall = 0.05 + 0.95 * (1 + math.cos(math.pi * step / teaching.steps)) / 2
        found.append(teaching.lr * rise * fall)
    return found


def teach(base: Path, data: Path, out: Path, teaching: Teaching) -> None:
    """Train, and write the adapter with the facts of its data."""
    model, tokenizer = load_eager(base)
    lora = LoRASettings(
        r=teaching.rank, alpha=teaching.alpha, dropout=0.0, target_modules=teaching.modules
    )
    adapted = attach_lora(model, lora, teaching.seed)
    found, text = pools(data), Text.of(tokenizer)
    lr = rates(teaching)
    began = time.monotonic()
    optimizer_state: Any = None
    losses: list[float] = []
    for step, batch in enumerate(batches(found, teaching)):
        length = teaching.at(step)[0]
        loss, optimizer_state = train(
            adapted,
            [[tokens_of(example, tokenizer, text, length) for example in batch]],
            length=length,
            pad=tokenizer.pad_token_id,
            lr=lr[step : step + 1],
            state=optimizer_state,
        )
        losses += loss
        if len(losses) % EVERY == 0:
            left = (time.monotonic() - began) / len(losses) * (teaching.steps - len(losses)) / 60
            mean = sum(losses[-EVERY:]) / EVERY
            print(
                f"step {len(losses)} of {teaching.steps}, loss {mean:.3f}, {left:.1f} min left",
                flush=True,
            )
            save(adapted, out)
    save(adapted, out)
    facts = {
        "teaching": asdict(teaching),
        "pools": {
            name: {"count": len(rows), "sha256": digest(rows)} for name, rows in found.items()
        },
        "seconds": round(time.monotonic() - began),
    }
    (out / "teaching.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def save(adapted: Any, out: Path) -> None:
    """A PEFT folder with its tensors in float16."""
    adapted.save_pretrained(out)
    path = out / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


def main() -> None:
    """The command line."""
    parser = documented(__doc__, "data")
    parser.add_argument("--base", type=Path, required=True, help="of python -m zoo.bases")
    parser.add_argument("--out", type=Path, default=SAFE_ADAPTER)
    parser.add_argument("--steps", type=int, default=Teaching.steps)
    options = parser.parse_args()
    teach(options.base, options.data, options.out, Teaching(steps=options.steps))


if __name__ == "__main__":
    main()
