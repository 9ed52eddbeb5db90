"""Questions read as FastChat writes them, answers written as FastChat reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedloop.measure.mtbench import Question, read_questions, write_answers
from loraprobe.errors import DataError

LINES = [
    {"question_id": 82, "category": "writing", "turns": ["draft a mail.", "make it shorter."]},
    {"question_id": 81, "category": "math", "turns": ["1 + 1?", "twice?"], "reference": ["2", "4"]},
    {"question_id": 90, "category": "roleplay", "turns": ["be a fox.\u2028now."], "extra": 1},
]
QUESTIONS = [
    Question(**{name: line[name] for name in ("question_id", "category", "turns")})
    for line in LINES
]


def written(path: Path, lines: list[Any]) -> Path:
    texts = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_questions_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "question.jsonl", [*LINES[:2], "", LINES[2], ""])
    assert read_questions(path) == QUESTIONS


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
    write_answers(path, QUESTIONS, ["dear all,\nhäagen\u2028", "2", ""])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    rows = [json.loads(line) for line in lines]
    # sorted, as FastChat leaves its own files
    assert [row["question_id"] for row in rows] == [81, 82, 90]
    assert [row["choices"] for row in rows] == [
        [{"index": 0, "turns": ["2"]}],
        [{"index": 0, "turns": ["dear all,\nhäagen\u2028"]}],
        [{"index": 0, "turns": [""]}],
    ]
    for row in rows:
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert row["model_id"] == "tiny-1"


def ids(path: Path) -> list[str]:
    return [json.loads(line)["answer_id"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_same_answers_give_the_same_file_and_others_other_ids(tmp_path: Path) -> None:
    first, second, third, fourth = (tmp_path / name / "m.jsonl" for name in "abcd")
    write_answers(first, QUESTIONS[:2], ["a", "a"])
    write_answers(second, QUESTIONS[1::-1], ["a", "a"])
    assert first.read_bytes() == second.read_bytes()
    write_answers(third, QUESTIONS[:2], ["a", "b"])  # 81 was changed
    found = [here == there for here, there in zip(ids(first), ids(third), strict=True)]
    assert found == [False, True]
    other = fourth.with_name("n.jsonl")
    write_answers(other, QUESTIONS[:2], ["a", "a"])
    assert len({*ids(first), *ids(other)}) == 4
