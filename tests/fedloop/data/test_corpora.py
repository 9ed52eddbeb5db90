"""Sources of examples: the published datasets' filters on their rows, and what is refused."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fedloop.data.builtin import PROMPTS, SETS
from fedloop.data.corpora import (
    HUB,
    Loaded,
    check_source,
    load_corpus,
    load_prompts,
)
from fedloop.data.examples import Example
from fedloop.errors import ConfigError
from loraprobe.errors import DataError, MissingExtra


class FakeError(Exception):
    pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was asked of the datasets library, and the rows or the error that it gives."""
    asked: dict[str, Any] = {}

    def load_dataset(name: str, **options: Any) -> Iterator[Any]:
        asked["call"] = (name, options)
        for row in asked["rows"]:
            if isinstance(row, Exception):
                raise row
            yield row

    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(
            load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=FakeError)
        ),
    )
    return asked


def chat(**changed: Any) -> dict[str, Any]:
    """A row of lmsys-chat-1m that passes."""
    moderation = {"categories": {"hate": False}, "category_scores": {"hate": 0.0}, "flagged": False}
    row = {
        "conversation_id": "0",
        "model": "some-model",
        "turn": 1,
        "language": "English",
        "redacted": False,
        "conversation": [
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Blue."},
        ],
        "openai_moderation": [moderation, moderation],
    }
    return {**row, **changed}


def wild(**changed: Any) -> dict[str, Any]:
    """A row of WildChat that passes."""
    row = chat(
        toxic=False,
        timestamp="2023-04-09",
        detoxify_moderation=[{"toxicity": 0.0}, {"toxicity": 0.0}],
    )
    row["conversation"] = [
        {**message, "language": "English", "toxic": False, "redacted": False}
        for message in row["conversation"]
    ]
    return {**row, **changed}


def beaver(prompt: str, is_safe: Any, response: Any = "text") -> dict[str, Any]:
    return {
        "prompt": prompt,
        "response": response,
        "category": {"privacy_violation": not is_safe},
        "is_safe": is_safe,
    }


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


QUESTION, ANSWER = chat()["conversation"]
CHAT_FAULTS = [
    ({"conversation": [QUESTION, ANSWER, QUESTION, ANSWER], "turn": 2}, "not a single turn"),
    ({"conversation": [ANSWER, QUESTION]}, "not a single turn"),
    ({"conversation": []}, "not a single turn"),
    ({"conversation": None}, "no conversation"),
    ({"conversation": ["hello", "hi"]}, "no conversation"),
    ({"language": "German"}, "not English"),
    ({"language": None}, "not English"),
    ({"openai_moderation": [{"flagged": False}, {"flagged": True}]}, "flagged"),
    ({"openai_moderation": [{"flagged": True}, {"flagged": False}]}, "flagged"),
    ({"openai_moderation": None}, "no moderation"),
    ({"openai_moderation": []}, "no moderation"),
    (
        {"openai_moderation": [{"flagged": False}]},
        "no moderation",
    ),  # one message was never looked at
    ({"openai_moderation": [{"flagged": False}, {}]}, "no moderation"),
    ({"openai_moderation": [{"flagged": False}, None]}, "no moderation"),
    ({"openai_moderation": [{"flagged": 0}, {"flagged": 0}]}, "no moderation"),
    ({"conversation": [QUESTION, {"role": "assistant", "content": " "}]}, "empty or missing text"),
    ({"conversation": [{"role": "user", "content": None}, ANSWER]}, "empty or missing text"),
]


CHATS = {"hub:lmsys/lmsys-chat-1m": chat, "hub:allenai/WildChat": wild}


@pytest.mark.parametrize("source", CHATS)
@pytest.mark.parametrize(("changed", "reason"), CHAT_FAULTS)
def test_a_chat_that_fails_the_filter_is_counted(
    source: str, changed: dict[str, Any], reason: str, hub: dict[str, Any]
) -> None:
    row = CHATS[source]
    hub["rows"] = [row(), row(**changed), row()]
    got = load_corpus(source)
    assert got == Loaded((Example("Name a colour.", "Blue."),) * 2, {reason: 1})
    assert hub["call"] == (source[4:], {"split": "train", "streaming": True, "revision": None})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (wild(toxic=True), "toxic"),
        (wild(toxic=None), "no moderation"),
        (without(wild(), "toxic"), "no moderation"),
    ],
)
def test_wildchat_also_asks_whether_the_conversation_is_toxic(
    row: dict[str, Any], reason: str, hub: dict[str, Any]
) -> None:
    hub["rows"] = [row, wild()]
    assert load_corpus("hub:allenai/WildChat").dropped == {reason: 1}
    # negative control: nothing else is wrong with it
    assert len(load_corpus("hub:lmsys/lmsys-chat-1m").examples) == 2


def test_beavertails_takes_one_label_and_each_prompt_once(hub: dict[str, Any]) -> None:
    hub["rows"] = [
        beaver("p", False, "first"),
        beaver("p", True, "safe"),
        beaver("p", False, "second"),
        beaver("q", True),
        beaver("r", False),
        beaver("s", None),
        beaver("s", 0),
        without(beaver("s", False), "is_safe"),
        beaver("t", False, ""),
        beaver("u", False, None),
    ]
    unknown = {"no is_safe label": 3}
    name, options = "PKU-Alignment/BeaverTails", {"split": "30k_train", "streaming": True}
    for _ in range(2):  # what one reading saw is nothing to the next
        unsafe = load_corpus(f"hub:{name}")
        assert hub["call"] == (name, {**options, "revision": None})
        assert unsafe.examples == (Example("p", "first"), Example("r", "text"))
        assert unsafe.dropped == {
            "labelled safe": 2,
            "repeated prompt": 1,
            "empty or missing text": 2,
            **unknown,
        }
    assert load_prompts(f"hub:{name}") == ["p", "r"]
    safe = load_corpus(f"hub:{name}#safe@abc123")
    assert hub["call"] == (name, {**options, "revision": "abc123"})
    assert safe.examples == (Example("p", "safe"), Example("q", "text"))
    assert safe.dropped == {"labelled unsafe": 5, **unknown}


def test_a_limit_stops_reading(hub: dict[str, Any]) -> None:
    hub["rows"] = itertools.cycle([chat(language="German"), chat()])
    assert load_corpus("hub:lmsys/lmsys-chat-1m", hub_limit=3) == Loaded(
        (Example("Name a colour.", "Blue."),) * 3, {"not English": 3}
    )
    with pytest.raises(ConfigError, match="limit of 0"):
        load_corpus("hub:lmsys/lmsys-chat-1m", hub_limit=0)


def test_categories_come_from_a_column_and_its_absence_is_counted(hub: dict[str, Any]) -> None:
    hub["rows"] = [
        chat(),
        chat(model="other"),
        chat(model=None),
        without(chat(), "model"),
        chat(language="German"),
    ]
    got = load_corpus("hub:lmsys/lmsys-chat-1m", category="model")
    assert (got.categories, got.dropped) == (
        ("some-model", "other"),
        {"no model": 2, "not English": 1},
    )
    assert len(got.examples) == 2


# --- specifications


@pytest.mark.parametrize("name", SETS)
def test_a_built_in_set_comes_with_its_categories(name: str) -> None:
    got = load_corpus(f"builtin:{name}")
    assert list(zip(got.categories, got.examples, strict=True)) == SETS[name]()
    assert load_corpus(f"builtin:{name}", category="category") == got
    assert load_prompts(f"builtin:{name}") == [example.request for example in got.examples]
    part = load_corpus(f"builtin:{name}/{got.categories[-1]}")
    assert set(part.categories) == {got.categories[-1]}
    assert 0 < len(part.examples) < len(got.examples)
    check_source(f"builtin:{name}")


@pytest.mark.parametrize("name", PROMPTS)
def test_built_in_prompts_are_no_training_data(name: str) -> None:
    assert load_prompts(f"builtin:{name}") == PROMPTS[name]()
    check_source(f"builtin:{name}")
    with pytest.raises(ConfigError, match="builtin:<benign"):
        load_corpus(f"builtin:{name}")


@pytest.mark.parametrize(
    "source",
    [
        "",
        "builtin:",
        "builtin:bening",
        "builtin:benign/",
        "hub:",
        "hub:other",
        "hub:lmsys/LMSYS-chat-1m#train",  # a dataset with a filter, past its filter
        "hubb:x",
        "absent.jsonl",
        ".",
        "http://a/b",
    ],
)
def test_an_unknown_source_is_refused_with_what_is_valid(source: str) -> None:
    for read in (load_corpus, load_prompts, check_source):
        with pytest.raises(ConfigError) as caught:
            read(source)
        message = str(caught.value)
        assert repr(source) in message
        assert (
            "arithmetic" in message
            if "/" in source and source.startswith("builtin")
            else all(name in message for name in (*SETS, *PROMPTS, *HUB))
        )


def test_the_built_in_sets_have_one_column() -> None:
    with pytest.raises(ConfigError, match="got category 'model'"):
        load_corpus("builtin:benign", category="model")


def test_another_dataset_is_read_by_its_columns(
    hub: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    good = {"instruction": "Name a colour.", "output": "Blue."}
    hub["rows"] = [good, {**good, "output": " "}, good]
    check_source("hub:org/alpaca#test@abc")
    with caplog.at_level("INFO"):
        got = load_corpus("hub:org/alpaca#test@abc")
    assert hub["call"] == ("org/alpaca", {"split": "test", "streaming": True, "revision": "abc"})
    reasons = {"output must not be empty": 1}
    assert got == Loaded((Example("Name a colour.", "Blue."),) * 2, reasons)
    assert caplog.messages == [f"read 2 rows of hub:org/alpaca#test@abc; left out: {reasons}"]


@pytest.mark.parametrize(
    "error", [FakeError("gated"), OSError("no network"), ValueError("bad split"), RuntimeError("")]
)
def test_a_failure_of_the_hub_is_a_data_error_even_half_way(
    hub: dict[str, Any], error: Exception
) -> None:
    hub["rows"] = [beaver("p", False), error]
    with pytest.raises(DataError, match="cannot read 'hub:PKU-Alignment/BeaverTails' from the Hub"):
        load_corpus("hub:PKU-Alignment/BeaverTails")


def test_a_dataset_of_which_nothing_passes_is_refused_with_the_reasons(hub: dict[str, Any]) -> None:
    hub["rows"] = [beaver("p", None)]
    with pytest.raises(DataError, match="no is_safe label': 1"):
        load_corpus("hub:PKU-Alignment/BeaverTails")


def test_without_the_datasets_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"needs datasets.*loraprobe\[fed\]"):
        load_corpus("hub:lmsys/lmsys-chat-1m")
    check_source("hub:lmsys/lmsys-chat-1m@abc")  # a name can be checked without
