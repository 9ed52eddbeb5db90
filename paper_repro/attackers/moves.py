"""Attacks as functions of arrays.

What attackers send, from what they and the honest clients of the round trained.

Every move is called alike, ``(view, strength) -> (m, d)``. The attackers know the round's honest
updates and the global LoRA; what else a move knows (the published probe, a probe of the attackers'
own) its docstring says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loraprobe.adapters.layout import Layout

Floats = NDArray[np.float64]


class View(Protocol):
    """What the attackers of one round can work with; rows are packed updates.

    Attributes:
        honest: (h, d), the honest updates.
        own: (m, d), what the attackers trained on their poison.
        benign: (m, d), what they would have sent from their benign data.
        through_a: (m, d), trained on poison with B frozen: its B part is zero.
        start: (d,), the round's global LoRA.
        direction: (d,), the published probe's coefficients; zero where it does not read.
        surrogate: (d,), those of a probe that the attackers fitted on recordings of their own.
        seed: of what the attackers agreed on before the first round.
    """

    honest: Floats
    own: Floats
    benign: Floats
    through_a: Floats
    start: Floats
    direction: Floats
    surrogate: Floats
    layout: Layout
    seed: int


Move = Callable[[View, float], Floats]


def unchanged(view: View, strength: float) -> Floats:
    """What was trained on the poison."""
    return view.own


def rescaled(view: View, strength: float) -> Floats:
    """The trained update at `strength` times the honest median norm; 1 is norm matching."""
    return strength * _median_norm(view) * _units(view.own)


def rotated(view: View, strength: float) -> Floats:
    """B G and G^-1 A with an orthogonal G that turns by up to `strength` radians.

    Every product B A stays as it was.
    """
    rng = np.random.default_rng(view.seed)
    noise = rng.normal(size=(_rank(view), _rank(view)))
    values, vectors = np.linalg.eigh(1j * (noise - noise.T))
    turn = (vectors * np.exp(-1j * strength * values / np.abs(values).max())) @ vectors.conj().T
    return _refactored(view, turn.real)


def unbalanced(view: View, strength: float) -> Floats:
    """`strength` B and A / `strength`: every product B A stays as it was."""
    return _refactored(view, strength * np.eye(_rank(view)))


def mimicry(view: View, strength: float) -> Floats:
    """The trained update moved towards the honest mean, by `strength` of the way."""
    return (1 - strength) * view.own + strength * view.honest.mean(axis=0)


def blended(view: View, strength: float) -> Floats:
    """As mimicry, but made longer.

    The whole poison, and as much of the honest mean as mimicry needs to look alike.
    """
    return mimicry(view, strength) / (1 - strength)


def mimicry_of_one(view: View, strength: float) -> Floats:
    """As mimicry, every attacker towards an honest client of its own."""
    targets = view.honest[np.arange(len(view.own)) % len(view.honest)]
    return (1 - strength) * view.own + strength * targets


def cancelling(view: View, strength: float) -> Floats:
    """To the B of every attacker's update noise of `strength` times B's norm, which adds up to
    nothing over the attackers.

    The noise is what they agreed on, the same in every round: a mean over rounds keeps it.
    """
    read = _is_b(view.layout)
    noise = np.random.default_rng(view.seed).normal(size=view.own.shape) * read
    noise -= noise.mean(axis=0)
    size = strength * np.linalg.norm(view.own * read, axis=1).mean()
    return (
        view.own + size * noise / np.linalg.norm(noise, axis=1).mean()
    )  # one factor for all, or the sum would not stay zero


def cancelling_matched(view: View, strength: float) -> Floats:
    """Cancelling noise, then norm matching."""
    return _median_norm(view) * _units(cancelling(view, strength))


def projected(view: View, strength: float) -> Floats:
    """The part along the published probe's coefficients taken away `strength` times, then norm
    matching; at 1 the probe sees 0.
    """
    return _median_norm(view) * _units(_without(view.own, view.direction, strength))


def projected_by_surrogate(view: View, strength: float) -> Floats:
    """As projection, along the coefficients of the attackers' own probe.

    They do not know the server's.
    """
    return _median_norm(view) * _units(_without(view.own, view.surrogate, strength))


def unread(view: View, strength: float) -> Floats:
    """Poison in A alone, `strength` times as long as trained.

    B, which the probe reads, comes from benign data.
    """
    return np.where(_is_b(view.layout), view.benign, strength * view.through_a)


@dataclass(frozen=True)
class Schedule:
    """When attackers send poison, and how much longer they make it then.

    In the other rounds they send benign updates.
    """

    rounds: tuple[int, ...]
    scale: float = 1.0


MOVES: Mapping[str, tuple[Move, tuple[float, ...]]] = {
    "projection, probe known": (projected, (0.5, 1.0, 1.5)),
    "projection, own probe": (projected_by_surrogate, (1.0, 1.5)),
    "poison in A alone": (unread, (1.0, 4.0)),
    "cancelling noise": (cancelling, (2.0, 4.0, 8.0)),
    "cancelling noise, norm matched": (cancelling_matched, (2.0, 4.0)),
    "re-factorisation: rotation": (rotated, (1.0, 2.0, 3.0)),
    "re-factorisation: imbalance": (unbalanced, (2.0,)),
    "norm matching and rescaling": (rescaled, (1.0, 2.0, 4.0)),
    "mimicry of the mean": (mimicry, (0.5, 0.75, 0.9)),
    "mimicry of one client": (mimicry_of_one, (0.75, 0.9)),
    "mimicry, made longer": (blended, (0.75, 0.9)),
}


def _median_norm(view: View) -> float:
    return float(np.median(np.linalg.norm(view.honest, axis=1)))


def _units(rows: Floats) -> Floats:
    units: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units


def _without(rows: Floats, direction: Floats, times: float) -> Floats:
    unit = direction / np.linalg.norm(direction)
    return rows - times * np.outer(rows @ unit, unit)


def _is_b(layout: Layout) -> NDArray[np.bool_]:
    return np.concatenate([np.full(slot.size, slot.factor == "B") for slot in layout.slots])


def _rank(view: View) -> int:
    return next(slot.shape[1] for slot in view.layout.slots if slot.factor == "B")


def _refactored(view: View, change: Floats) -> Floats:
    """The updates that lead to (G^-1 A, B G) where the trained ones lead to (A, B); change.

    G, (r, r).
    """
    inverse, ends = np.linalg.inv(change), np.cumsum([slot.size for slot in view.layout.slots])[:-1]
    sent = []
    for row in view.own + view.start:
        parts = [
            part.reshape(slot.shape)
            for slot, part in zip(view.layout.slots, np.split(row, ends), strict=True)
        ]
        turned = [
            part @ change if slot.factor == "B" else inverse @ part
            for slot, part in zip(view.layout.slots, parts, strict=True)
        ]
        sent.append(np.concatenate([part.ravel() for part in turned]))
    return np.stack(sent) - view.start
