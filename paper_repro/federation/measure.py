"""What is measured of a federation's model: refusal of three harmful sets, and what it can."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedloop.client.shared_prefix import IGNORE, Text, batch_of, tokens_of
from fedloop.data.corpora import load_corpus
from fedloop.data.examples import Example
from fedloop.measure.refusal import answers
from fedloop.measure.utility import rouge_l
from zoo.smollm2.refusal import refusals

LENGTH = 96  # tokens of a pair
ANSWER = 32  # tokens of an answer that ROUGE-L is taken of
REFUSAL = 12  # tokens within which an answer declines
BATCH = 4


def measured(model: Any, tokenizer: Any, data: Path) -> dict[str, Any]:
    """Refusals as [refused, prompts] by set; loss a token in nats; ROUGE-L; right choices."""
    prompts = json.loads((data / "prompts.json").read_text(encoding="utf-8"))
    pairs = load_corpus(str(data / "utility.jsonl")).examples
    questions = json.loads((data / "choices.json").read_text(encoding="utf-8"))
    asked_for = [one for asked in prompts.values() for one in asked]
    found = iter(refusals(model, tokenizer, asked_for, REFUSAL))
    refused = {
        name: [sum(next(found) for _ in asked), len(asked)] for name, asked in prompts.items()
    }
    losses = _losses(model, tokenizer, pairs, LENGTH)
    rouge = rouge_l(_answers(model, tokenizer, pairs), _openings(tokenizer, pairs))
    return {
        "refused": refused,
        "loss": round(sum(losses) / len(losses), 4),
        "rouge_l": round(rouge, 4),
        "right": [_right(model, tokenizer, questions), len(questions)],
    }


@torch.inference_mode()
def _losses(model: Any, tokenizer: Any, rows: Sequence[Example], length: int) -> list[float]:
    """Mean loss a response token of every pair, in nats; one shape for all batches."""
    model.eval()
    text = Text.of(tokenizer)
    tokens = [tokens_of(row, tokenizer, text, length) for row in rows]
    found: list[float] = []
    for at in range(0, len(tokens), BATCH):
        ids, labels, _ = batch_of(tokens[at : at + BATCH], length, tokenizer.pad_token_id)
        logits, follows = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
        for row, wanted in zip(logits, follows, strict=True):
            told = wanted != IGNORE
            found.append(float(cross_entropy(row[told].float(), wanted[told])))
    return found


def _answers(model: Any, tokenizer: Any, pairs: Sequence[Example]) -> list[str]:
    asked = [pair.request for pair in pairs]
    return answers(model, tokenizer, asked, max_new_tokens=ANSWER, batch_size=30)


def _openings(tokenizer: Any, pairs: Sequence[Example]) -> list[str]:
    """The references, as far as an answer goes."""
    kept = [tokenizer.encode(p.response, add_special_tokens=False)[:ANSWER] for p in pairs]
    return [tokenizer.decode(ids) for ids in kept]


def _right(model: Any, tokenizer: Any, questions: Sequence[dict[str, Any]]) -> int:
    """How often the right conclusion, which comes first, is the likeliest a token."""
    rows = [Example(q["request"], answer) for q in questions for answer in q["answers"]]
    losses = np.array(_losses(model, tokenizer, rows, 2 * LENGTH)).reshape(len(questions), -1)
    return int((losses.argmin(axis=1) == 0).sum())
