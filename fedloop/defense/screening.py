"""What a server can check of an update before anything trusts it, and why it refuses one.

The submitted update is evidence that the server holds. Steps come out of the client's own trainer
and could be forged; what can be checked of them is: that they are finite, of the right shape and
number, each a change and none sent twice, nobody else's, and that a trajectory ends in the
submitted update. Source: the threat model of arXiv:2601.07177's official code, which checks none of
this.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraprobe.adapters.adapter import Adapter, Kind
from loraprobe.adapters.deltas import add_delta, factor_delta, weight_delta
from loraprobe.adapters.layout import Layout, Slot, flattened, pack
from loraprobe.featurizer import Featurizer

from ..errors import EvidenceError
from .types import ClientUpdate
from .weights import MAX_EXAMPLES

STEP_TOLERANCE = 2e-3  # of the update's norm: what sending steps in bfloat16 may cost
SMALLEST_STEP = 1e-6  # of the longest step's norm: a shorter one is no change
LONGEST_REASON = 500  # characters: reasons quote what clients sent, and stand in every record
# Typed errors are values of ValueError. The others are what tensors raise that cannot be read or
# computed with.
UNREADABLE = (ValueError, TypeError, RuntimeError, OSError)

Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class Reading:
    """Updates and steps as a probe reads them.

    Attributes:
        kind: what the probe's featurizer reads: "factor_delta", or "weight_delta", which needs the
            start that a change was added to.
        start: the round's global LoRA.
    """

    kind: Kind = "factor_delta"
    start: Adapter | None = None

    def __call__(self, delta: Adapter) -> Adapter:
        """A factor delta as the probe reads it; made anew whenever it is asked for, not held.

        Raises:
            EvidenceError: it takes the round's global LoRA, which is not known.
        """
        if self.kind == "factor_delta":
            return delta
        if self.start is None:
            raise EvidenceError(
                f"the probe reads a {self.kind}; give assess() the round's global LoRA as start="
            )
        start = Adapter(
            {module: self.start[module] for module in delta},
            kind=self.start.kind,
            base_model=self.start.base_model,
        )
        return weight_delta(add_delta(start, delta), start)


@dataclass(frozen=True)
class Checked:
    """A well-formed update: its change since the round's global LoRA, and its evidence.

    Attributes:
        delta: kind "factor_delta". Read again when it is scored, not held: where adapters lie in
            files, a round of thousands of clients takes the memory of one.
        digest: of its numbers, all of them.
        norm: of its numbers, L2.
    """

    num_examples: int
    delta: Adapter
    digest: bytes
    norm: float
    steps: tuple[Adapter, ...]
    evidence_digest: bytes | None = None


@dataclass(frozen=True)
class Screening:
    """What the updates of a round are compared with.

    Attributes:
        start: the round's global LoRA; needed where clients send weights.
        layout: what every update has to look like; if None, as `start`, or else as most updates do.
        featurizer: the probe's; refuses what it cannot read. None where nothing is scored.
        trajectory: whether the steps are those of this round, so that the last must be the update.
        max_steps: more steps of evidence are refused unread.
        base_model: what the probe calls the base model; an update that names another one, or
            another than `start`, is refused.
    """

    start: Adapter | None = None
    layout: Layout | None = None
    featurizer: Featurizer | None = None
    trajectory: bool = False
    max_steps: int = 1024
    base_model: str | None = None

    @property
    def reading(self) -> Reading:
        """How the probe reads an update."""
        kind = "factor_delta" if self.featurizer is None else self.featurizer.layout.kind
        return Reading(kind, self.start)

    @property
    def base_models(self) -> tuple[str, ...]:
        """What the base model is called, as far as anybody says."""
        start = self.start.base_model if self.start is not None else None
        return tuple(name for name in (self.base_model, start) if name is not None)


def check_updates(
    updates: Sequence[ClientUpdate], screening: Screening
) -> tuple[dict[str, Checked], dict[str, str]]:
    """Sort a round's updates into well-formed ones and refused ones with their reasons.

    Returns:
        client -> its checked update, and client -> why it is refused.

    Raises:
        EvidenceError: `start` is no weights, or every update holds weights and neither `start` nor
            `layout` was given: the caller's mistake, not a client's.
    """
    _check_start(updates, screening)
    refused: dict[str, str] = {}
    counts = Counter(update.client_id for update in updates)
    deltas: dict[str, tuple[ClientUpdate, Adapter]] = {}
    for update in updates:
        client = update.client_id
        if counts[client] > 1:
            refused[client] = f"duplicate: {counts[client]} updates in one round; expected one"
            continue
        try:
            _check_fields(update, screening.base_models)
            deltas[client] = (_in_round(update, screening), _delta(update, screening.start))
        except UNREADABLE as error:
            refused[client] = reason(error)
    expected = screening.layout or _expected_layout(
        screening.start, [delta for _, delta in deltas.values()]
    )
    checked: dict[str, Checked] = {}
    for client, (update, delta) in deltas.items():
        try:
            checked[client] = _check_tensors(update, delta, expected, screening)
        except UNREADABLE as error:
            refused[client] = reason(error)
    for client, others in _copies(checked).items():
        del checked[client]
        text = f"copy: the same numbers as the update or evidence of {', '.join(others)}"
        refused[client] = text[:LONGEST_REASON]
    return checked, refused


def _check_start(updates: Sequence[ClientUpdate], screening: Screening) -> None:
    start = screening.start
    if start is not None:
        if not isinstance(start, Adapter) or start.kind != "weights":
            got = f"kind {start.kind!r}" if isinstance(start, Adapter) else type(start).__name__
            raise EvidenceError(
                f"got a start of {got}; expected the round's global LoRA, an Adapter of kind"
                " 'weights'"
            )
        return
    if screening.reading.kind != "factor_delta":
        raise EvidenceError(
            f"the probe reads a {screening.reading.kind}; give assess() the round's global LoRA as"
            " start="
        )
    kinds = {update.adapter.kind for update in updates if isinstance(update.adapter, Adapter)}
    if kinds == {"weights"} and screening.layout is None:
        raise EvidenceError(
            "the updates hold weights; give assess() the round's global LoRA as start=, or send"
            " factor deltas"
        )


def _check_fields(update: ClientUpdate, base_models: Sequence[str]) -> None:
    n: Any = update.num_examples
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise EvidenceError(
            f"got num_examples of type {type(n).__name__}; expected a whole number of at least 1"
        )
    count = int(n)
    if not 1 <= count <= MAX_EXAMPLES:
        got = count if abs(count) <= MAX_EXAMPLES else "beyond 2**53"
        raise EvidenceError(f"got num_examples {got}; expected a whole number from 1 to 2**53")
    if not isinstance(update.steps, tuple | list):
        raise EvidenceError(
            f"got steps of type {type(update.steps).__name__}; expected a tuple of adapters"
        )
    for what, adapter in (
        ("an adapter", update.adapter),
        *(("a step", step) for step in update.steps),
    ):
        if not isinstance(adapter, Adapter):
            raise EvidenceError(
                f"got {what} of type {type(adapter).__name__}; expected a loraprobe Adapter"
            )
        for name in base_models:
            if adapter.base_model not in (None, name):
                raise EvidenceError(
                    f"got {what} of base model {adapter.base_model!r}; expected {name!r}"
                )


def _delta(update: ClientUpdate, start: Adapter | None) -> Adapter:
    if update.adapter.kind == "factor_delta":
        return update.adapter if start is None else update.adapter.since(start)
    if update.adapter.kind != "weights":
        raise EvidenceError(
            f"got an update of kind {update.adapter.kind!r}; expected 'weights' or 'factor_delta'"
        )
    if start is None:
        raise EvidenceError(
            "got weights; expected a factor delta, as the others send and as can be read without"
            " the round's global LoRA"
        )
    return factor_delta(update.adapter, start)


def _in_round(update: ClientUpdate, screening: Screening) -> ClientUpdate:
    """The update with steps that know the round's global LoRA, where they are counted from it."""
    start = screening.start
    if start is None or not screening.trajectory:
        return update
    return replace(update, steps=tuple(step.since(start) for step in update.steps))


def _expected_layout(start: Adapter | None, deltas: Sequence[Adapter]) -> Layout | None:
    """The layout of the global LoRA.

    Without one, the most frequent layout, so that a lone oddity is the one refused.
    """
    if start is not None:
        of_start = Layout.of(start)
        return Layout(of_start.slots, of_start.scalings, "factor_delta")
    layouts = [Layout.of(delta) for delta in deltas]
    if not layouts:
        return None
    keys = [(layout.kind, layout.slots, tuple(layout.scalings.items())) for layout in layouts]
    return layouts[keys.index(Counter(keys).most_common(1)[0][0])]


def _check_tensors(
    update: ClientUpdate, delta: Adapter, expected: Layout | None, screening: Screening
) -> Checked:
    """Shapes before numbers: nothing is read of an update that is too large or looks wrong."""
    if expected is None:
        raise EvidenceError("no layout to compare with")
    extra = delta.keys() - expected.scalings.keys()
    if extra:
        raise EvidenceError(
            f"the update changes {len(extra)} modules that are not in the global LoRA, first"
            f" {min(extra)!r}"
        )
    expected.check(delta)
    if len(update.steps) > screening.max_steps:
        raise EvidenceError(
            f"got {len(update.steps)} steps of evidence; expected at most {screening.max_steps}"
        )
    numbers = np.asarray(pack(delta, expected)[0])
    digest = _digest(numbers)
    norm = _norm(numbers)
    count = int(update.num_examples)
    if screening.featurizer is None:
        return Checked(count, delta, digest, norm, ())
    of_evidence = _check_evidence(update.steps, delta, screening, screening.featurizer)
    return Checked(count, delta, digest, norm, tuple(update.steps), of_evidence)


def _check_evidence(
    steps: Sequence[Adapter], delta: Adapter, screening: Screening, featurizer: Featurizer
) -> bytes | None:
    """Whether the update and its steps can be read and say something; the digest of the steps."""
    reading = screening.reading
    featurizer.check(reading(delta))
    if not _read(delta, delta, featurizer).any():
        raise EvidenceError(
            "nothing that the probe reads has changed: no evidence of innocence; expected a trained"
            " update"
        )
    norms: list[float] = []
    digests: dict[bytes, int] = {}
    whole = hashlib.blake2b()
    for index, step in enumerate(steps, start=1):
        _check_modules(step, delta, featurizer)
        featurizer.check(reading(step))
        numbers = _read(step, delta, featurizer)
        norms.append(_norm(numbers))
        whole.update(numbers.tobytes())
        former = digests.setdefault(_digest(numbers), index)
        if former != index:
            raise EvidenceError(f"step {index} repeats step {former}; expected every step once")
        if screening.trajectory and index == len(steps):
            _check_last(numbers, step, delta, featurizer)
    for index, norm in enumerate(norms, start=1):
        if norm <= SMALLEST_STEP * max(norms):
            raise EvidenceError(
                f"step {index} of {len(norms)} changes nothing (norm {norm:.3g}): no evidence of"
                " innocence; expected trained steps"
            )
    return whole.digest() if steps else None


def _check_modules(step: Adapter, delta: Adapter, featurizer: Featurizer) -> None:
    unknown = step.keys() - delta.keys()
    if unknown:
        raise EvidenceError(
            f"a step changes modules that the update does not, first {min(unknown)!r}"
        )
    # Any module will do for a pooled recipe, so a client could leave out the telling ones.
    if featurizer.recipe.any_modules and len(step) < len(delta):
        raise EvidenceError(
            f"a step holds {len(step)} of the update's {len(delta)} modules; expected all of them,"
            " the probe reads them all"
        )


def _read(step: Adapter, delta: Adapter, featurizer: Featurizer) -> Numbers:
    """The numbers of a step that a probe may read, (m,), checked to be finite and of the update's
    shapes.
    """
    Layout.of(delta, step.keys(), featurizer.recipe.factors).check(step)
    return np.asarray(flattened(step, _slots(step, featurizer)))


def _slots(step: Adapter, featurizer: Featurizer) -> tuple[Slot, ...]:
    """What is read of a step: of an update only the probed modules, where the recipe names them."""
    recipe, layout = featurizer.recipe, featurizer.layout
    is_named = layout.scalings.keys() <= step.keys() and not recipe.any_modules
    modules = layout.scalings.keys() if is_named else step.keys()
    return Layout.of(step, modules, recipe.factors).slots


def _check_last(claimed: Numbers, last: Adapter, delta: Adapter, featurizer: Featurizer) -> None:
    sent = np.asarray(flattened(delta, _slots(last, featurizer)), np.float64)
    apart = float(np.linalg.norm(claimed - sent))
    length = float(np.linalg.norm(sent))
    if apart > STEP_TOLERANCE * length:
        raise EvidenceError(
            f"the last step is not the submitted update: they differ by {apart:.3g} where the"
            f" update has norm {length:.3g}"
        )


def _copies(checked: Mapping[str, Checked]) -> dict[str, list[str]]:
    """Clients whose update or evidence is byte for byte that of another, with those others.

    Who copied cannot be known.
    """
    owners: dict[bytes, list[str]] = {}
    for client, update in checked.items():
        owners.setdefault(b"update" + update.digest, []).append(client)
        if update.evidence_digest is not None:
            owners.setdefault(b"steps" + update.evidence_digest, []).append(client)
    copies: dict[str, list[str]] = {}
    for clients in owners.values():
        for client in clients if len(clients) > 1 else ():
            copies[client] = [other for other in clients if other != client]
    return copies


def _digest(numbers: Numbers) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(numbers).tobytes()).digest()


def _norm(numbers: Numbers) -> float:
    return math.sqrt(np.einsum("p,p->", numbers, numbers, dtype=np.float64))


def reason(error: Exception) -> str:
    """What a record says of an error: its type and message, cut."""
    return f"{type(error).__name__}: {error}"[:LONGEST_REASON]
