"""MT-Bench: questions in, answers out, as files that FastChat's judge reads.

Only the first turn is answered here (the MT-1 of arXiv:2406.10630), greedily and in the alpaca
template; FastChat's own generator uses a chat template and a temperature by category. The GPT-4
judge is FastChat's and is not called.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import is_integer
from ..errors import DataError
from . import refusal as evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# shortuuid's: nothing that looks like something else
_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


@dataclass(frozen=True)
class Question:
    """One question of MT-Bench.

    Attributes:
        turns: what the user says, turn by turn.
        reference: the reference answers of the turns, where there are any.
    """

    question_id: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


def read_questions(path: str | Path) -> list[Question]:
    """Read FastChat's question.jsonl, in the order of the file.

    Other fields of a line are left alone.

    Raises:
        DataError: the file is missing, empty or not UTF-8, a line is not a question, or two have
            one id; the message names the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}: {error}. Expected FastChat's question.jsonl: JSON lines in UTF-8."
        ) from error
    questions: dict[int, Question] = {}
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 is text
        if not line.strip():
            continue
        try:
            question = _question(json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: expected a JSON object with question_id, category, turns"
                f" and perhaps reference, got {error!r}"
            ) from error
        if question.question_id in questions:
            raise DataError(
                f"{path}, line {number}: question_id {question.question_id} was there before;"
                " expected every id once"
            )
        questions[question.question_id] = question
    if not questions:
        raise DataError(f"{path} has no question; expected at least one line")
    return list(questions.values())


def first_turn_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 1024,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers to the first turn of every question (`fedloop.measure.refusal.answers`)."""
    prompts = [question.turns[0] for question in questions]
    return evaluate.answers(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
    )


def write_answers(
    path: str | Path,
    model_id: str,
    questions: Sequence[Question],
    answers: Sequence[str | Sequence[str]],
    *,
    tstamp: float = 0.0,
) -> None:
    """Write answers as FastChat's data/mt_bench/model_answer/<model_id>.jsonl.

    One JSON object a line, sorted by question_id.

    The same arguments give the same file: the answer_id is computed from model, question and
    answer. FastChat takes the model's name from the file's name, so call the file <model_id>.jsonl.

    Args:
        answers: for each question its first answer, or the answers of its first turns.
        tstamp: when they were made, in seconds since 1970.

    Raises:
        DataError: not one answer for each question, more answers than turns, an answer that is not
            text, a question that is there twice, or no model_id.
    """
    if not model_id:
        raise DataError(
            "got an empty model_id; expected the name that the judge's tables should show"
        )
    if len(questions) != len(answers):
        raise DataError(
            f"got {len(questions)} questions and {len(answers)} answers; expected one answer for"
            " each question"
        )
    lines: dict[int, str] = {}
    for question, answer in zip(questions, answers, strict=True):
        if question.question_id in lines:
            raise DataError(
                f"got question {question.question_id} twice; expected every question once"
            )
        turns = _turns(question, answer)
        row = {
            "question_id": question.question_id,
            "answer_id": _answer_id(model_id, question.question_id, turns),
            "model_id": model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": tstamp,
        }
        lines[question.question_id] = json.dumps(row, ensure_ascii=False, allow_nan=False)
    text = "".join(lines[question_id] + "\n" for question_id in sorted(lines))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _question(row: Any) -> Question:
    number = row["question_id"]
    category = row["category"]
    turns = row["turns"]
    reference = row.get("reference") or []
    if not is_integer(number):
        raise TypeError(f"question_id {number!r}, not a whole number")
    if not isinstance(category, str):
        raise TypeError(f"category {category!r}, not a string")
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        raise TypeError("turns that are not a list of texts")
    if not isinstance(reference, list) or not all(isinstance(answer, str) for answer in reference):
        raise TypeError("a reference that is not a list of strings")
    return Question(number, category, tuple(turns), tuple(reference))


def _turns(question: Question, answer: str | Sequence[str]) -> list[str]:
    turns = [answer] if isinstance(answer, str) else list(answer)
    if not 1 <= len(turns) <= len(question.turns) or not all(
        isinstance(turn, str) for turn in turns
    ):
        raise DataError(
            f"question {question.question_id}: got {len(turns)} answers; expected strings, one for"
            f" each of its {len(question.turns)} turns or fewer"
        )
    return turns


def _answer_id(model_id: str, question_id: int, turns: list[str]) -> str:
    """22 characters like those of shortuuid, from a UUID that is computed instead of drawn."""
    number = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([model_id, question_id, turns])).int
    digits = ""
    for _ in range(22):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
