"""Instruction data: what one example is, how it is read, and how it becomes tokens.

An example is an instruction, an optional context and a response. Training uses the alpaca
template (the official scripts' of arXiv:2601.07177) and puts the loss on the response only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import DataError
from .templates import around_request, prompt_text, template_of

ALPACA_TEMPLATE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
IGNORE_INDEX = -100  # what torch's cross-entropy skips


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    eos_token_id: int

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text."""
        ...


@dataclass(frozen=True)
class Example:
    """One instruction and the response that training should make likely."""

    instruction: str
    response: str
    context: str = ""

    @property
    def request(self) -> str:
        """The instruction, and the context below it if there is one."""
        return f"{self.instruction}\n\n{self.context}" if self.context else self.instruction

    @property
    def prompt(self) -> str:
        """The text the model reads before it answers: the request in the alpaca template."""
        return ALPACA_TEMPLATE.format(instruction=self.request)


@dataclass(frozen=True)
class Tokens:
    """Token ids of one example and where the response starts."""

    ids: list[int]
    response_start: int


def opening(tokenizer: Tokenizer) -> list[int]:
    """The token that the tokenizer opens every text with (Llama's <|begin_of_text|>), in a list.

    [] if it opens with none.
    """
    start = getattr(tokenizer, "bos_token_id", None)
    return (
        [start]
        if start is not None and tokenizer.encode("", add_special_tokens=True)[:1] == [start]
        else []
    )


def encode(example: Example, tokenizer: Tokenizer, max_length: int) -> Tokens:
    """Tokens of `opening` + prompt + response + end of sequence, cut to ``max_length`` from the
    right.

    A prompt that leaves no room for the response is cut from the left, to at most three quarters
    of the length, so that every example keeps a response to learn from; what opens the text stays.
    The template is the one kept with the tokenizer (`fedloop.data.templates`).

    Raises:
        DataError: max_length leaves no room for a response.
    """
    if max_length < 4:
        raise DataError(
            f"got max_length {max_length}; expected at least 4 tokens, or no response would be left"
            " to learn from"
        )
    response = tokenizer.encode(example.response, add_special_tokens=False) + [
        tokenizer.eos_token_id
    ]
    longest_prompt = max_length - min(len(response), max_length // 4)
    prompt = _prompt(example, tokenizer, longest_prompt)
    return Tokens((prompt + response)[:max_length], len(prompt))


def _prompt(example: Example, tokenizer: Tokenizer, longest: int) -> list[int]:
    """At most `longest` tokens of a prompt; of a chat template's, the request alone is cut."""
    prompt = tokenizer.encode(prompt_text(example, tokenizer), add_special_tokens=False)
    start = opening(tokenizer)
    if start and prompt[:1] == start:  # a chat template writes it itself
        start = []
    if len(start) + len(prompt) > longest and template_of(tokenizer) == "chat":
        before, after = around_request(tokenizer)
        room = max(1, longest - len(start) - len(before) - len(after))
        request = tokenizer.encode(example.request, add_special_tokens=False)
        prompt = before + request[-room:] + after
    return start + prompt[-(longest - len(start)) :]


def collate(batch: Sequence[Tokens], pad_id: int) -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels``, each (n, longest)."""
    longest = max(len(tokens.ids) for tokens in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(batch), longest), dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORE_INDEX, dtype=torch.long)
    for row, tokens in enumerate(batch):
        length = len(tokens.ids)
        ids[row, :length] = torch.tensor(tokens.ids)
        mask[row, :length] = 1
        labels[row, tokens.response_start : length] = ids[row, tokens.response_start : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def deduplicate(examples: Iterable[Example]) -> list[Example]:
    """The examples without exact repeats of (instruction, context, response), order kept."""
    return list(dict.fromkeys(examples))
