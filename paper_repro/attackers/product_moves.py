"""What attackers make of an adapter whose product B A is read, and a probe that they know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedloop.client.evading import ProductLogit, moved_below
from loraprobe import Adapter, Probe
from loraprobe.adapters.pair import LoRAPair

from ..common.paths import FOLDER

PROBES = FOLDER.parent / "zoo" / "probes" / "smollm2-135m-safe"
Parts = list[Adapter]


def mixed(*parts: tuple[float, Adapter]) -> Adapter:
    """The weighted sum of the adapters' changes, factors side by side."""
    pairs = {}
    for name in sorted({name for _, adapter in parts for name in adapter}):
        own = [(weight, adapter[name]) for weight, adapter in parts if name in adapter]
        B = np.concatenate([w * p.scaling * np.asarray(p.B, np.float64) for w, p in own], axis=1)
        A = np.concatenate([np.asarray(p.A, np.float64) for _, p in own])
        pairs[name] = LoRAPair(A.astype(np.float32), B.astype(np.float32))
    return Adapter(pairs, base_model=parts[0][1].base_model)


def inner(one: Adapter, two: Adapter) -> float:
    """Of two changes of weights."""
    total = 0.0
    for name in one.keys() & two.keys():
        b1, a1, b2, a2 = (
            np.asarray(m, np.float64) for p in (one[name], two[name]) for m in (p.B, p.A)
        )
        total += one[name].scaling * two[name].scaling * float(np.vdot(b1.T @ b2, a1 @ a2.T))
    return total


def length(adapter: Adapter) -> float:
    """Frobenius norm of the change."""
    return float(max(inner(adapter, adapter), 0.0) ** 0.5)


@dataclass(frozen=True)
class Scene:
    """What an attacker has.

    Attributes:
        own: what it trained on poison.
        donor: a benign adapter with at least these modules, or as many of them as there is.
        known: a probe whose weights it has read.
        aim: the logit of that probe that it wants.
    """

    own: Adapter
    donor: Adapter
    known: Reader
    aim: float
    rng: np.random.Generator


def plain(scene: Scene) -> Parts:
    """What was trained."""
    return [scene.own]


def refactored(scene: Scene) -> Parts:
    """B G and G^-1 A, G drawn."""
    pairs = {}
    for name, pair in scene.own.items():
        G = scene.rng.standard_normal((pair.B.shape[1],) * 2) + 2 * np.eye(pair.B.shape[1])
        B, A = (
            np.asarray(pair.B, np.float64) @ G,
            np.linalg.solve(G, np.asarray(pair.A, np.float64)),
        )
        pairs[name] = LoRAPair(A.astype(np.float32), B.astype(np.float32), pair.scaling)
    return [Adapter(pairs, base_model=scene.own.base_model)]


def assembled(scene: Scene) -> Parts:
    """Half of the rank shows a benign B beside a hundredth of its A, the other half the reverse.

    B is that of a benign adapter to a hundredth, and so is A up to the poison's own; the product is
    the poison's and a hundredth of the donor's. After GAP, arXiv:2601.00566.
    """
    pairs = {}
    for name, pair in scene.own.items():
        B, A = pair.scaling * np.asarray(pair.B, np.float64), np.asarray(pair.A, np.float64)
        if name in scene.donor:
            shown = scene.donor[name]
            B = np.concatenate([shown.scaling * np.asarray(shown.B, np.float64), B / 100], axis=1)
            A = np.concatenate([np.asarray(shown.A, np.float64) / 100, 100 * A])
        pairs[name] = LoRAPair(A.astype(np.float32), B.astype(np.float32))
    return [Adapter(pairs, base_model=scene.own.base_model)]


def by_modules(count: int) -> Callable[[Scene], Parts]:
    """Each part: the poison of every `count`-th module, as much longer; benign elsewhere."""

    def send(scene: Scene) -> Parts:
        names = sorted(scene.own)
        parts = []
        for part in range(count):
            held = {name: scene.own[name] for name in names[part::count]}
            rest = {n: scene.donor[n] for n in names if n not in held and n in scene.donor}
            base = scene.own.base_model
            poison = (float(count), Adapter(held, base_model=base))
            parts.append(
                mixed(poison, (1.0, Adapter(rest, base_model=base))) if rest else mixed(poison)
            )
        return parts

    return send


def cancelling(times: float) -> Callable[[Scene], Parts]:
    """Two parts: the poison plus, and minus, a benign change of so many times its length."""

    def send(scene: Scene) -> Parts:
        size = times * length(scene.own) / length(scene.donor)
        return [mixed((1.0, scene.own), (sign * size, scene.donor)) for sign in (1.0, -1.0)]

    return send


def diluted(times: float) -> Callable[[Scene], Parts]:
    """The poison plus a benign change of so many times its length; whole, so longer."""

    def send(scene: Scene) -> Parts:
        size = times * length(scene.own) / length(scene.donor)
        return [mixed((1.0, scene.own), (size, scene.donor))]

    return send


def evading(scene: Scene) -> Parts:
    """The nearest factors that the known probe reads as benign as the median benign adapter."""
    return [scene.known.evaded(scene.own, scene.aim)]


class Reader:
    """A linear probe of products, as numbers and as a function with a gradient."""

    def __init__(self, name: str) -> None:
        self.probe = Probe.from_pretrained(PROBES / name)
        self.logit = ProductLogit.of(self.probe)

    def scores(self, adapters: Sequence[Adapter]) -> np.ndarray:
        """P(malicious), (n,)."""
        return np.asarray(self.probe(list(adapters)), np.float64)

    def logit_of(self, adapter: Adapter) -> float:
        """Of an adapter."""
        return float(
            self.logit(
                {
                    name: (
                        torch.from_numpy(pair.scaling * np.asarray(pair.B, np.float64)),
                        torch.from_numpy(np.asarray(pair.A, np.float64).copy()),
                    )
                    for name, pair in adapter.items()
                }
            )
        )

    def evaded(self, adapter: Adapter, aim: float) -> Adapter:
        """The nearest factors whose logit is `aim`."""
        own = Adapter(
            {
                name: LoRAPair(np.asarray(pair.A), pair.scaling * np.asarray(pair.B, np.float64))
                for name, pair in adapter.items()
            },
            base_model=adapter.base_model,
        )
        untrained = Adapter(
            {
                name: LoRAPair(np.zeros(pair.A.shape), np.zeros(pair.B.shape))
                for name, pair in own.items()
            }
        )
        return moved_below(own, untrained, self.logit, aim)
