"""The defence in any training loop.

Client -> (example count, PEFT state dict) in, the next global state dict out.

    defense = Defense("zoo/probes/linear", "cumulative")
    for number in range(1, rounds + 1):
        replies = {...}                                   # client id -> (count, state dict)
        done = defend_round(defense, number, replies, global_state, alpha=16, expected=sampled)
        global_state = done.state                         # the former one if the round was skipped

Nothing that a client sends raises; what the caller gets wrong does. A round that raises was not
played.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from loraprobe.adapters.adapter import Kind
from loraprobe.adapters.layout import pack
from loraprobe.adapters.pair import as_array
from loraprobe.errors import NonFiniteError

from ..checks import checked_options, is_integer
from ..defense.defense import Defense
from ..defense.types import Assessment, Rejected, RoundRecord, client_name, client_names
from ..errors import AggregationError, ConfigError, EvidenceError
from ..rules.rule import Rule, make_rule
from .replies import BROKEN, GlobalState, LoRAOptions, Reply, StateDict, assess, without_prefix

LateUpdates = Literal["refuse", "count"]


@dataclass(frozen=True)
class Late:
    """An update that came after its round was over.

    Attributes:
        num_examples: how many examples the client says it used.
        state: PEFT key names -> arrays, weights.
        start: the global state dict that the client started from, as the server kept it.
    """

    num_examples: Any
    state: StateDict
    start: StateDict


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
    expected: Iterable[str] | None = None,
    evidence: Mapping[str, Sequence[StateDict]] | None = None,
    kind: Kind = "weights",
    rule: str = "mean",
    options: Mapping[str, Any] | None = None,
    rejected: Rejected = "left_out",
    seed: int = 0,
    late: Mapping[str, Late] | None = None,
    late_updates: LateUpdates = "refuse",
    **lora: Any,
) -> Defended:
    """Check, score, weigh and average one round.

    Whatever is wrong with a reply, its client is rejected with the reason in the record, and the
    round goes on.

    Args:
        number: of the round: 1 for the first, rising; `defense.round + 1` is always right.
        replies: client id -> (example count, PEFT state dict of torch tensors or NumPy arrays); or
            `Reply`s, in which case they say themselves what `evidence` and `kind` say here. Whole
            numbers are ids, too; the record has them as text.
        global_state: what the clients started from, the same kind of state dict; it is not changed.
        alpha: PEFT's lora_alpha.
        expected: the clients that were asked; one that is not in `replies` gets factor 0 and the
            reason "missing", one that was not asked is refused. None: not known.
        evidence: client id -> what a level needs beyond the update (`Defense.wanted`): PEFT state
            dicts of factor deltas.
        kind: "weights", or "factor_delta" if clients send the change since `global_state`.
        rule: a name in `fedloop.AGGREGATORS`; `options` are those of `fedloop.make_rule`. An f is
            lowered to what the rule bears of the clients that are left; a rule that fails on them
            skips the round. What a rule remembers (FoolsGold) is kept in the defence's state.
        rejected: "no_change" lets whoever is not trusted stand in the mean as having changed
            nothing, so that the step is shorter by what is not trusted (`RoundRecord.trust`).
        seed: of what a rule draws (DnC, FLAME's noise), together with the round's number.
        late: client id -> an update of an earlier round that came after it was over.
        late_updates: "refuse" them, with the reason in the record; or "count" in this round what
            each changed since the state that it started from. A client that also sent an update of
            this round has that one counted.
        lora: further arguments of `Adapter.from_state_dict`: use_rslora, alpha_pattern,
            rank_pattern, base_model.

    Raises:
        EvidenceError: the round was assessed already, or an id or a reply is none.
        ConfigError: no such rule, or an option that is unknown, missing or not valid.
        AdapterFormatError, UnsupportedAdapterError, NonFiniteError: `global_state` is not a plain,
            finite LoRA.
    """
    _check_call(defense, seed, late, evidence)
    aggregator = make_rule(rule, **checked_options("options", options))
    if kind not in ("weights", "factor_delta"):
        raise ConfigError(f"got kind {kind!r}; expected 'weights' or 'factor_delta'")
    start = GlobalState(global_state, LoRAOptions.of(alpha, lora))
    if isinstance(replies, Mapping):
        replies = _replies(replies, evidence or {}, kind)
    elif evidence or kind != "weights":
        raise ConfigError("got evidence or kind beside Replies; expected them in each Reply")
    if late_updates not in ("refuse", "count"):
        raise ConfigError(f"got late_updates {late_updates!r}; expected 'refuse' or 'count'")
    check_rejected(rejected)
    replies = _checked_replies(replies)
    heard = {client_name(reply.client_id) for reply in replies}
    overdue = {client_name(client): item for client, item in (late or {}).items()}
    came = [
        _late(client, item, late_updates) for client, item in overdue.items() if client not in heard
    ]
    if expected is not None:
        expected = [*client_names(expected, "expected"), *(reply.client_id for reply in came)]
    with defense.undone_on_error():
        assessment = assess(defense, number, [*replies, *came], start, expected)
        if assessment.skipped:
            return Defended(start.state, assessment.record(rule=rule))
        generator = np.random.default_rng([seed, assessment.round])
        try:
            length = assessment.trust if rejected == "no_change" else 1.0
            state = _aggregated(assessment, start, defense, aggregator, generator, length)
        except (AggregationError, NonFiniteError) as error:
            # No majority, too few clients left, or a sum too large for the state's type.
            return Defended(start.state, assessment.record(unusable=str(error), rule=rule))
        return Defended(state, assessment.record(rule=rule))


def check_rejected(rejected: str) -> None:
    """Raise ConfigError unless it says what `defend_round` can do with whom it does not trust."""
    if rejected not in get_args(Rejected):
        raise ConfigError(f"got rejected {rejected!r}; expected 'left_out' or 'no_change'")


def _check_call(defense: Any, seed: Any, late: Any, evidence: Any) -> None:
    """Raise ConfigError for what would otherwise fail in the middle of a round."""
    if not isinstance(defense, Defense):
        raise ConfigError(f"got a defence of type {type(defense).__name__}; expected a Defense")
    if not is_integer(seed, 0):
        raise ConfigError(f"seed: got {seed!r}; expected a whole number of at least 0")
    if not isinstance(evidence, Mapping | None):
        raise ConfigError(f"evidence: got {evidence!r:.80}; expected client id -> state dicts")
    updates = {} if late is None else late
    if not isinstance(updates, Mapping) or any(not isinstance(u, Late) for u in updates.values()):
        raise ConfigError(f"late: got {late!r:.80}; expected client id -> Late")


def _checked_replies(replies: Any) -> list[Reply]:
    """A list of replies; raise EvidenceError where one is something else."""
    listed = list(replies) if isinstance(replies, Iterable) else [replies]
    if wrong := [reply for reply in listed if not isinstance(reply, Reply)]:
        raise EvidenceError(
            f"replies: got {type(wrong[0]).__name__}; expected client id -> (example count, state"
            " dict), or several Reply"
        )
    return listed


def _late(client: str, update: Late, late_updates: LateUpdates) -> Reply:
    """A late update as one of this round: its change since where it started, or why it is none."""
    try:
        if late_updates == "refuse":
            raise EvidenceError("late: an update of an earlier round; its round is over")
        steps, began = {}, _by_place(update.start)
        for place, value in _by_place(update.state).items():
            after, before = as_array(value), as_array(began[place])
            if after.shape != before.shape:
                raise EvidenceError(f"late: got {place} {after.shape}; expected {before.shape}")
            steps[place] = after - before
    except BROKEN as error:
        return Reply(client, update.num_examples, error)
    return Reply(client, update.num_examples, steps, (), "factor_delta")


def _by_place(state: StateDict) -> dict[str, Any]:
    """Under the names that PEFT gives, whatever a framework puts before them."""
    return {without_prefix(key): value for key, value in state.items()}


def _replies(
    replies: Mapping[str, tuple[int, StateDict]],
    evidence: Mapping[str, Sequence[StateDict]],
    kind: Kind,
) -> list[Reply]:
    steps = {client_name(client): sent for client, sent in evidence.items()}
    read = []
    for client, reply in replies.items():
        if not isinstance(reply, tuple | list) or len(reply) != 2:
            raise EvidenceError(
                f"replies[{client!r}]: got {type(reply).__name__}; expected a pair (example count,"
                " state dict). Leave out who sent nothing."
            )
        count, state = reply
        read.append(Reply(client, count, state, steps.get(client_name(client), ()), kind))
    return read


def _aggregated(
    assessment: Assessment,
    start: GlobalState,
    defense: Defense,
    rule: Rule,
    generator: np.random.Generator,
    length: float,
) -> dict[str, Any]:
    clients = list(assessment.accepted)
    weights = [assessment.weights[client] for client in clients]
    rows = (pack(delta, start.layout)[0] for delta in assessment.accepted.values())
    delta, state = rule.apply(
        defense.rule_state(rule.name) or rule.init(),
        torch.stack(list(rows)),  # (n, d)
        torch.tensor(weights, dtype=torch.float64),
        clients=clients,
        rng=generator,
        sizes=[slot.size for slot in start.layout.slots],
    )
    moved = start.moved(delta * length)
    if state:
        defense.remember_rule(rule.name, state)
    return moved
