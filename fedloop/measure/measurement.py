"""What is measured of a global model.

Refusal of harmful prompts, over-refusal of safe ones, utility on held-out pairs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.corpora import load_corpus, load_prompts
from ..data.examples import Example
from ..sections import EvaluationConfig
from .judges import MDJudge, RewardModel
from .refusal import answers, refuses_by_rule, refuses_strictly
from .utility import utility

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Measurement:
    """The prompts and pairs of an experiment, chosen once.

    Attributes:
        prompts: metric prefix -> prompts: "refusal" for harmful ones, "over_refusal" for safe ones.
        pairs: held-out benign examples; none for no utility.
        config: how answers are made, and who judges those to the harmful prompts.
        max_length: of a pair, as in training.
        seed: of sampled answers (`fedloop.measure.refusal.answers`).
    """

    prompts: dict[str, list[str]]
    pairs: list[Example]
    config: EvaluationConfig
    max_length: int
    seed: int = 0

    @classmethod
    def of(cls, config: EvaluationConfig, seed: int, max_length: int) -> Measurement:
        """Load what the configuration names and choose at most `limit` of each by the seed."""

        def sample(items: list[Any]) -> list[Any]:
            if config.limit is None or len(items) <= config.limit:
                return items
            return random.Random(seed).sample(items, config.limit)

        sources = {"refusal": config.harmful, "over_refusal": config.safe}
        prompts = {name: sample(load_prompts(source)) for name, source in sources.items() if source}
        pairs = sample(list(load_corpus(config.utility).examples)) if config.utility else []
        return cls(prompts, pairs, config, max_length, seed)

    @property
    def names(self) -> list[str]:
        """What is measured, sample sizes left out."""
        of_prompts = [f"{name}_{how}" for name in self.prompts for how in ("rule", "strict")]
        judged = {"judged_safe": self.config.judge, "reward": self.config.reward_model}
        of_judges = [name for name, judge in judged.items() if judge is not None]
        return of_prompts + of_judges + (["loss", "rouge_l"] if self.pairs else [])

    def __bool__(self) -> bool:
        return bool(self.prompts or self.pairs)

    def __call__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Shares refused, by Rule and by the strict measure; what the judges say; loss and ROUGE-L.

        And the sample sizes, as n_*.
        """
        metrics: dict[str, float] = {}
        lengths: dict[str, int] = {
            "max_new_tokens": self.config.max_new_tokens,
            "batch_size": self.config.batch_size,
        }
        for name, group in self.prompts.items():
            how: dict[str, Any] = {"temperature": self.config.temperature, "seed": self.seed}
            replies = answers(model, tokenizer, group, **lengths, **how)  # type: ignore[arg-type]
            metrics[f"{name}_rule"] = sum(map(refuses_by_rule, replies)) / len(group)
            metrics[f"{name}_strict"] = sum(map(refuses_strictly, replies)) / len(group)
            metrics[f"n_{name}"] = len(group)
            if name == "refusal":
                metrics |= self._judged(group, replies)
        if self.pairs:
            length = {"max_length": self.max_length}
            metrics |= utility(model, tokenizer, self.pairs, **lengths, **length)  # type: ignore[arg-type]
            metrics["n_utility"] = len(self.pairs)
        return metrics

    def _judged(self, prompts: list[str], replies: list[str]) -> dict[str, float]:
        """MD-Judge's share of safe answers and the mean reward.

        A judge is in memory only while it judges.
        """
        metrics: dict[str, float] = {}
        if self.config.judge is not None:
            safe = MDJudge.from_pretrained(self.config.judge).judge(prompts, replies)
            metrics |= {"judged_safe": sum(safe) / len(safe), "n_judged": len(safe)}
        if self.config.reward_model is not None:
            judge = RewardModel.from_pretrained(self.config.reward_model)
            rewards = judge.score(prompts, replies)
            metrics["reward"] = sum(rewards) / len(rewards)
        return metrics
