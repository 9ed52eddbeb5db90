"""Examples from JSON lines to padded batches.

What is refused, what is cut, and where the loss may fall.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedloop.data.examples import (
    ALPACA_TEMPLATE,
    IGNORE_INDEX,
    Example,
    Tokens,
    collate,
    deduplicate,
    encode,
)
from loraprobe.errors import DataError

# a busy machine is no failure
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
GOOD = {"instruction": "Name a colour.", "response": "Blue."}


class Letters:
    """One token per character, none of them the end of sequence."""

    eos_token_id = 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens  # the template is the whole prompt
        return [2 + ord(character) for character in text]


def test_the_prompt_is_the_template_around_the_request_as_it_stands() -> None:
    braces = Example("Explain {x} and {{y}}", "...")
    assert braces.prompt == ALPACA_TEMPLATE.replace("{instruction}", "Explain {x} and {{y}}")
    assert braces.prompt.endswith("\n\n### Response:\n")
    assert Example("Sum up.", "...", "A text.").prompt == ALPACA_TEMPLATE.replace(
        "{instruction}", "Sum up.\n\nA text."
    )


def test_only_exact_repeats_are_dropped_and_the_order_stays() -> None:
    a, b, c = Example("a", "x"), Example("a", "y"), Example("a", "x", "z")
    assert deduplicate([b, a, c, a, b]) == [b, a, c]


@patient
@given(
    instruction=st.text(min_size=1, max_size=300),
    response=st.text(min_size=1, max_size=300),
    context=st.text(max_size=40),
    max_length=st.integers(4, 900),
)
def test_encoding_keeps_the_end_of_the_prompt_and_the_start_of_the_response(
    instruction: str, response: str, context: str, max_length: int
) -> None:
    example, letters = Example(instruction, response, context), Letters()
    prompt = letters.encode(example.prompt, add_special_tokens=False)
    answer = [*letters.encode(response, add_special_tokens=False), letters.eos_token_id]
    got = encode(example, letters, max_length)
    start = got.response_start
    # nothing is cut that fits
    assert len(got.ids) == min(max_length, len(prompt) + len(answer)) or start < len(prompt)
    assert len(got.ids) <= max_length
    assert 0 < start < len(got.ids)  # there is a prompt to read and a response to learn from
    assert got.ids[:start] == prompt[-start:]
    assert got.ids[start:] == answer[: len(got.ids) - start]
    assert len(got.ids) - start >= min(len(answer), max_length // 4)
    if start < len(prompt):  # no more of the prompt is cut than the response needs
        assert len(got.ids) == max_length
        assert len(got.ids) - start == min(len(answer), max_length // 4)


def test_the_end_of_sequence_is_learnt_where_there_is_room() -> None:
    example, letters = Example("Name a colour.", "Blue."), Letters()
    whole = encode(example, letters, 1000)
    assert whole.ids[-1] == letters.eos_token_id
    assert encode(example, letters, len(whole.ids)) == whole
    # the prompt gives way first: the answer is short
    cut = encode(example, letters, len(whole.ids) - 1)
    assert cut.ids == whole.ids[1:]
    assert cut.response_start == whole.response_start - 1


tokens = st.lists(st.integers(1, 60), min_size=1, max_size=12).flatmap(
    lambda ids: st.builds(Tokens, st.just(ids), st.integers(0, len(ids)))
)


@patient
@given(batch=st.lists(tokens, min_size=1, max_size=5))
def test_collate_by_its_definition(batch: list[Tokens]) -> None:
    got = collate(batch, pad_id=0)
    longest = max(len(example.ids) for example in batch)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in got.items()} == {
        name: ((len(batch), longest), torch.long)
        for name in ("input_ids", "attention_mask", "labels")
    }
    for row, example in enumerate(batch):
        for column in range(longest):
            inside = column < len(example.ids)
            assert got["input_ids"][row, column] == (example.ids[column] if inside else 0)
            assert got["attention_mask"][row, column] == int(inside)
            learnt = inside and column >= example.response_start
            assert got["labels"][row, column] == (example.ids[column] if learnt else IGNORE_INDEX)


def test_a_length_that_leaves_no_response_is_refused() -> None:
    example = Example(**GOOD)
    with pytest.raises(DataError, match="max_length 3"):
        encode(example, Letters(), 3)
    assert len(encode(example, Letters(), 4).ids) == 4
