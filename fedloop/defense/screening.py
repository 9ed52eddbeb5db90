"""What a server can check of an update before anything trusts it, and why it refuses one.

The submitted update is evidence that the server holds. Steps come out of the client's own trainer
and could be forged; what
can be checked of them is: that they are finite, of the right shape and number, nobody else's, and
that a trajectory ends in the submitted update. Source: the threat model of arXiv:2601.07177's
official code, which checks none of this.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta
from loraprobe.adapters.layout import Layout, Slot, flattened, pack
from loraprobe.featurizer import Featurizer

from ..errors import EvidenceError
from .types import ClientUpdate
from .weights import MAX_EXAMPLES

STEP_TOLERANCE = (
    2e-3  # of the norm of the update: what sending steps in half precision (bfloat16) may cost
)
LONGEST_REASON = 500  # characters: reasons quote what clients sent, and stand in every record
# Typed errors are values of ValueError. The others are what tensors raise that cannot be read or
# computed with.
UNREADABLE = (ValueError, TypeError, RuntimeError, OSError)


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


def check_updates(
    updates: Sequence[ClientUpdate],
    start: Adapter | None,
    layout: Layout | None,
    featurizer: Featurizer | None,
    *,
    trajectory: bool,
    max_steps: int,
    base_model: str | None = None,
) -> tuple[dict[str, Checked], dict[str, str]]:
    """Sort a round's updates into well-formed ones and refused ones with their reasons, by client
    id.

    Args:
        start: the round's global LoRA; needed where clients send weights.
        layout: what every update has to look like; if None, as `start`, or else as most updates do.
        featurizer: the probe's; refuses what it cannot read. None where nothing is scored.
        trajectory: whether the steps are those of this round, so that the last must be the update.
        base_model: what the probe calls the base model; an update that names another one, or
            another than `start`, is refused.

    Raises:
        EvidenceError: `start` is no weights, or every update holds weights and neither `start` nor
            `layout` was given: the caller's mistake, not a client's.
    """
    _check_start(updates, start, layout)
    bases = [
        name
        for name in (base_model, start.base_model if start is not None else None)
        if name is not None
    ]
    refused: dict[str, str] = {}
    counts = Counter(update.client_id for update in updates)
    deltas: dict[str, tuple[ClientUpdate, Adapter]] = {}
    for update in updates:
        client = update.client_id
        if counts[client] > 1:
            refused[client] = f"duplicate: {counts[client]} updates in one round; expected one"
            continue
        try:
            _check_fields(update, bases)
            deltas[client] = (_in_round(update, start, trajectory), _delta(update, start))
        except UNREADABLE as error:
            refused[client] = reason(error)
    expected = layout or _expected_layout(start, [delta for _, delta in deltas.values()])
    checked: dict[str, Checked] = {}
    for client, (update, delta) in deltas.items():
        try:
            checked[client] = _check_tensors(
                update, delta, expected, featurizer, trajectory, max_steps
            )
        except UNREADABLE as error:
            refused[client] = reason(error)
    for client, others in _copies(checked).items():
        del checked[client]
        refused[client] = (
            f"copy: the same numbers as the update or evidence of {', '.join(others)}"[
                :LONGEST_REASON
            ]
        )
    return checked, refused


def _check_start(
    updates: Sequence[ClientUpdate], start: Adapter | None, layout: Layout | None
) -> None:
    if start is not None:
        if start.kind != "weights":
            raise EvidenceError(
                f"got a start of kind {start.kind!r}; expected the round's global LoRA, of kind"
                " 'weights'"
            )
        return
    kinds = {update.adapter.kind for update in updates if isinstance(update.adapter, Adapter)}
    if kinds == {"weights"} and layout is None:
        raise EvidenceError(
            "the updates hold weights; give assess() the round's global LoRA as start=, or send"
            " factor deltas"
        )


def _check_fields(update: ClientUpdate, base_models: Sequence[str]) -> None:
    n = update.num_examples
    if isinstance(n, bool) or not isinstance(n, int):
        raise EvidenceError(
            f"got num_examples of type {type(n).__name__}; expected a whole number of at least 1"
        )
    if not 1 <= n <= MAX_EXAMPLES:
        raise EvidenceError(
            f"got num_examples {n if abs(n) <= MAX_EXAMPLES else 'beyond 2**53'}; expected a whole"
            " number from 1 to 2**53"
        )
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


def _in_round(update: ClientUpdate, start: Adapter | None, trajectory: bool) -> ClientUpdate:
    """The update with steps that know the round's global LoRA, where they are counted from it."""
    if start is None or not trajectory:
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
    update: ClientUpdate,
    delta: Adapter,
    expected: Layout | None,
    featurizer: Featurizer | None,
    trajectory: bool,
    max_steps: int,
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
    if len(update.steps) > max_steps:
        raise EvidenceError(
            f"got {len(update.steps)} steps of evidence; expected at most {max_steps}"
        )
    numbers = pack(delta, expected)[0].numpy()
    digest, norm = (
        _digest(numbers),
        math.sqrt(np.einsum("p,p->", numbers, numbers, dtype=np.float64)),
    )
    if featurizer is not None:
        featurizer.check(delta)
        evidence = [_probed(step, delta, featurizer) for step in update.steps]
        if trajectory and evidence:
            _check_last(evidence[-1], update.steps[-1], delta, featurizer)
        of_evidence = _digest(*evidence) if evidence else None
        return Checked(update.num_examples, delta, digest, norm, update.steps, of_evidence)
    return Checked(update.num_examples, delta, digest, norm, ())


def _probed(step: Adapter, delta: Adapter, featurizer: Featurizer) -> np.ndarray:
    """The numbers of a step that a probe reads, at least.

    Checked to be readable, finite and of the update's modules.
    """
    unknown = step.keys() - delta.keys()
    if unknown:
        raise EvidenceError(
            f"a step changes modules that the update does not, first {min(unknown)!r}"
        )
    if featurizer.recipe.any_modules and len(step) < len(
        delta
    ):  # any module will do for a pooled recipe, so a client could leave out the telling ones
        raise EvidenceError(
            f"a step holds {len(step)} of the update's {len(delta)} modules; expected all of them,"
            " the probe reads them all"
        )
    featurizer.check(step)
    Layout.of(delta, step.keys(), featurizer.recipe.factors).check(step)
    return flattened(step, _slots(step, featurizer))


def _slots(step: Adapter, featurizer: Featurizer) -> tuple[Slot, ...]:
    return Layout.of(step, factors=featurizer.recipe.factors).slots


def _check_last(said: np.ndarray, last: Adapter, delta: Adapter, featurizer: Featurizer) -> None:
    sent = flattened(delta, _slots(last, featurizer)).astype(np.float64)
    apart = float(np.linalg.norm(said - sent))
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
    found: dict[str, list[str]] = {}
    for clients in owners.values():
        for client in clients if len(clients) > 1 else ():
            found[client] = [other for other in clients if other != client]
    return found


def _digest(*arrays: np.ndarray) -> bytes:
    digest = hashlib.blake2b()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def reason(error: Exception) -> str:
    """What a record says of an error: its type and message, cut."""
    return f"{type(error).__name__}: {error}"[:LONGEST_REASON]
