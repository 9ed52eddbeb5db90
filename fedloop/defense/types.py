"""What goes into a round and what comes out of it: ClientUpdate and RoundRecord."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ..errors import StateError

if TYPE_CHECKING:
    from loraprobe.adapters.adapter import Adapter


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sends in one round. It carries no label and no dataset name.

    Attributes:
        client_id: who sent it, as the transport authenticated it; never a field the client filled
            in.
        num_examples: how many examples the client says it used.
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
        skipped: whether the global LoRA was kept as it was; by the safety gate, unless `note` says
            otherwise.
        losses: client -> mean training loss, where the loop knows it and it is finite.
        seconds: phase -> wall-clock seconds: train, evidence, assess, aggregate, evaluate.
        bytes: what was sent: update, evidence.
        metrics: what was measured of the global model after this round, if it was measured.
        note: what else is to be known of the round, such as why its rule could not be applied.
    """

    round: int
    scores: Mapping[str, tuple[float, ...]]
    factors: Mapping[str, float]
    weights: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    num_examples: Mapping[str, int] = field(default_factory=dict)
    status: Mapping[str, str] = field(default_factory=dict)
    skipped: bool = False
    losses: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> str:
        """One line of JSON, without the newline."""
        return json.dumps(asdict(self), allow_nan=False)

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
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StateError(
                f"got a line that is not a round record ({error!r}); expected one JSON object a"
                " line as written by a run"
            ) from error
