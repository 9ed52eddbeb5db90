"""What a scan can find, how grave it is unless a policy says otherwise, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Decision = Literal["allow", "review", "block"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)  # rising


@dataclass(frozen=True)
class Rule:
    """A kind of finding.

    Attributes:
        level: the decision it leads to by default.
        meaning: one sentence, shown in SARIF and in the documentation.
    """

    level: Decision
    meaning: str


RULES: dict[str, Rule] = {
    "malicious": Rule("block", "A probe scores the adapter at or above its threshold."),
    "inconclusive": Rule("review", "A probe cannot decide."),
    "not-scored": Rule("review", "No probe judged the weights."),
    "unreadable": Rule("block", "The file is missing, damaged or no adapter."),
    "refused": Rule("block", "It can be read, but what PEFT would apply cannot be scored whole."),
    "mismatch": Rule("review", "The probe does not fit the adapter."),
    "pickle": Rule("block", "A pickled file lies beside the weights; loading it runs its code."),
    "weights": Rule("review", "Other weights lie beside the adapter's; some programs load them."),
    "code": Rule("review", "Python files lie beside the weights."),
    "no-effect": Rule("review", "The product BA is zero in every module."),
    "base": Rule("block", "The adapter is not for the base model that the policy pins."),
    "module": Rule("block", "It changes modules that the policy does not allow."),
    "rank": Rule("review", "Its rank is above the policy's."),
    "norm": Rule("review", "Its change is longer than the policy allows."),
    "outlier": Rule("review", "Its norm or spectrum is out of line with the reference cohort."),
}


@dataclass(frozen=True)
class Finding:
    """One reason for a decision: a key of `RULES`, the level it has here, and what was seen."""

    rule: str
    level: Decision
    message: str


def gravest(findings: list[Finding]) -> Decision:
    """The gravest level among the findings; "allow" without any."""
    return max((finding.level for finding in findings), key=DECISIONS.index, default="allow")
