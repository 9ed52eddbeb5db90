"""The answer loss against one example and one token at a time, ROUGE-L against its definition, and
both together.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch

from fedloop.data.examples import Example, encode
from fedloop.errors import FedloopError
from fedloop.measure.utility import answer_loss, rouge_l, utility
from loraprobe.errors import DataError, MissingExtra
from tests.helpers import tiny

EXAMPLES = [
    Example("name a colour.", "blue"),
    Example("count.", "1, 2, 3, 4, 5, 6, 7, 8 and so on"),
    Example("sum it up.", "a short text", context="a text that is not so short, for once"),
    Example("say hi", "hi"),
    Example("tell a story", "once upon a time there was a fox. " * 4),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(seed=3, std=0.5)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def slow_losses(model: Any, tokenizer: Any, example: Example, max_length: int) -> list[float]:
    """The definition: for each token of the response, minus the log of its probability after all
    that comes before.
    """
    tokens = encode(example, tokenizer, max_length)
    losses = []
    with torch.inference_mode():
        for position in range(tokens.response_start, len(tokens.ids)):
            logits = model(torch.tensor([tokens.ids[:position]])).logits[0, -1].double()
            losses.append(float(torch.logsumexp(logits, 0) - logits[tokens.ids[position]]))
    return losses


def test_the_loss_is_the_mean_over_response_tokens(model: Any, tokenizer: Any) -> None:
    losses = [slow_losses(model, tokenizer, example, 256) for example in EXAMPLES]
    flat = [loss for row in losses for loss in row]
    expected = sum(flat) / len(flat)
    model.train()  # where training left it
    for batch_size in (1, 2, 16):
        assert answer_loss(model, tokenizer, EXAMPLES, 256, batch_size) == pytest.approx(
            expected, abs=1e-5
        )
    assert not model.training
    by_example = sum(sum(row) / len(row) for row in losses) / len(losses)
    assert by_example != pytest.approx(expected, abs=1e-2)  # long responses count by their tokens
    assert answer_loss(model, tokenizer, EXAMPLES[:1]) == pytest.approx(
        sum(losses[0]) / len("blue$"), abs=1e-5
    )


def test_the_prompt_does_not_count(model: Any, tokenizer: Any) -> None:
    tokens = encode(EXAMPLES[0], tokenizer, 256)
    ids = torch.tensor([tokens.ids])
    whole = float(model(input_ids=ids, labels=ids).loss.detach())
    assert whole != pytest.approx(answer_loss(model, tokenizer, EXAMPLES[:1]), abs=1e-2)


def test_the_length_is_cut_as_in_training(model: Any, tokenizer: Any) -> None:
    cut = [loss for example in EXAMPLES for loss in slow_losses(model, tokenizer, example, 40)]
    assert answer_loss(model, tokenizer, EXAMPLES, max_length=40) == pytest.approx(
        sum(cut) / len(cut), abs=1e-5
    )
    assert answer_loss(model, tokenizer, EXAMPLES, max_length=40) != pytest.approx(
        answer_loss(model, tokenizer, EXAMPLES), abs=1e-3
    )


def test_no_examples_no_batches_and_a_broken_model_are_errors(tokenizer: Any) -> None:
    broken = tiny.llama()
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(FedloopError, match="loss of nan; expected a finite"):
        answer_loss(broken, tokenizer, EXAMPLES)
    with pytest.raises(DataError, match="got 0 examples"):
        answer_loss(tiny.llama(), tokenizer, [])
    with pytest.raises(DataError, match="batch_size 0"):
        answer_loss(tiny.llama(), tokenizer, EXAMPLES, batch_size=0)
    with pytest.raises(DataError, match="max_length 3"):
        answer_loss(tiny.llama(), tokenizer, EXAMPLES, max_length=3)


def subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by its recursion."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + subsequence(a[:-1], b[:-1])
    return max(subsequence(a[:-1], b), subsequence(a, b[:-1]))


PAIRS = [
    ("the cat sat on the mat", "the cat lay on a mat"),
    ("mat the on sat cat the", "the cat sat on the mat"),  # the same words in another order
    ("a fox", "once upon a time there was a fox"),
    ("nothing in common", "some other words"),
    ("", "words"),
    ("Same, WORDS!", "same words"),
    ("running cats", "run cat"),  # no stemming
]


def slow_rouge_l(prediction: str, reference: str) -> float:
    a, b = (
        text.lower().replace(",", " ").replace("!", " ").split() for text in (prediction, reference)
    )
    common = subsequence(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def test_rouge_l_is_twice_the_common_subsequence_over_both_lengths() -> None:
    scores = [slow_rouge_l(*pair) for pair in PAIRS]
    for (prediction, reference), score in zip(PAIRS, scores, strict=True):
        assert rouge_l([prediction], [reference]) == pytest.approx(score, abs=1e-12)
    assert scores[1] < 1 == scores[5]
    assert scores[3] == scores[4] == scores[6] == 0
    assert rouge_l([pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS]) == pytest.approx(
        sum(scores) / len(scores)
    )
    with pytest.raises(DataError, match="got 0 predictions and 0 references"):
        rouge_l([], [])
    with pytest.raises(DataError, match="got 2 predictions and 1 references"):
        rouge_l(["a", "b"], ["a"])


def test_utility_is_both_on_the_models_own_answers(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer(
        EXAMPLES[2].prompt,
        return_tensors="pt",
        add_special_tokens=False,
        return_token_type_ids=False,
    )
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    reply = tokenizer.decode(
        out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()
    assert len(reply) > 3
    with_context = Example(EXAMPLES[2].instruction, reply, EXAMPLES[2].context)
    found = utility(model, tokenizer, [with_context], max_new_tokens=24)
    assert found == {
        "loss": pytest.approx(answer_loss(model, tokenizer, [with_context])),
        "rouge_l": 1.0,
    }
    without = Example(EXAMPLES[2].instruction, reply)
    other = utility(model, tokenizer, [without], max_new_tokens=24)
    assert other["rouge_l"] < 1.0  # the context is part of the request
    both = utility(model, tokenizer, [without, with_context], max_new_tokens=24)
    assert both["rouge_l"] == pytest.approx((1.0 + other["rouge_l"]) / 2)


def test_without_rouge_score_the_pip_line_is_named_before_anything_is_generated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(
        MissingExtra, match=r"rouge_score, which is not installed: pip install 'loraprobe\[fed\]'"
    ):
        rouge_l(["a"], ["a"])
    with pytest.raises(MissingExtra):
        utility(None, None, EXAMPLES)
