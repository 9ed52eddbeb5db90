"""MT-Bench: questions in, answers out, as files that FastChat's judge reads.

Only the first turn is answered here (the MT-1 of arXiv:2406.10630), greedily and in the model's
template; FastChat's own generator uses a temperature by category. The GPT-4 judge is FastChat's and
is not called.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ..errors import DataError
from . import refusal as evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Turn = Annotated[str, StringConstraints(pattern=r"\S")]


class Question(BaseModel):
    """One question of MT-Bench; other fields of a line are left alone.

    Attributes:
        turns: what the user says, turn by turn.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    question_id: int
    category: str
    turns: Annotated[list[Turn], Field(min_length=1)]


def read_questions(path: Path) -> list[Question]:
    """Read FastChat's question.jsonl, in the order of the file.

    Raises:
        DataError: the file is missing, empty or not UTF-8, a line is not a question, or two have
            one id; the message names the line.
    """
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
            question = Question.model_validate_json(line)
        except ValidationError as error:
            raise DataError(
                f"{path}, line {number}: expected a JSON object with question_id, category and"
                f" turns; got {error.errors()[0]['msg']}"
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
    max_new_tokens: int = 1024,
) -> list[str]:
    """Greedy answers to the first turn of every question (`fedloop.measure.refusal.answers`)."""
    prompts = [question.turns[0] for question in questions]
    return evaluate.answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=16)


def write_answers(path: Path, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """Write the first turns' answers as FastChat's data/mt_bench/model_answer/<model_id>.jsonl.

    One JSON object a line, sorted by question_id. The same answers give the same file: an answer's
    id is computed from model, question and answer, and its time is 0. FastChat takes the model's
    name from the file's, and so does this.
    """
    rows = []
    for question, answer in sorted(
        zip(questions, answers, strict=True), key=lambda pair: pair[0].question_id
    ):
        identity = json.dumps([path.stem, question.question_id, answer])
        rows.append(
            {
                "question_id": question.question_id,
                "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, identity).hex,
                "model_id": path.stem,
                "choices": [{"index": 0, "turns": [answer]}],
                "tstamp": 0.0,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
