"""Examples from JSON lines to padded batches.

What is refused, what is cut, and where the loss may fall.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    read_jsonl,
)
from loraprobe.errors import DataError

patient = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # a busy machine is no failure
GOOD = {"instruction": "Name a colour.", "response": "Blue."}


class Letters:
    """One token per character, none of them the end of sequence."""

    eos_token_id = 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens  # the template is the whole prompt
        return [2 + ord(character) for character in text]


def lines(path: Path, *rows: Any, end: str = "\n") -> Path:
    """A file with one row a line; text stays as it is, everything else becomes JSON."""
    path.write_text(
        end.join(
            row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows
        ),
        encoding="utf-8",
        newline="",
    )
    return path


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    separators = "one\u2028two\u2029three\u0085four\x1efive"
    got = read_jsonl(lines(tmp_path / "d.jsonl", {**GOOD, "response": separators}, GOOD))
    assert [example.response for example in got] == [separators, "Blue."]
    assert (
        len((tmp_path / "d.jsonl").read_text(encoding="utf-8").splitlines()) > 2
    )  # what splitlines would have made of it


def test_blank_lines_carriage_returns_and_context(tmp_path: Path) -> None:
    rows = (
        {**GOOD, "context": None},
        "",
        "  ",
        {**GOOD, "context": "A rainbow.", "category": "unused"},
        "",
    )
    expected = [
        Example("Name a colour.", "Blue."),
        Example("Name a colour.", "Blue.", "A rainbow."),
    ]
    for end in ("\n", "\r\n"):
        assert read_jsonl(lines(tmp_path / "d.jsonl", *rows, end=end)) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{'instruction': 1}", "JSONDecodeError"),
        ('{"instruction": "a", "response": "b"', "JSONDecodeError"),
        ("\ufeff" + json.dumps(GOOD), "JSONDecodeError"),
        (["instruction", "response"], "TypeError"),
        ("7", "TypeError"),
        ("null", "TypeError"),
        ({"instruction": "a"}, "KeyError"),
        ({"response": "a"}, "KeyError"),
        ({**GOOD, "response": 7}, "must be strings"),
        ({**GOOD, "instruction": None}, "must be strings"),
        ({**GOOD, "context": ["a"]}, "must be strings"),
        ({**GOOD, "response": ""}, "must not be empty"),
        ({**GOOD, "instruction": " \n"}, "must not be empty"),
    ],
)
def test_a_wrong_row_is_refused_with_its_file_and_line(
    tmp_path: Path, row: Any, message: str
) -> None:
    path = lines(tmp_path / "clients.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(DataError, match=rf"clients\.jsonl, line 3: .*{message}"):
        read_jsonl(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(
        json.dumps({**GOOD, "response": "d\u00e9j\u00e0"}, ensure_ascii=False).encode("latin-1")
    )
    for name, message in (
        ("latin.jsonl", "UTF-8"),
        ("absent.jsonl", "no such data file"),
        ("", "no such data file"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            read_jsonl(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


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
    assert len(got.ids) == min(max_length, len(prompt) + len(answer)) or start < len(
        prompt
    )  # nothing is cut that fits
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
    cut = encode(
        example, letters, len(whole.ids) - 1
    )  # the prompt gives way first: the answer is short
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


def test_padding_is_no_label_even_where_the_pad_is_the_end_of_sequence() -> None:
    got = collate([Tokens([5, 6, 1], 1), Tokens([7, 8, 9, 4, 1], 2)], pad_id=1)
    assert got["labels"].tolist() == [
        [IGNORE_INDEX, 6, 1, IGNORE_INDEX, IGNORE_INDEX],
        [IGNORE_INDEX, IGNORE_INDEX, 9, 4, 1],
    ]
    assert got["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_a_length_that_leaves_no_response_is_refused() -> None:
    example = Example(**GOOD)
    with pytest.raises(DataError, match="max_length 3"):
        encode(example, Letters(), 3)
    assert len(encode(example, Letters(), 4).ids) == 4
