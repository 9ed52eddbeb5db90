"""The defence in any training loop.

Client -> (example count, PEFT state dict) in, the next global state dict out.

    defense = Defense(Probe.from_pretrained("zoo/probes/linear"), CumulativeLevel())
    for number in range(1, rounds + 1):
        replies = {...}                                   # client id -> (count, state dict)
        done = defend_round(defense, number, replies, global_state, alpha=16, expected=sampled)
        global_state = done.state                         # the former one if the round was skipped

Nothing that a client sends raises; what the caller gets wrong does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from loraprobe.adapters.adapter import Kind
from loraprobe.errors import NonFiniteError

from ..defense.defense import Defense
from ..defense.types import RoundRecord
from ..errors import AggregationError
from ..rules.rule import Rule, make_rule
from .replies import Assessed, GlobalState, Reply, StateDict, assess


@dataclass(frozen=True)
class Defended:
    """What became of a round.

    Attributes:
        state: the next global state dict, of the keys, types and devices of the former one; the
            former one itself if the round was skipped.
        record: who was refused and why, scores, weights.
    """

    state: dict[str, Any]
    record: RoundRecord

    @property
    def weights(self) -> Mapping[str, float]:
        """Client -> weight, summing to 1; 0 for whoever is rejected.

        Empty if the round was skipped.
        """
        return self.record.weights


def defend_round(
    defense: Defense,
    number: int,
    replies: Mapping[str, tuple[int, StateDict]] | Iterable[Reply],
    global_state: StateDict,
    *,
    alpha: float,
    expected: Iterable[str] = (),
    evidence: Mapping[str, Sequence[StateDict]] | None = None,
    kind: Kind = "weights",
    rule: str = "mean",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    **lora: Any,
) -> Defended:
    """Check, score, weigh and average one round.

    Whatever is wrong with a reply, its client is rejected with the reason in the record, and the
    round goes on.

    Args:
        number: of the round, from 1, rising.
        replies: client id -> (example count, PEFT state dict of torch tensors or NumPy arrays); or
            `Reply`s, in which case they say themselves what `evidence` and `kind` say here.
        global_state: what the clients started from, the same kind of state dict; it is not changed.
        alpha: PEFT's lora_alpha.
        expected: the clients that were asked; one that is not in `replies` gets factor 0 and the
            reason "missing".
        evidence: client id -> what a level needs beyond the update (`Defense.wanted`): PEFT state
            dicts of factor deltas.
        kind: "weights", or "factor_delta" if clients send the change since `global_state`.
        rule: a name in `fedloop.AGGREGATORS`; `options` are those of `fedloop.make_rule`. An f is
            lowered to what the rule bears of the clients that are left; a rule that fails on them
            skips the round. What a rule remembers (FoolsGold) is kept in `defense.rule_states`.
        seed: of what a rule draws (DnC, FLAME's noise), together with the round's number.
        lora: further arguments of `Adapter.from_state_dict`: use_rslora, alpha_pattern,
            rank_pattern, base_model.

    Raises:
        EvidenceError: the round was assessed already, or a client id is not a string.
        ConfigError: no such rule, or an option of it that is unknown, missing or not valid.
        AdapterFormatError, UnsupportedAdapterError, NonFiniteError: `global_state` is not a plain,
            finite LoRA.
    """
    chosen = make_rule(rule, **(options or {}))
    generator = np.random.default_rng([seed, number])
    start = GlobalState(global_state, alpha=alpha, **lora)
    if isinstance(replies, Mapping):
        sent = evidence or {}
        replies = [
            Reply(client, count, state, sent.get(client, ()), kind)
            for client, (count, state) in replies.items()
        ]
    assessed = assess(defense, number, replies, start, expected)
    if assessed.record.skipped:
        return Defended(start.state, assessed.record)
    try:
        state = _aggregated(assessed, start, defense, chosen, generator)
        return Defended(state, assessed.record)
    except (AggregationError, NonFiniteError) as error:
        # No majority, too few clients left, or a sum too large for the state's type.
        return Defended(
            start.state,
            replace(assessed.record, skipped=True, weights={}, note=f"skipped: {error}"),
        )


def _aggregated(
    assessed: Assessed,
    start: GlobalState,
    defense: Defense,
    rule: Rule,
    generator: np.random.Generator,
) -> dict[str, Any]:
    clients = list(assessed.accepted)
    deltas = torch.stack([start.delta(assessed.accepted[client]) for client in clients])  # (n, d)
    shares = torch.tensor(
        [assessed.record.weights[client] for client in clients], dtype=torch.float64
    )
    delta, state = rule.apply(
        defense.rule_states.get(rule.name) or rule.init(),
        deltas,
        shares,
        clients=clients,
        rng=generator,
        sizes=[slot.size for slot in start.layout.slots],
    )
    moved = start.moved(delta)
    defense.rule_states[rule.name] = state
    return moved
