"""Questions read as FastChat writes them, answers written as FastChat reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedloop.measure.mtbench import Question, read_questions, write_answers
from loraprobe.errors import DataError

LINES = [
    {"question_id": 82, "category": "writing", "turns": ["draft a mail.", "make it shorter."]},
    {
        "question_id": 81,
        "category": "math",
        "turns": ["what is 1 + 1?", "and twice that?"],
        "reference": ["2", "4"],
    },
    {
        "question_id": 90,
        "category": "roleplay",
        "turns": ["be a fox.\u2028now."],
        "reference": None,
        "extra": 1,
    },
]
QUESTIONS = [
    Question(82, "writing", ("draft a mail.", "make it shorter.")),
    Question(81, "math", ("what is 1 + 1?", "and twice that?"), ("2", "4")),
    Question(90, "roleplay", ("be a fox.\u2028now.",)),
]


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text(
        "\n".join(
            line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)
            for line in lines
        ),
        encoding="utf-8",
    )
    return path


def test_questions_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    assert (
        read_questions(written(tmp_path / "question.jsonl", [*LINES[:2], "", LINES[2], ""]))
        == QUESTIONS
    )


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        "null",
        {"category": "x", "turns": ["y"]},
        {"question_id": 1, "turns": ["y"]},
        {"question_id": 1, "category": "x"},
        {"question_id": "1", "category": "x", "turns": ["y"]},
        {"question_id": True, "category": "x", "turns": ["y"]},
        {"question_id": 1, "category": None, "turns": ["y"]},
        {"question_id": 1, "category": "x", "turns": []},
        {"question_id": 1, "category": "x", "turns": "y"},
        {"question_id": 1, "category": "x", "turns": ["y", 2]},
        {"question_id": 1, "category": "x", "turns": [" "]},
        {"question_id": 1, "category": "x", "turns": ["y"], "reference": "z"},
        {"question_id": 1, "category": "x", "turns": ["y"], "reference": [2]},
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: Any) -> None:
    with pytest.raises(DataError, match="line 2: expected a JSON object with question_id"):
        read_questions(written(tmp_path / "question.jsonl", [LINES[0], line]))


def test_files_that_hold_no_questions_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 3: question_id 82 was there before"):
        read_questions(written(tmp_path / "twice.jsonl", [*LINES[:2], LINES[0]]))
    with pytest.raises(DataError, match="has no question"):
        read_questions(written(tmp_path / "empty.jsonl", ["", " "]))
    with pytest.raises(DataError, match="cannot read"):
        read_questions(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot read"):
        read_questions(tmp_path / "latin.jsonl")


def test_answers_are_written_as_fastchat_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "model_answer" / "tiny-1.jsonl"
    write_answers(
        path, "tiny-1", QUESTIONS, ["dear all,\nhäagen\u2028", ["2", "4"], ""], tstamp=1700000000.5
    )
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    rows = [json.loads(line) for line in lines]
    # sorted, as FastChat leaves its own files
    assert [row["question_id"] for row in rows] == [81, 82, 90]
    assert [row["choices"] for row in rows] == [
        [{"index": 0, "turns": ["2", "4"]}],
        [{"index": 0, "turns": ["dear all,\nhäagen\u2028"]}],
        [{"index": 0, "turns": [""]}],
    ]
    for row in rows:
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert row["model_id"] == "tiny-1"
        assert row["tstamp"] == 1700000000.5
        assert re.fullmatch(r"[2-9A-HJ-NP-Za-km-z]{22}", row["answer_id"])


def ids(path: Path) -> list[str]:
    return [json.loads(line)["answer_id"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_same_answers_give_the_same_file_and_others_other_ids(tmp_path: Path) -> None:
    first, second, third, fourth = (tmp_path / f"{number}.jsonl" for number in range(4))
    write_answers(first, "m", QUESTIONS[:2], ["a", "a"])
    write_answers(second, "m", QUESTIONS[1::-1], ["a", "a"])
    assert first.read_bytes() == second.read_bytes()
    write_answers(third, "m", QUESTIONS[:2], ["a", "b"])
    # 81 was changed
    assert [here == there for here, there in zip(ids(first), ids(third), strict=True)] == [
        False,
        True,
    ]
    write_answers(fourth, "n", QUESTIONS[:2], ["a", "a"])
    assert len({*ids(first), *ids(fourth)}) == 4


@pytest.mark.parametrize(
    ("model_id", "questions", "given", "message"),
    [
        ("", QUESTIONS, ["a", "b", "c"], "empty model_id"),
        ("m", QUESTIONS, ["a", "b"], "3 questions and 2 answers"),
        ("m", [QUESTIONS[0]] * 2, ["a", "b"], "question 82 twice"),
        ("m", QUESTIONS[2:], [["a", "b"]], "question 90: got 2 answers"),
        ("m", QUESTIONS[2:], [[]], "question 90: got 0 answers"),
        ("m", QUESTIONS[2:], [[None]], "question 90"),
    ],
)
def test_answers_that_do_not_fit_are_not_written(
    tmp_path: Path, model_id: str, questions: list[Question], given: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_answers(tmp_path / "m.jsonl", model_id, questions, given)
    assert not list(tmp_path.iterdir())
