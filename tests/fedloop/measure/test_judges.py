"""Judges with the architectures of the published ones and random weights.

Loading, prompts, verdicts, rewards, refusals.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloop.errors import FedloopError
from fedloop.measure.judges import MDJudge, RewardModel, says_safe
from loraprobe.errors import DataError, MissingExtra
from tests.helpers import tiny

TEMPLATE = "is it safe?\nuser: %s\nagent: %s\n- first line: safe or unsafe."
CARD = f'''---
license: apache-2.0
---
# A judge
```python
$ pip install judge
```
```bash
evaluation_template = "%s or %s"
```
```python
from somewhere import Judge

model = Judge()
evaluation_template = """
{TEMPLATE}
"""
prompt = evaluation_template.strip() % ("a", "b")
raise SystemExit("this is read, not run")
```
'''
SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QUESTIONS = [
    "why?",
    "name a colour, and say why you like it so much.",
    "how are you",
    "100 % sure? %s",
]
ANSWERS = [
    "because.",
    "blue",
    "fine, thanks, and you? i was not so well, but now i am.",
    "%s %d {question}",
]


def mistral(std: float = 0.5) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MistralConfig(
            **SIZES,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=std,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=1,
        )
        return MistralForCausalLM(config)


def deberta(labels: int = 1) -> Any:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DebertaV2Config(
            **SIZES,
            max_position_embeddings=256,
            relative_attention=True,
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            type_vocab_size=0,
            position_biased_input=False,
            num_labels=labels,
            initializer_range=0.5,
            pad_token_id=0,
        )
        return DebertaV2ForSequenceClassification(config)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    mistral().save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None  # Mistral's has none
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def judge(judge_folder: Path) -> MDJudge:
    return MDJudge.from_pretrained(judge_folder)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    deberta().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


# --- MD-Judge


def test_the_template_comes_from_the_card_of_the_model(judge: MDJudge) -> None:
    assert judge.template == TEMPLATE
    assert (
        judge.prompt("why?", "because.")
        == "is it safe?\nuser: why?\nagent: because.\n- first line: safe or unsafe."
    )
    assert judge.prompt("100 % sure? %s", "%s %d {question}").splitlines()[1:3] == [
        "user: 100 % sure? %s",
        "agent: %s %d {question}",
    ]


@pytest.mark.parametrize(
    "card",
    [
        "",
        "no code here: evaluation_template = '%s %s'",
        "```python\nevaluation_template = '%s' + '%s'\n```",
        "```python\nevaluation_template = 7\n```",
        "```python\nanother_template = '%s %s'\n```",
        "```python\nevaluation_template = '%s %s'\n$ pip install judge\n```",
        "```python\nevaluation_template = 'one place: %s'\n```",
        "```python\nevaluation_template = '%s %s %s'\n```",
    ],
)
def test_a_card_without_a_template_is_an_error(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    with pytest.raises(DataError, match="no Python example"):
        MDJudge.from_pretrained(tmp_path)


def test_only_the_word_alone_on_the_first_line_is_a_verdict() -> None:
    assert all(map(says_safe, ("safe", "  Safe.\n", "'safe'\nanything")))
    others = ("unsafe", "unsafe\nO5: a category", "", "safely", "not safe", "safe or unsafe")
    assert not any(map(says_safe, (*others, "safe? no", "the answer is\nsafe", "- safe")))


def slow_reply(judge: MDJudge, question: str, answer: str, max_new_tokens: int) -> str:
    """The definition, of one prompt alone."""
    ids = judge.tokenizer.encode(
        TEMPLATE.replace("%s", "\0").replace("\0", question, 1).replace("\0", answer, 1)
    )
    return tiny.greedy(judge.model, judge.tokenizer, ids, max_new_tokens)


def test_what_is_judged_is_the_greedy_reply_to_each_prompt_alone(
    judge: MDJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloop.measure.judges.VERDICT_TOKENS", 6)
    expected = [
        slow_reply(judge, question, answer, 6)
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    # so that a wrong order, or padding that is seen, would show
    assert len(set(expected)) == len(QUESTIONS)
    for batch_size in (1, 3, 8):
        seen: list[str] = []
        monkeypatch.setattr(
            "fedloop.measure.judges.says_safe",
            lambda reply, seen=seen: bool(seen.append(reply)),
        )
        assert judge.judge(QUESTIONS, ANSWERS, batch_size) == [False] * len(QUESTIONS)
        assert seen == expected


def test_questions_without_answers_and_texts_that_are_too_long_are_errors(judge: MDJudge) -> None:
    assert judge.judge([], []) == []
    with pytest.raises(DataError, match="2 questions and 1 answers"):
        judge.judge(["a", "b"], ["c"])
    fits = 256 - 32 - len(judge.prompt("", ""))
    assert len(judge.judge([""], ["x" * fits])) == 1
    with pytest.raises(
        DataError, match="got 257 tokens of prompt and verdict; the judge reads 256"
    ):
        judge.judge([""], ["x" * (fits + 1)])


# --- the reward model


def test_rewards_are_the_logit_of_each_pair_alone(reward_folder: Path) -> None:
    rewards = RewardModel.from_pretrained(reward_folder)
    model, tokenizer = rewards.model, rewards.tokenizer
    with torch.inference_mode():
        expected = [
            float(model(torch.tensor([tokenizer.encode(question + answer)])).logits[0, 0])
            for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
        ]
    assert max(expected) - min(expected) > 0.1
    model.train()
    for batch_size in (1, 3, 8):
        assert rewards.score(QUESTIONS, ANSWERS, batch_size=batch_size) == pytest.approx(
            expected, rel=1e-4
        )
    assert rewards.score([], []) == []
    # the question comes first
    assert rewards.score(ANSWERS, QUESTIONS) != pytest.approx(expected, abs=1e-3)
    with pytest.raises(DataError, match="1 questions and 0 answers"):
        rewards.score(["a"], [])


def test_a_model_that_is_no_reward_model_is_an_error(tmp_path: Path) -> None:
    deberta(labels=2).save_pretrained(tmp_path / "two")
    tiny.tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(DataError, match="with 2 outputs; expected a reward model"):
        RewardModel.from_pretrained(tmp_path / "two")
    headless = deberta()
    headless.deberta.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    headless.config.save_pretrained(tmp_path / "base")
    with pytest.raises(DataError, match=r"lacks \d+ of the model's tensors, among them .* random"):
        RewardModel.from_pretrained(tmp_path / "base")


def test_what_cannot_be_loaded_is_an_error(
    tmp_path: Path, judge_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "card").mkdir()
    with pytest.raises(DataError, match=r"cannot read the model card of .* holds the prompt"):
        MDJudge.from_pretrained(tmp_path / "card")
    shutil.copy(judge_folder / "README.md", tmp_path / "card")
    with pytest.raises(DataError, match="cannot load the judge"):
        MDJudge.from_pretrained(tmp_path / "card")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot load the judge"):
        RewardModel.from_pretrained(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load in (MDJudge.from_pretrained, RewardModel.from_pretrained):
        with pytest.raises(MissingExtra, match=r"pip install 'loraprobe\[fed\]'"):
            load(judge_folder)


def test_a_reward_that_is_not_finite_is_an_error(reward_folder: Path) -> None:
    rewards = RewardModel.from_pretrained(reward_folder)
    with torch.no_grad():
        rewards.model.classifier.bias.fill_(math.nan)
    with pytest.raises(FedloopError, match="NaN or infinity"):
        rewards.score(["a"], ["b"])
