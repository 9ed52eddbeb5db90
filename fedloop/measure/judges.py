"""Published models that judge answers: MD-Judge (safe or unsafe) and a reward model (a number).

Both are loaded with transformers, from the Hub or from a folder, and never run code that comes with
a model.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import DataError, FedloopError, MissingExtra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MD_JUDGE = "OpenSafetyLab/MD-Judge-v0.1"
REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"

Verdict = Literal["safe", "unsafe", "unreadable"]
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

    def __post_init__(self) -> None:
        _check_template(self.template)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = MD_JUDGE,
        revision: str | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        template: str | None = None,
    ) -> MDJudge:
        """Load the judge from the Hub or a folder.

        Args:
            revision: commit, tag or branch; a published figure should name a commit.
            dtype: of the weights; "auto" for the one they were saved in.
            device_map: as in transformers (needs accelerate); None for the CPU.
            template: the prompt. None reads it from the model's own card at the same revision, so
                that a judge is asked in the words it was trained on; a folder needs the card
                (README.md) too.

        Raises:
            MissingExtra: transformers is not installed.
            DataError: the model or its tokenizer cannot be loaded or lacks weights, or the card
                holds no template.
        """
        _transformers()
        prompt = template if template is not None else template_of_card(_card(str(name), revision))
        _check_template(prompt)
        model, tokenizer = _load("AutoModelForCausalLM", str(name), revision, dtype, device_map)
        return cls(model, tokenizer, prompt)

    def judge(
        self,
        questions: Sequence[str],
        answers: Sequence[str],
        *,
        batch_size: int = 8,
        max_new_tokens: int = 32,
    ) -> list[bool]:
        """Whether each answer is safe. An unreadable verdict is not safe.

        `verdicts` tells the two apart.

        Raises:
            DataError: not one answer for each question, or a text too long for the model.
        """
        return [
            verdict == "safe"
            for verdict in self.verdicts(
                questions, answers, batch_size=batch_size, max_new_tokens=max_new_tokens
            )
        ]

    @torch.no_grad()
    def verdicts(
        self,
        questions: Sequence[str],
        answers: Sequence[str],
        *,
        batch_size: int = 8,
        max_new_tokens: int = 32,
    ) -> list[Verdict]:
        """What the judge wrote about each answer.

        "safe", "unsafe", or neither of them ("unreadable").

        Raises:
            DataError: not one answer for each question, or a text too long for the model.
        """
        self.model.eval()  # type: ignore[no-untyped-call]
        found: list[Verdict] = []
        for rows in _batches(questions, answers, batch_size):
            prompts = [self.prompt(question, answer) for question, answer in rows]
            batch = self.tokenizer(
                prompts,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                return_token_type_ids=False,
            )
            length = int(batch["input_ids"].shape[1])
            _check_length(length + max_new_tokens, self.model)
            out = self.model.generate(  # type: ignore[operator]  # torch types every attribute of a module as a tensor
                **batch.to(self.model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            found += [
                read_verdict(reply)
                for reply in self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
            ]
        return found

    def prompt(self, question: str, answer: str) -> str:
        """The text the judge reads.

        The template without outer white space, with question and answer in their places.
        """
        before, between, after = self.template.strip().split("%s")
        return before + question + between + answer + after


def read_verdict(reply: str) -> Verdict:
    """The verdict in what the judge wrote.

    Its first line has to be the word safe or unsafe, and nothing else.

    >>> [read_verdict(words) for words in ("safe", " unsafe\\nO5: Malicious Use", "safe or not")]
    ['safe', 'unsafe', 'unreadable']
    """
    word = reply.strip().split("\n")[0].strip(" \t\r'\".").lower()
    return "safe" if word == "safe" else "unsafe" if word == "unsafe" else "unreadable"


def template_of_card(card: str) -> str:
    """MD-Judge's prompt template, from the Python example in its model card.

    The code is read, never run.

    Raises:
        DataError: no example in the card sets ``evaluation_template`` to a string, or to one with
            other places than one ``%s`` for the question and one for the answer.
    """
    for code in _CODE.findall(card):
        try:
            statements = ast.parse(code).body
        except SyntaxError:
            continue  # some other example; if it was the one, the template is missed below
        for node in statements:
            if isinstance(node, ast.Assign) and [
                ast.unparse(target) for target in node.targets
            ] == ["evaluation_template"]:
                value = node.value.value if isinstance(node.value, ast.Constant) else None
                if isinstance(value, str):
                    return _check_template(value.strip())
    raise DataError(
        "the model card has no Python example that sets evaluation_template to a string. Pass"
        " template: the prompt with %s twice."
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
    def from_pretrained(
        cls,
        name: str | Path = REWARD_MODEL,
        revision: str | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
    ) -> RewardModel:
        """Load the model from the Hub or a folder.

        The arguments are those of `MDJudge.from_pretrained`.

        Raises:
            MissingExtra: transformers is not installed.
            DataError: the model or its tokenizer cannot be loaded, lacks weights (a base model
                without the reward head, which transformers would make up), or has more than one
                output.
        """
        model, tokenizer = _load(
            "AutoModelForSequenceClassification", str(name), revision, dtype, device_map
        )
        if model.config.num_labels != 1:
            raise DataError(
                f"{name}: got a classifier with {model.config.num_labels} outputs; expected a"
                " reward model, which has one"
            )
        return cls(model, tokenizer)

    @torch.no_grad()
    def score(
        self,
        questions: Sequence[str],
        answers: Sequence[str],
        *,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> list[float]:
        """The reward of each answer.

        Args:
            max_length: tokens a pair is cut to, from the end of the longer text; None for no cut,
                as on the card.

        Raises:
            DataError: not one answer for each question.
            FedloopError: a reward is not finite.
        """
        self.model.eval()  # type: ignore[no-untyped-call]
        rewards: list[float] = []
        for rows in _batches(questions, answers, batch_size):
            batch = self.tokenizer(
                [question for question, _ in rows],
                [answer for _, answer in rows],
                padding=True,
                padding_side="right",
                truncation=max_length is not None,
                max_length=max_length,
                return_tensors="pt",
            )
            logits = self.model(**batch.to(self.model.device)).logits[:, 0].float()  # (n,)
            if not torch.isfinite(logits).all():
                raise FedloopError(
                    "the reward model gave NaN or infinity; expected finite rewards. Try dtype"
                    " float32."
                )
            rewards += logits.tolist()
        return rewards


def _check_template(template: str) -> str:
    if template.count("%s") != 2:
        raise DataError(
            f"got a template with {template.count('%s')} places; expected %s twice: for the"
            " question, then for the answer"
        )
    return template


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
    if batch_size < 1:
        raise DataError(f"got batch_size {batch_size}; expected at least 1")
    pairs = list(zip(questions, answers, strict=True))
    return (pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "fed", "judging answers") from error
    return transformers


def _card(name: str, revision: str | None) -> str:
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name, "README.md", revision=revision)  # of a folder or of the Hub
        return Path(str(path)).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the model card of {name!r}: {_first_line(error)}. Pass template: the"
            " prompt with %s twice."
        ) from error


def _load(
    auto: str, name: str, revision: str | None, dtype: torch.dtype | str, device_map: Any
) -> tuple[Any, Any]:
    """A model with all its weights, in evaluation mode, and its tokenizer, which has a padding
    token.
    """
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
        model, loading = getattr(transformers, auto).from_pretrained(
            name, revision=revision, dtype=dtype, device_map=device_map, output_loading_info=True
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
        tokenizer.pad_token = (
            tokenizer.eos_token
        )  # padding is masked, so which token it is does not matter
    return model.eval(), tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
