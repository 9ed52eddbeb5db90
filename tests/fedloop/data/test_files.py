"""Files as people have them: every layout in every format, what is said and what is refused."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fedloop.data.corpora import load_corpus, load_prompts
from fedloop.data.examples import Example
from fedloop.data.files import ANSWERS, CONTEXTS, QUESTIONS, read_file
from fedloop.errors import DataError, MissingExtra

GOOD = {"instruction": "Name a colour.", "response": "Blue."}
BLUE = Example("Name a colour.", "Blue.")
USER = {"role": "user", "content": "Name a colour."}
ANSWER = {"role": "assistant", "content": "Blue."}
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN = {"from": "human", "value": "Name a colour."}
GPT = {"from": "gpt", "value": "Blue."}


def write(path: Path, *rows: Any) -> Path:
    """The rows in the format of the path's suffix; text stays as it is."""
    if path.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
    return path


LAYOUTS = [
    (
        {"instruction": "Name a colour.", "input": "", "output": "Blue."},
        "alpaca: instruction, input, output",
    ),
    ({"prompt": "Name a colour.", "completion": "Blue."}, "prompt/completion: prompt, completion"),
    ({**GOOD, "context": ""}, "fedloop: instruction, context, response"),
    ({"question": "Name a colour.", "answer": "Blue.", "id": "7"}, "pairs: question, answer"),
    ({"messages": [USER, ANSWER]}, "messages: messages"),
    ({"conversations": [HUMAN, GPT]}, "ShareGPT: conversations"),
]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize(("row", "said"), LAYOUTS)
def test_a_layout_is_found_by_its_columns_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: dict[str, Any], said: str, suffix: str
) -> None:
    if suffix == "csv" and len(row) == 1:
        pytest.skip("CSV has no lists")
    path = write(tmp_path / f"d.{suffix}", *[row] * 1204)
    with caplog.at_level("INFO"):
        assert load_corpus(str(path)).examples == (BLUE,) * 1204
    assert caplog.messages == [f"read 1,204 rows of {path} as {said}"]
    assert load_prompts(str(path)) == [BLUE.request] * 1204


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_common_field_names_are_understood(
    tmp_path: Path, question: str, answer: str, context: str
) -> None:
    rows = [{question: "Q", answer: "A", context: "C"}, {question: "Q", answer: "A", context: None}]
    got = read_file(write(tmp_path / "rows.jsonl", *rows)).examples
    assert got == (Example("Q", "A", "C"), Example("Q", "A"))


def test_of_a_conversation_the_first_exchange_is_read_and_the_rest_said(tmp_path: Path) -> None:
    rows = [{"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}, {"messages": [USER, ANSWER]}, GOOD]
    path = write(tmp_path / "d.jsonl", *rows)
    read = read_file(path)
    assert read.examples == (Example("Be brief.\n\nName a colour.", "Blue."), BLUE, BLUE)
    assert read.summary == (
        f"read 2 rows of {path} as messages: messages;"
        f" 1 rows of {path} as fedloop: instruction, response;"
        " the first question and answer of 1 longer conversations"
    )


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    separators = "one\u2028two\u2029three\u0085four\x1efive"
    rows = ({**GOOD, "response": separators}, "", " \r", GOOD)
    got = read_file(write(tmp_path / "d.jsonl", *rows)).examples
    assert [example.response for example in got] == [separators, "Blue."]
    row = {**GOOD, "response": 'one\ntwo, "three"\r\n'}
    assert read_file(write(tmp_path / "d.csv", row)).examples[0].response == row["response"]


FAULTS = [
    ({"instruction": "a"}, "expected one response, called one of .*; got none among"),
    ({"response": "a"}, "expected one instruction, .*or a conversation, called messages or"),
    ({}, "expected one instruction"),
    ({**GOOD, "prompt": "b"}, r"got \['instruction', 'prompt'\]"),
    ({**GOOD, "context": "b", "input": "c"}, "expected one context"),
    ({**GOOD, "response": 7}, "response must be a string, got int"),
    ({**GOOD, "context": ["a"]}, "context must be a string"),
    ({**GOOD, "instruction": " \n"}, "instruction must not be empty"),
    ({**GOOD, "response": ""}, "response must not be empty"),
    ({"messages": [USER, {**ANSWER, "content": ""}]}, "messages must not be empty"),
    ({"messages": [USER, {**ANSWER, "content": [1]}]}, "messages must be a string, got list"),
    ({"messages": "text"}, "messages must be a list of turns, got str"),
    ({"messages": []}, "must begin with turns of user and assistant"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, r"\['user', 'tool'\]"),
    ({"conversations": [GPT, HUMAN]}, r"got the roles \['gpt', 'human'\]"),
]


@pytest.mark.parametrize(("row", "message"), FAULTS)
def test_a_wrong_row_is_refused_with_its_place(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"d\.jsonl, line 3: .*{message}.*remove it"):
        load_corpus(str(write(tmp_path / "d.jsonl", GOOD, "", row, GOOD)))
    with pytest.raises(DataError, match=rf"d\.json, row 2: .*{message}"):
        load_corpus(str(write(tmp_path / "d.json", GOOD, row)))


HALF = '{"instruction": "a", "response": "b \\ud83d"}'
TEXTS = [
    ("d.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "line 1: .*byte-order mark of UTF-8"),
    ("d.csv", b"\xef\xbb\xbfprompt,answer\r\na,b\r\n", "line 1: .*byte-order mark of UTF-8"),
    ("d.json", json.dumps([GOOD]).encode("utf-16"), "line 1: .*byte-order mark of UTF-16"),
    ("d.jsonl", json.dumps(GOOD).encode() + b"\n\xef\xbb\xbf{}", "line 2: .*byte-order mark"),
    ("d.jsonl", f"{json.dumps(GOOD)}\n{HALF}".encode(), r"line 2: response holds '\\ud83d', half"),
    ("d.jsonl", json.dumps(GOOD).encode() + b"\n\xe9", "line 2: cannot be read as UTF-8"),
    ("d.jsonl", b"{'instruction': 1}", "line 1: expected JSON"),
    ("d.jsonl", b"7", "line 1: expected a JSON object, got int"),
    ("d.json", b"[" * 100_000, "expected JSON, got RecursionError"),
    ("d.csv", b"prompt,answer\na,b\n\nc\n", "line 4: got 1 fields, expected 2"),
    ("d.csv", b"prompt,answer\na,b\nc,\n", "line 3: answer must not be empty"),
    ("d.csv", b'prompt,answer\n"a,b\n', "line 2: unexpected end of data"),
    ("d.parquet", b"PAR1", "cannot be read after row 0"),
    ("d.jsonl", b"\n", "holds no row"),
    ("d.json", b"[]", "holds no row"),
    ("d.csv", b"prompt,answer,answer\na,b,c\n", "line 1: got the column 'answer' twice"),
    ("d.csv", b"", "holds no row"),
]


@pytest.mark.parametrize(("name", "content", "message"), TEXTS)
def test_a_file_that_cannot_be_read_says_where(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{re.escape(name)}.*{message}"):
        load_corpus(str(tmp_path / name))


def test_parquet_without_its_library_says_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "d.parquet", GOOD)
    monkeypatch.setitem(sys.modules, "pyarrow.lib", None)
    with pytest.raises(MissingExtra, match=r"needs datasets.*loraprobe\[fed\]"):
        read_file(path)


def test_a_column_of_a_file_becomes_the_categories(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", {**GOOD, "writer": "a"}, {**GOOD, "writer": "b"})
    assert load_corpus(str(path), category="writer").categories == ("a", "b")
    for bad, message in ((GOOD, "be a string"), ({**GOOD, "writer": ""}, "not be empty")):
        path = write(tmp_path / "d.jsonl", {**GOOD, "writer": "a"}, bad)
        assert len(load_corpus(str(path)).examples) == 2
        with pytest.raises(DataError, match=rf"line 2: writer must {message}"):
            load_corpus(str(path), category="writer")


def test_prompts_need_no_answer(tmp_path: Path) -> None:
    rows = [{"prompt": "Say hello."}, {**GOOD, "context": "A rainbow."}, {"messages": [USER]}]
    path = write(tmp_path / "d.jsonl", *rows)
    expected = ["Say hello.", "Name a colour.\n\nA rainbow.", "Name a colour."]
    assert load_prompts(str(path)) == expected
    with pytest.raises(DataError, match="line 1"):
        load_corpus(str(path))  # negative control
