"""What goes into a round and what comes out of it: ClientUpdate, Assessment, RoundRecord."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from ..checks import is_integer, plain, whole
from ..errors import EvidenceError, StateError

if TYPE_CHECKING:
    from loraprobe.adapters.adapter import Adapter


Rejected = Literal["left_out", "no_change"]
"""What whoever is not trusted is in a mean: out of it, or there without a change."""

LONGEST_ID = 1000  # digits; Python writes no integer of some thousands


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sends in one round. It carries no label and no dataset name.

    Attributes:
        client_id: who sent it, as the transport authenticated it; never a field the client filled
            in. A whole number of any type counts as its decimal digits.
        num_examples: how many examples the client says it used; a whole number of any type.
        adapter: the trained LoRA (kind "weights") or its change since the round's global LoRA
            ("factor_delta").
        steps: evidence, factor deltas that hold at least the modules the probe reads: one per local
            step of this round, or one per step of the shadow branch, or one shadow gradient.
    """

    client_id: str
    num_examples: int
    adapter: Adapter
    steps: tuple[Adapter, ...] = ()


@dataclass(frozen=True)
class RoundRecord:
    """What a round did with every client and why: one JSON line.

    Attributes:
        round: from 1.
        scores: client -> P(malicious) of what was scored of it; a client that was not scored is
            absent.
        factors: client -> security factor in [0, 1], for every client of the round; 0 if it was
            rejected.
        weights: client -> aggregation weight, summing to 1; empty if the round was skipped.
        reasons: client -> why it was rejected, or what else is to be known about its factor.
        num_examples: client -> the count that was used, after capping.
        status: client -> the level's standing verdict, for levels that have one.
        cuts: client -> the score from which its evidence spoke against it in this round.
        skipped: whether the global LoRA was kept as it was; `note` says why.
        losses: client -> mean training loss, where the loop knows it and it is finite.
        seconds: phase -> wall-clock seconds: train, evidence, assess, aggregate, evaluate; on
            Flower also exchange, from sending a round to its last reply.
        bytes: what was sent: update, evidence; on Flower also to_clients.
        metrics: what was measured of the global model after this round, if it was measured.
        note: what else is to be known of the round, such as why it was skipped.
        level: who judged: the level's name; "" for nobody.
        evidence: what the level read of every client; "" for nothing.
        rule: what aggregated the accepted updates; "" where nobody said.
    """

    round: int
    scores: Mapping[str, tuple[float, ...]]
    factors: Mapping[str, float]
    weights: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    num_examples: Mapping[str, int] = field(default_factory=dict)
    status: Mapping[str, str] = field(default_factory=dict)
    cuts: Mapping[str, float] = field(default_factory=dict)
    skipped: bool = False
    losses: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    level: str = ""
    evidence: str = ""
    rule: str = ""

    @property
    def trust(self) -> float:
        """What share of the examples of well-formed updates counts, in [0, 1]."""
        counted = (count * self.factors[client] for client, count in self.num_examples.items())
        return math.fsum(counted) / max(1, sum(self.num_examples.values()))

    def to_json(self) -> str:
        """One line of JSON, without the newline."""
        plain = {name.name: getattr(self, name.name) for name in fields(RoundRecord)}
        return json.dumps(plain, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> RoundRecord:
        """The inverse of `to_json`.

        Raises:
            StateError: the line is not JSON, or its fields are not a record's.
        """
        try:
            values = json.loads(line)
            values["scores"] = {
                client: tuple(scores) for client, scores in values["scores"].items()
            }
            return RoundRecord(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StateError(
                f"got a line that is not a round record ({error!r}); expected one JSON object a"
                " line as written by a run"
            ) from error


@dataclass(frozen=True)
class Assessment(RoundRecord):
    """What a defence decided of one round: the record so far, and what may be summed.

    Attributes:
        accepted: client -> its change since the round's global LoRA, kind "factor_delta", of the
            clients with a weight above 0, sorted by id: the very objects that were screened. Empty
            if the round is skipped.
        forgotten: clients that were gone for longer than the defence remembers.
    """

    accepted: Mapping[str, Adapter] = field(default_factory=dict, repr=False, compare=False)
    forgotten: tuple[str, ...] = ()

    def record(
        self,
        *,
        unusable: str = "",
        reasons: Mapping[str, str] | None = None,
        losses: Mapping[str, float] | None = None,
        seconds: Mapping[str, float] | None = None,
        bytes: Mapping[str, int] | None = None,
        metrics: Mapping[str, float] | None = None,
        notes: Iterable[str] = (),
        rule: str = "",
    ) -> RoundRecord:
        """The round's record, with what only the loop knows.

        Args:
            unusable: why the accepted updates could not be aggregated after all; the round is then
                skipped.
            reasons: client -> why nothing of it could be read; instead of the defence's reason.
            notes: what else is to be known of the round.
            rule: what aggregated.
        """
        all_notes = (self.note, *notes, f"skipped: {unusable}" if unusable else "")
        plain = RoundRecord(**{name.name: getattr(self, name.name) for name in fields(RoundRecord)})
        return replace(
            plain,
            weights={} if unusable else self.weights,
            skipped=self.skipped or bool(unusable),
            reasons=dict(sorted({**self.reasons, **(reasons or {})}.items())),
            losses=losses or {},
            seconds={**(seconds or {}), **self.seconds},
            bytes=bytes or {},
            metrics=metrics or {},
            note="; ".join(note for note in all_notes if note),
            rule=rule,
        )


def client_name(client: Any) -> str:
    """A client's id as records have it.

    Raises:
        EvidenceError: it is neither text nor a whole number.
    """
    if isinstance(client, str):
        return _storable(str(client))
    number = plain(client)
    if is_integer(number) and abs(number) < 10**LONGEST_ID:
        return str(int(number))
    got = "of too many digits" if is_integer(number) else f"{client!r:.80}"
    raise EvidenceError(
        f"got the client id {got} of type {type(client).__name__}; expected a string, or a whole"
        f" number of at most {LONGEST_ID} digits"
    )


def _storable(client: str) -> str:
    try:
        client.encode()
    except UnicodeEncodeError:
        raise EvidenceError(
            f"got the client id {client!r:.80}, which no file can hold; expected text without lone"
            " surrogates"
        ) from None
    return client


def client_names(clients: Iterable[Any], what: str) -> tuple[str, ...]:
    """Several clients' ids, each once, in their order.

    Raises:
        EvidenceError: one string where several ids are due, or something that is no id.
    """
    if isinstance(clients, str | bytes) or not isinstance(clients, Iterable):
        raise EvidenceError(
            f"{what}: got {clients!r:.80}; expected several client ids, such as ['{clients!s:.40}']"
        )
    return tuple(dict.fromkeys(client_name(client) for client in clients))


def named_updates(updates: Iterable[ClientUpdate]) -> list[ClientUpdate]:
    """The updates under their clients' names, sorted by them.

    Raises:
        EvidenceError: an id is none, or something is no ClientUpdate.
    """
    updates = list(updates) if isinstance(updates, Iterable) else [updates]
    for update in updates:
        if not isinstance(update, ClientUpdate):
            raise EvidenceError(
                f"got an update of type {type(update).__name__}; expected ClientUpdate"
            )
    named = [
        replace(
            update,
            client_id=client_name(update.client_id),
            num_examples=whole(update.num_examples),
        )
        for update in updates
    ]
    return sorted(named, key=lambda update: update.client_id)


def next_number(round: Any, former: int) -> int:
    """The number of a round after another.

    Raises:
        EvidenceError: it is none.
    """
    number = plain(round)
    if not is_integer(number, 1) or number <= former:
        raise EvidenceError(
            f"got round {round!r} after round {former}; expected a whole number above"
            f" {former}: rounds count from 1, and one counted twice counts its scores twice"
        )
    return int(number)
