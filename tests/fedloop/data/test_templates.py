"""A tokenizer's own chat template and the papers': chosen once, and then the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedloop.data.examples import Example, encode
from fedloop.data.templates import around_request, prompt_text, resolve, template_of, use_template
from fedloop.measure.refusal import answers
from fedloop.run.build import load_adapted
from fedloop.sections import LoRAConfig, ModelConfig
from loraprobe.errors import DataError
from tests.helpers import tiny

CHAT = (
    "{% for m in messages %}{{ '#' + m['role'][0] + ':' + m['content'] + '!' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '#a:' }}{% endif %}"
)
EXAMPLE = Example("why is it so?", "because.", "once more")


@pytest.fixture
def chatting() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def test_auto_takes_the_tokenizers_own_template_where_there_is_one(chatting: Any) -> None:
    assert resolve("auto", chatting) == "chat"
    assert resolve("auto", tiny.tokenizer()) == "alpaca"
    assert resolve("alpaca", chatting) == "alpaca"


@pytest.mark.parametrize(("template", "hint"), [("chat", "without a chat"), ("vicuna", "one of")])
def test_a_template_that_is_not_there_is_refused(template: str, hint: str) -> None:
    with pytest.raises(DataError, match=hint):
        use_template(tiny.tokenizer(), template)


def test_nothing_said_is_the_papers_template_where_there_is_no_other(chatting: Any) -> None:
    with pytest.raises(DataError, match="use_template"):
        prompt_text(EXAMPLE, chatting)
    assert template_of(tiny.tokenizer()) == "alpaca"
    assert prompt_text(EXAMPLE, tiny.tokenizer()) == EXAMPLE.prompt


def test_training_reads_the_template_kept_with_the_tokenizer(chatting: Any) -> None:
    use_template(chatting, "auto")
    assert prompt_text(EXAMPLE, chatting) == "#u:why is it so?\n\nonce more!#a:"
    tokens = encode(EXAMPLE, chatting, 200)
    assert chatting.decode(tokens.ids[: tokens.response_start]) == prompt_text(EXAMPLE, chatting)


def test_of_a_long_request_the_request_is_cut_and_not_the_template(chatting: Any) -> None:
    use_template(chatting, "chat")
    before, after = around_request(chatting)
    tokens = encode(Example("x" * 99 + "y", "because."), chatting, 24)
    prompt = tokens.ids[: tokens.response_start]
    assert len(tokens.ids) == 24
    assert prompt[: len(before)] == before
    assert prompt[-len(after) :] == after
    assert chatting.decode(prompt[: -len(after)]).endswith("y")


def test_a_template_that_hides_the_request_says_so(chatting: Any) -> None:
    chatting.chat_template = "{{ 'hello' }}"
    with pytest.raises(DataError, match="hold the request once"):
        around_request(chatting)


def test_answers_use_it_too(chatting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_template(chatting, "chat")
    model, read = tiny.llama(), []
    generate = model.generate

    def reading(**given: Any) -> Any:
        read.extend(chatting.batch_decode(given["input_ids"], skip_special_tokens=True))
        return generate(**given)

    monkeypatch.setattr(model, "generate", reading)
    answers(model, chatting, ["why?"], max_new_tokens=2)
    assert [text.replace("<unk>", "") for text in read] == ["#u:why?!#a:"]


def test_a_configurations_template_reaches_training(chatting: Any, tmp_path: Path) -> None:
    chatting.save_pretrained(tiny.saved(tmp_path))
    for template in ("chat", "alpaca"):
        settings = ModelConfig(base=str(tmp_path), template=template)
        lora = LoRAConfig(target_modules=("q_proj",))
        assert template_of(load_adapted(settings, lora, frozen_a=False)[1]) == template
