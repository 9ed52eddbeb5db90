"""Aggregation rules: from clients' deltas (n, d) and weights (n,) to one delta (d,).

As functions of one round, textbook definitions:

    delta = AGGREGATORS["trimmed_mean"](deltas, weights, f=2)

and as what a loop of rounds uses, whatever the engine, with what a rule remembers and draws:

    rule = make_rule("foolsgold")
    state = rule.init()
    delta, state = rule.apply(state, deltas, weights, clients=ids, rng=generator)

How weights enter, in every rule: rows of weight 0 are dropped first, so a rejected client cannot
move any result, whatever it sent; n below counts the rows that remain. What the remaining weights
do:

- mean, geometric_median: weighted.
- all others: nothing. Their guarantees count clients, and num_examples is a client's word; one
  client, one vote.

Deltas and weights are torch tensors or NumPy arrays and are never modified; the result is a CPU
tensor of their type (float32 for half precision). AggregationError stands for input that is not
finite, of another shape, without weight, or too few for the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..checks import named
from ..errors import AggregationError, OptionError, StateError
from . import classic, compared
from .rows import Array, Votes, tensor, tolerable, vector, weighted_rows

State = dict[str, Any]
"""Plain data and tensors; {} for a rule that remembers nothing, else {"history": {client: (d,)}}"""

Options = (
    classic.Mean
    | classic.Median
    | classic.TrimmedMean
    | classic.Meamed
    | classic.Krum
    | classic.MultiKrum
    | classic.GeometricMedian
    | classic.CenteredClipping
    | classic.NNM
    | compared.FoolsGold
    | compared.Residual
    | compared.DnC
    | compared.Flame
    | compared.Lasa
)

RULES: Mapping[str, type[Options]] = {
    "mean": classic.Mean,
    "median": classic.Median,
    "trimmed_mean": classic.TrimmedMean,
    "meamed": classic.Meamed,
    "krum": classic.Krum,
    "multi_krum": classic.MultiKrum,
    "geometric_median": classic.GeometricMedian,
    "centered_clipping": classic.CenteredClipping,
    "nnm": classic.NNM,
    "foolsgold": compared.FoolsGold,
    "residual": compared.Residual,
    "dnc": compared.DnC,
    "flame": compared.Flame,
    "lasa": compared.Lasa,
}


@dataclass(frozen=True)
class Rule:
    """A rule with its options, as a loop of rounds uses it; `make_rule` makes one.

    Attributes:
        name: in RULES.
        options: checked when they were made.
        pre: "nnm" mixes every row with its nearest ones before the rule.
    """

    name: str
    options: Options
    pre: Literal["nnm"] | None = None

    def __post_init__(self) -> None:
        if self.pre not in (None, "nnm"):
            raise OptionError(f"rule {self.name!r}: got pre {self.pre!r}; expected None or 'nnm'")
        if self.pre and not self.options.f:
            raise OptionError(f"rule {self.name!r}: pre 'nnm' needs the option f, of at least 1")

    def init(self) -> State:
        """The state before the first round."""
        return {"history": {}} if isinstance(self.options, compared.FoolsGold) else {}

    def apply(
        self,
        state: Mapping[str, Any],
        deltas: Array,
        weights: Array,
        *,
        clients: Sequence[str] = (),
        rng: np.random.Generator | None = None,
        sizes: Sequence[int] | None = None,
    ) -> tuple[Tensor, State]:
        """Aggregate one round.

        Args:
            state: of the last round; it is not changed.
            deltas: (n, d).
            weights: (n,); 0 for a client that does not count.
            clients: the ids of the rows; needed by a rule that remembers clients.
            rng: what a rule draws from (DnC's coordinates, FLAME's noise).
            sizes: lengths of the parts of a delta, in order, which LASA judges one by one.

        Returns:
            the delta (d,) and the next state. The option f is lowered to what the rule bears of the
            clients that count.

        Raises:
            AggregationError: the rule cannot be applied to this round; skip it.
            StateError: the state is not this rule's.
        """
        rows, shares, mask = weighted_rows(deltas, weights)
        history, after = self._remembered(state, rows, mask, clients)
        options = replace(self.options, f=min(self.options.f, tolerable(len(rows))))
        votes = Votes(rows, shares, rng, sizes, None, history)
        return _aggregate(options, votes, self.pre), after

    def _remembered(
        self, state: Mapping[str, Any], rows: Tensor, mask: Any, clients: Sequence[str]
    ) -> tuple[Tensor | None, State]:
        """The summed deltas of the clients that count, this round's included; the next state."""
        if state.keys() != self.init().keys():
            raise StateError(
                f"got a state with {sorted(state)}; expected that of rule {self.name!r}, as init()"
                " or apply() returned it"
            )
        if "history" not in state:
            return None, {}
        if len(clients) != len(mask) or len(set(clients)) != len(clients):
            raise AggregationError(
                f"got {len(set(clients))} client ids for {len(mask)} deltas; rule {self.name!r}"
                " remembers clients: give clients=, one id for each row"
            )
        counted = [client for client, counts in zip(clients, mask, strict=True) if counts]
        history = state["history"]
        if wrong := {tuple(row.shape) for row in history.values()} - {tuple(rows.shape[1:])}:
            raise StateError(
                f"got deltas of shape {tuple(rows.shape[1:])}; the history of rule {self.name!r}"
                f" is of {wrong.pop()}: of another LoRA. Start with init()"
            )
        sums = {
            client: history[client] + row if client in history else row.clone()
            for client, row in zip(counted, rows, strict=True)
        }
        return torch.stack(list(sums.values())), {"history": {**history, **sums}}


def make_rule(name: str, /, *, pre: Literal["nnm"] | None = None, **options: Any) -> Rule:
    """The rule of this name with these options, checked now.

    Args:
        pre: as in `Rule`.
        options: fields of the rule's dataclass in `fedloop.rules`.

    Raises:
        ConfigError: no such rule or option (the message lists the valid ones), an option that is
            missing, or a value that is not valid.
    """
    return Rule(name, named("rule", name, RULES, options, OptionError), pre)


def _aggregate(options: Options, votes: Votes, pre: Literal["nnm"] | None) -> Tensor:
    if pre == "nnm":
        votes = replace(votes, rows=classic.mixed_rows(votes.rows, options.f))
    return options.aggregate(votes)


def _function(name: str) -> Callable[..., Tensor]:
    """The rule as a function of one round."""

    def aggregate(
        deltas: Array,
        weights: Array,
        *,
        rng: np.random.Generator | None = None,
        sizes: Sequence[int] | None = None,
        start: Array | None = None,
        history: Array | None = None,
        **options: Any,
    ) -> Tensor:
        rule = make_rule(name, **options)
        rows, shares, mask = weighted_rows(deltas, weights)
        d = rows.shape[1]
        votes = Votes(
            rows,
            shares,
            rng,
            sizes,
            None if start is None else vector(start, d, "start"),
            None if history is None else _history(history, mask, d),
        )
        return _aggregate(rule.options, votes, rule.pre)

    aggregate.__name__ = name
    aggregate.__doc__ = RULES[name].__doc__
    return aggregate


def _history(history: Array, mask: Any, d: int) -> Tensor:
    """The history of the clients that count, (m, d)."""
    rows = tensor(history, "history")
    if rows.shape != (len(mask), d):
        raise AggregationError(
            f"got history of shape {tuple(rows.shape)}; expected {(len(mask), d)}, that of deltas"
        )
    return weighted_rows(rows, mask)[0]


AGGREGATORS: Mapping[str, Callable[..., Tensor]] = {name: _function(name) for name in RULES}
"""Name -> the rule as a stateless function of one round: (deltas, weights, **options) -> delta.

Beside its options a rule takes what a round brings: `rng` (dnc, flame), `sizes` (lasa), `start`
(centered_clipping: the first point; flame: the parameters that the deltas started from) and
`history` (foolsgold: each client's summed deltas). An f that the rows do not bear is an error.
"""
