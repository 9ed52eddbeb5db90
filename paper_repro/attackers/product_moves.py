"""What attackers make of an adapter whose product B A is read, and a probe that they know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loraprobe import Adapter, Probe
from loraprobe.adapters.pair import LoRAPair
from loraprobe.heads import LinearHead

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
        bases, head = self.probe.featurizer.bases, self.probe.head
        if bases is None or not isinstance(head, LinearHead):
            raise TypeError(f"expected a linear probe of products; got {self.probe!r}")
        self.head = head
        widths = bases.widths(self.probe.featurizer.recipe.features)
        ends = np.cumsum(list(widths.values()))
        self.blocks = {
            module: (
                torch.from_numpy(bases.left[module].astype(np.float64)),
                torch.from_numpy(bases.right[module].astype(np.float64)),
                torch.from_numpy(bases.center[end - widths[module] : end].astype(np.float64)),
                torch.from_numpy(head.coef[end - widths[module] : end].astype(np.float64)),
            )
            for module, end in zip(widths, ends, strict=True)
        }

    def scores(self, adapters: Sequence[Adapter]) -> np.ndarray:
        """P(malicious), (n,)."""
        return np.asarray(self.probe(list(adapters)), np.float64)

    def logit(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Of module -> (scaled B, A)."""
        total = torch.full((), float(self.head.intercept), dtype=torch.float64)
        for module, (B, A) in factors.items():
            if module not in self.blocks:
                continue
            left, right, center, coef = self.blocks[module]
            norm = ((B.T @ B) * (A @ A.T)).sum().sqrt()
            seen = left.T @ B / norm
            gram = seen @ (A @ A.T) @ seen.T
            rows, columns = torch.triu_indices(len(gram), len(gram))
            scale = torch.where(rows == columns, 1.0, 2**0.5).double()
            values = torch.cat([(seen @ (A @ right)).reshape(-1), gram[rows, columns] * scale])
            total = total + (values - center) @ coef
        return total

    def logit_of(self, adapter: Adapter) -> float:
        """Of an adapter."""
        return float(self.logit(_factors(adapter)))

    def evaded(self, adapter: Adapter, aim: float) -> Adapter:
        """Newton steps along the gradient with respect to all factors until the logit is `aim`."""
        factors = _factors(adapter)
        leaves = [t.requires_grad_() for pair in factors.values() for t in pair]
        for _ in range(60):
            gap = self.logit(factors) - aim
            excess = float(gap.detach())
            if excess <= 0.01:
                break
            grads = torch.autograd.grad(gap, leaves, allow_unused=True)
            known = [
                torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)
            ]
            size = sum(float((g * g).sum()) for g in known)
            with torch.no_grad():
                for leaf, grad in zip(leaves, known, strict=True):
                    leaf -= 0.5 * excess / size * grad
        pairs = {
            name: LoRAPair(
                A.detach().numpy().astype(np.float32), B.detach().numpy().astype(np.float32)
            )
            for name, (B, A) in factors.items()
        }
        return Adapter(pairs, base_model=adapter.base_model)


def _factors(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        name: (
            torch.from_numpy(pair.scaling * np.asarray(pair.B, np.float64)),
            torch.from_numpy(np.asarray(pair.A, np.float64).copy()),
        )
        for name, pair in adapter.items()
    }
