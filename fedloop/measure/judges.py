"""Published models that judge answers: MD-Judge (safe or not) and a reward model (a number).

Both are loaded with transformers, from the Hub or from a folder, and never run code that comes with
a model.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError, FedloopError, MissingExtra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MD_JUDGE = "OpenSafetyLab/MD-Judge-v0.1"
REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"
BATCH = 8
VERDICT_TOKENS = 32
_CODE = re.compile(r"^```python\s*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class MDJudge:
    """A causal language model that reads a safety policy, a question and an answer, and writes
    "safe" or "unsafe".

    Attributes:
        template: the policy, with one ``%s`` for the question and, behind it, one for the answer.

    Source: Li et al. 2024 (arXiv:2402.05044) and the card of OpenSafetyLab/MD-Judge-v0.1, which
    asks for greedy text after its template, with the tokenizer's special tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str

    @classmethod
    def from_pretrained(cls, name: str | Path = MD_JUDGE) -> MDJudge:
        """Load the judge from the Hub or a folder.

        The template comes from the model's own card (README.md), so that a judge is asked in the
        words it was trained on.

        Raises:
            MissingExtra: transformers is not installed.
            DataError: the model or its tokenizer cannot be loaded or lacks weights, or the card
                holds no template.
        """
        transformers = _transformers()
        template = template_of_card(_card(str(name)))
        return cls(*_load(transformers.AutoModelForCausalLM, str(name)), template)

    @torch.no_grad()
    def judge(
        self, questions: Sequence[str], answers: Sequence[str], batch_size: int = BATCH
    ) -> list[bool]:
        """Whether each answer is safe. A verdict that cannot be read is not.

        Raises:
            DataError: not one answer for each question, or a text too long for the model.
        """
        self.model.eval()  # type: ignore[no-untyped-call]
        verdicts: list[bool] = []
        for rows in _batches(questions, answers, batch_size):
            prompts = [self.prompt(question, answer) for question, answer in rows]
            options: dict[str, Any] = {"return_tensors": "pt", "return_token_type_ids": False}
            batch = self.tokenizer(prompts, padding=True, padding_side="left", **options)
            length = int(batch["input_ids"].shape[1])
            _check_length(length + VERDICT_TOKENS, self.model)
            out = self.model.generate(  # type: ignore[operator]  # torch types every attribute of a module as a tensor
                **batch.to(self.model.device),
                max_new_tokens=VERDICT_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            replies = self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
            verdicts += map(says_safe, replies)
        return verdicts

    def prompt(self, question: str, answer: str) -> str:
        """The text the judge reads.

        The template without outer white space, with question and answer in their places.
        """
        before, between, after = self.template.strip().split("%s")
        return before + question + between + answer + after


def says_safe(reply: str) -> bool:
    """Whether the first line of what the judge wrote is the word safe, and nothing else.

    >>> [says_safe(words) for words in ("safe", " unsafe\\nO5: Malicious Use", "safe or not")]
    [True, False, False]
    """
    return reply.strip().split("\n")[0].strip(" \t\r'\".").lower() == "safe"


def template_of_card(card: str) -> str:
    """MD-Judge's prompt template, from the Python example in its model card.

    The code is read, never run.

    Raises:
        DataError: no example in the card sets ``evaluation_template`` to a string with one ``%s``
            for the question and one for the answer.
    """
    for code in _CODE.findall(card):
        try:
            statements = ast.parse(code).body
        except SyntaxError:
            continue  # some other example; if it was the one, the template is missed below
        for node in statements:
            match node:
                case ast.Assign(
                    targets=[ast.Name("evaluation_template")], value=ast.Constant(str(template))
                ) if template.count("%s") == 2:
                    return template.strip()
    raise DataError(
        "the model card has no Python example that sets evaluation_template to a string with %s"
        " twice, for the question and the answer. Use a judge with MD-Judge's card"
    )


@dataclass(frozen=True)
class RewardModel:
    """A classifier with one output that says how good an answer is.

    Higher is better, the scale is its own.

    Source: the card of OpenAssistant/reward-model-deberta-v3-large-v2: the only logit of
        tokenizer(question, answer).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def from_pretrained(cls, name: str | Path = REWARD_MODEL) -> RewardModel:
        """Load the model from the Hub or a folder.

        Raises:
            MissingExtra: transformers is not installed.
            DataError: the model or its tokenizer cannot be loaded, lacks weights (a base model
                without the reward head, which transformers would make up), or has more than one
                output.
        """
        auto = _transformers().AutoModelForSequenceClassification
        model, tokenizer = _load(auto, str(name))
        if model.config.num_labels != 1:
            raise DataError(
                f"{name}: got a classifier with {model.config.num_labels} outputs; expected a"
                " reward model, which has one"
            )
        return cls(model, tokenizer)

    @torch.no_grad()
    def score(
        self, questions: Sequence[str], answers: Sequence[str], batch_size: int = BATCH
    ) -> list[float]:
        """The reward of each answer.

        Raises:
            DataError: not one answer for each question.
            FedloopError: a reward is not finite.
        """
        self.model.eval()  # type: ignore[no-untyped-call]
        rewards: list[float] = []
        for rows in _batches(questions, answers, batch_size):
            batch = self.tokenizer(
                *map(list, zip(*rows, strict=True)),
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
            logits = self.model(**batch.to(self.model.device)).logits[:, 0].float()  # (n,)
            if not torch.isfinite(logits).all():
                raise FedloopError("the reward model gave NaN or infinity; expected finite rewards")
            rewards += logits.tolist()
        return rewards


def _check_length(tokens: int, model: PreTrainedModel) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise DataError(
            f"got {tokens} tokens of prompt and verdict; the judge reads {limit}. Shorten the"
            " answers: a cut one would get a wrong verdict."
        )


def _batches(
    questions: Sequence[str], answers: Sequence[str], batch_size: int
) -> Iterator[list[tuple[str, str]]]:
    if len(questions) != len(answers):
        raise DataError(
            f"got {len(questions)} questions and {len(answers)} answers; expected one answer for"
            " each question"
        )
    pairs = list(zip(questions, answers, strict=True))
    return (pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "fed", "judging answers") from error
    return transformers


def _card(name: str) -> str:
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name, "README.md")  # of a folder or of the Hub
        return Path(str(path)).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the model card of {name!r}, which holds the prompt: {_first_line(error)}"
        ) from error


def _load(auto: Any, name: str) -> tuple[Any, Any]:
    """A model with all its weights, in evaluation mode, and its tokenizer, which has a padding
    token.
    """
    where = {"": 0} if torch.cuda.is_available() else None
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(name)
        model, loading = auto.from_pretrained(
            name, dtype="auto", device_map=where, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load the judge {name!r}: {_first_line(error)}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise DataError(
            f"{name}: lacks {len(missing)} of the model's tensors, among them {missing[0]};"
            " transformers would fill them with random numbers"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: which one does not matter
    return model.eval(), tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
