"""What a defence may cost: how well a model still answers benign requests it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ..data.examples import IGNORE_INDEX, Example, collate, encode
from ..errors import DataError, FedloopError, MissingExtra
from .refusal import answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def answer_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int = 256,
    batch_size: int = 16,
) -> float:
    """Mean cross-entropy per token of the responses, in nats; prompts and padding do not count.

    Every response token counts alike, the end of sequence included, so the value does not depend on
    how examples are batched. Prompt and response become tokens as in training
    (`fedloop.data.examples.encode`). The model is left in evaluation mode.

    Raises:
        DataError: there is no example, or max_length or batch_size leaves nothing to measure.
        FedloopError: the loss is not finite: the model is broken, and no number would say how well
            it answers.
    """
    if not examples or batch_size < 1:
        raise DataError(
            f"got {len(examples)} examples and batch_size {batch_size}; expected at least one of"
            " each to measure a loss"
        )
    encoded = sorted(
        (encode(example, tokenizer, max_length) for example in examples),
        key=lambda tokens: len(tokens.ids),
    )
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.eval()  # type: ignore[no-untyped-call]
    total, count = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = {
            name: tensor.to(model.device)
            for name, tensor in collate(encoded[start : start + batch_size], pad_id).items()
        }
        labels = batch["labels"][
            :, 1:
        ]  # (n, longest - 1): the token that each position has to foretell
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
        loss = functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        total += float(loss)
        count += int((labels != IGNORE_INDEX).sum())
    if not math.isfinite(total):
        raise FedloopError(
            f"got an answer loss of {total}; expected a finite number. The model's weights or"
            " outputs are not finite."
        )
    return total / count


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure in [0, 1], without stemming.

    Twice the longest common subsequence over both lengths.

    Words are runs of a-z and 0-9 after lower-casing, so text in other scripts scores 0.

    Raises:
        MissingExtra: rouge_score is not installed.
        DataError: there is nothing to compare, or not one reference for each prediction.

    Source: Lin 2004 (ROUGE); the rouge_score package.
    """
    scorer = _rouge_scorer()
    if not predictions or len(predictions) != len(references):
        raise DataError(
            f"got {len(predictions)} predictions and {len(references)} references; expected as many"
            " of each, at least one"
        )
    scores = [
        scorer.score(reference, prediction)["rougeL"].fmeasure
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return float(sum(scores) / len(scores))


def utility(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 128,
    max_length: int = 256,
    batch_size: int = 16,
) -> dict[str, float]:
    """How well a model answers held-out benign examples.

    ``loss`` (`answer_loss`) and ``rouge_l`` of its greedy answers.

    Raises:
        MissingExtra, DataError, FedloopError: as `answer_loss` and `rouge_l` do.
    """
    _rouge_scorer()  # before the minutes that answers take
    loss = answer_loss(model, tokenizer, examples, max_length, batch_size)
    requests = [example.request for example in examples]
    replies = answers(
        model, tokenizer, requests, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return {"loss": loss, "rouge_l": rouge_l(replies, [example.response for example in examples])}


def _rouge_scorer() -> Any:
    try:
        from rouge_score import rouge_scorer  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra("rouge_score", "fed", "ROUGE-L") from error
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
