"""Attacks on updates: what Byzantine clients send, made from what the honest ones send.

As functions, all called alike, and as what a configuration makes, options checked:

    sent = ATTACKS["alie"](honest, n_byzantine, rng=generator, z=1.5)  # (h, d) -> (n, d)
    sent = make_attack("alie", z=1.5)(honest, n_byzantine, rng=generator)

They work on deltas, in float64. What comes back is of the kind that `honest` was: a NumPy array or
a torch tensor (on its device), of its floating-point type; float64 for anything else. Only
"gaussian" draws from `rng`. "scaling", "collusion" and "probe_evasion" take what the attackers
trained as `own` (n_byzantine, d), and "probe_evasion" the probe's `direction` (d,).

The attacker is omniscient: it knows every honest update of the round. Attacks on data are in
fedloop.data.clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..checks import Validity, is_integer, named
from ..errors import AggregationError, OptionError
from .evasion import evade
from .scene import VALID, AttackOptions, Scene, copies, own_or
from .updates import Array, Floats, as_given, checked_array, checked_row, unit


@dataclass(frozen=True)
class SignFlip(AttackOptions):
    """Every attacker sends -scale × the mean of the honest updates.

    Source: Allen-Zhu et al. 2021 (arXiv:2012.14368); agrees with ByzFL's SignFlipping at scale 1.
    """

    scale: float = 1.0

    def send(self, scene: Scene) -> Floats:
        """(n, d), what the attackers send."""
        return copies(-self.scale * scene.honest.mean(axis=0), scene.attackers)


@dataclass(frozen=True)
class Scaling(AttackOptions):
    """Every attacker sends factor × its own update, or × the honest mean if it has none.

    Source: model replacement, Bagdasaryan et al. 2020 (arXiv:1807.00459), Eq. 3.
    """

    factor: float = 10.0

    def send(self, scene: Scene) -> Floats:
        """(n, d), what the attackers send."""
        return self.factor * own_or(scene, scene.honest.mean(axis=0))


@dataclass(frozen=True)
class Gaussian(AttackOptions):
    """Every attacker sends independent noise, normal with mean 0.

    Attributes:
        std: deviation of a coordinate; None for the root mean square of the honest coordinates, so
            that the noise is about as long as an honest update.

    Source: Blanchard et al. 2017 (arXiv:1703.02757), section 5, there with a deviation of 200.
    """

    std: float | None = None

    def send(self, scene: Scene) -> Floats:
        """(n, d), what the attackers send.

        Raises:
            AggregationError: there is no generator.
        """
        if not isinstance(scene.rng, np.random.Generator):
            raise AggregationError(
                f"got rng {scene.rng!r}; expected a numpy.random.Generator: this attack is random"
            )
        typical = math.sqrt(np.mean(scene.honest * scene.honest))
        std = typical if self.std is None else self.std
        return scene.rng.normal(0.0, std, (scene.attackers, scene.honest.shape[1]))


@dataclass(frozen=True)
class IPM(AttackOptions):
    """Inner-product manipulation: every attacker sends -tau × the mean of the honest updates.

    A small tau hides among the honest updates; the plain mean turns round when
    n_byzantine × tau > h.

    Source: Xie et al. 2020 (arXiv:1903.03936); agrees with ByzFL's InnerProductManipulation.
    """

    tau: float = 2.0

    def send(self, scene: Scene) -> Floats:
        """(n, d), what the attackers send."""
        return copies(-self.tau * scene.honest.mean(axis=0), scene.attackers)


@dataclass(frozen=True)
class ALIE(AttackOptions):
    """A little is enough: every attacker sends mean + z × deviation of the honest updates.

    Coordinate by coordinate. The deviation is the sample's (divided by h - 1), so there have to be
    two honest updates.

    Attributes:
        z: how many deviations; None for `alie_z` of h + n clients.
        tau: ByzFL's name of z; give one of the two.

    Source: Baruch et al. 2019 (arXiv:1902.06156), Algorithm 3; agrees with ByzFL's ALittleIsEnough.
    """

    z: float | None = None
    tau: float | None = None
    valid: ClassVar[Mapping[str, Validity]] = {**VALID, "tau": VALID["z"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.z is not None and self.tau is not None:
            raise OptionError(
                f"got both z {self.z} and tau {self.tau}; they are one parameter, give one"
            )

    def send(self, scene: Scene) -> Floats:
        """(n, d), what the attackers send.

        Raises:
            AggregationError: there is one honest update, or no z of this round.
        """
        x = scene.honest
        if len(x) < 2:
            raise AggregationError(
                f"got {len(x)} honest update; expected at least 2, or they have no deviation"
            )
        z = self.tau if self.z is None else self.z
        if z is None:
            z = alie_z(len(x) + scene.attackers, scene.attackers)
        return copies(x.mean(axis=0) + z * x.std(axis=0, ddof=1), scene.attackers)


def alie_z(n: int, n_byzantine: int) -> float:
    """The z up to which attackers find enough honest updates farther out to make a majority.

    z with Φ(z) = (n - m - s) / (n - m) for n clients, m of them attackers, and s = ⌊n/2 + 1⌋ - m.
    It is negative where s is more than half of the honest: then the attackers come to lie on the
    other side of the mean.

    Raises:
        AggregationError: the formula has no value: the attackers are a majority, or would need
            every honest client.

    Source: Baruch et al. 2019 (arXiv:1902.06156), in the form in which Karimireddy et al. 2022 and
        others implement it.
    """
    honest = n - n_byzantine
    needed = n // 2 + 1 - n_byzantine
    if not 0 < needed < honest:
        raise AggregationError(
            f"got {n_byzantine} attackers among {n} clients; z has a value if they need between 1"
            f" and {honest - 1} honest clients for a majority, and they need {needed}. Give z."
        )
    return NormalDist().inv_cdf((honest - needed) / honest)


@dataclass(frozen=True)
class Mimic(AttackOptions):
    """Every attacker copies one honest client, so that its data count for more than they should.

    Attributes:
        index: which; None for the client with the largest |projection| on the direction along which
            this round's honest updates vary most, the first of equals.

    Source: Karimireddy et al. 2022 (arXiv:2006.09365), section 4.2 and appendix, without the
        warm-up over rounds; exact where their code follows the direction with Oja's rule, and with
        |projection| as the sign of a direction is arbitrary.
    """

    index: int | None = None

    def send(self, scene: Scene) -> Floats:
        """(n, d), what the attackers send.

        Raises:
            AggregationError: there is no honest client of this index.
        """
        x = scene.honest
        chosen = self.index
        if chosen is None:
            chosen = int(np.argmax(np.abs(x @ _main_direction(x))))
        if chosen >= len(x):
            raise AggregationError(
                f"got index {self.index}; expected the row of one of the {len(x)} honest updates"
            )
        return copies(x[chosen], scene.attackers)


@dataclass(frozen=True)
class ProbeEvasion(AttackOptions):
    """Attackers who know a linear probe move their own updates as little as hides them from it.

    What they trained is `Scene.own`, without it the negated mean of the honest updates. Without
    `Scene.direction` they guess the probe's: the mean of their own updates minus that of the honest
    ones.

    Attributes:
        target: signed length along the direction that `evade` moves every update to; None for the
            honest updates' mean one. A score on L2-normalised updates does not see the scale: aim
            at 0 there.
        max_norm: no update is sent that is longer (L2).

    Source: this project; see `evade` for what is guaranteed.
    """

    target: float | None = None
    max_norm: float | None = None

    def send(self, scene: Scene) -> Floats:
        """(n, d), what the attackers send."""
        mean = scene.honest.mean(axis=0)
        own = own_or(scene, -mean)
        direction = own.mean(axis=0) - mean if scene.direction is None else scene.direction
        target = float(mean @ unit(direction)) if self.target is None else self.target
        return np.stack([evade(row, direction, target, self.max_norm) for row in own])


@dataclass(frozen=True)
class Collusion(AttackOptions):
    """Every attacker hides what it trained under a benign change; over all of them these cancel.

    What the server averages holds the whole of `Scene.own`, and no single update shows it. The
    covers are differences of honest updates, round the circle of attackers.

    Attributes:
        times: length of a cover, in mean lengths of what the attackers trained.

    Source: this project; hiding in parts as in colluding backdoors.
    """

    times: float = 4.0

    def send(self, scene: Scene) -> Floats:
        """(n, d), what the attackers send.

        Raises:
            AggregationError: there is one attacker, or no two honest updates that differ.
        """
        if scene.attackers < 2:
            raise AggregationError("got 1 attacker; expected at least 2, or covers do not cancel")
        shown = scene.honest[np.arange(scene.attackers) % len(scene.honest)]
        covers = shown - np.roll(shown, -1, axis=0)
        size = float(np.linalg.norm(covers, axis=1).mean())
        if size == 0:
            raise AggregationError(
                "got honest updates that are all equal; expected two that differ, to hide under"
            )
        own = own_or(scene, -scene.honest.mean(axis=0))
        return own + self.times * float(np.linalg.norm(own, axis=1).mean()) / size * covers


Options = SignFlip | Scaling | Gaussian | IPM | ALIE | Mimic | ProbeEvasion | Collusion

KINDS: Mapping[str, type[Options]] = {
    "sign_flip": SignFlip,
    "scaling": Scaling,
    "gaussian": Gaussian,
    "ipm": IPM,
    "alie": ALIE,
    "mimic": Mimic,
    "probe_evasion": ProbeEvasion,
    "collusion": Collusion,
}


@dataclass(frozen=True)
class Attack:
    """An attack with its options, checked; `make_attack` makes one.

    Attributes:
        name: in KINDS.
    """

    name: str
    options: Options

    def __call__(
        self,
        honest: Array,
        n_byzantine: int,
        *,
        rng: np.random.Generator | None = None,
        own: NDArray[Any] | torch.Tensor | None = None,
        direction: NDArray[Any] | torch.Tensor | None = None,
    ) -> Array:
        """What the attackers send, (n_byzantine, d).

        Args:
            honest: (h, d), what the honest clients send.
            rng: see `Scene`.
            own: likewise.
            direction: likewise.

        Raises:
            AggregationError: updates that are not finite numbers of these shapes, or so few that
                the attack cannot be made.
        """
        x = checked_array(honest, "honest", "(clients, d)", 2)
        if not is_integer(n_byzantine, 1):
            raise AggregationError(
                f"got n_byzantine {n_byzantine!r}; expected at least 1. Without attackers there is"
                " nothing to send."
            )
        scene = Scene(
            x,
            int(n_byzantine),
            rng,
            None if own is None else _own(own, (int(n_byzantine), x.shape[1])),
            None if direction is None else checked_row(direction, "direction", x.shape[1]),
        )
        return as_given(honest, self.options.send(scene))


def make_attack(name: str, /, **options: Any) -> Attack:
    """The attack of this name with these options, checked now.

    Raises:
        ConfigError: no such attack or option (the message lists the valid ones), or a value that is
            not valid.
    """
    return Attack(name, named("attack", name, KINDS, options, OptionError))


def _function(name: str) -> Callable[..., Any]:
    """The attack as a function of one round."""

    def send(
        honest: Any,
        n_byzantine: int,
        *,
        rng: np.random.Generator | None = None,
        own: Any = None,
        direction: Any = None,
        **options: Any,
    ) -> Any:
        attack = make_attack(name, **options)
        return attack(honest, n_byzantine, rng=rng, own=own, direction=direction)

    send.__name__ = name
    send.__doc__ = KINDS[name].__doc__
    return send


ATTACKS: Mapping[str, Callable[..., Any]] = {name: _function(name) for name in KINDS}
"""Name -> the attack as a function: (honest, n_byzantine, *, rng, own, direction, **options)."""


def _own(own: Any, shape: tuple[int, int]) -> Floats:
    rows = checked_array(own, "own", "(clients, d)", 2)
    if rows.shape != shape:
        raise AggregationError(
            f"got own of shape {rows.shape}; expected {shape}: one update of each attacker"
        )
    return rows


def _main_direction(x: Floats) -> Floats:
    """The first principal axis of rows, a unit vector; zero if all rows are equal.

    Through their Gram matrix: d is far larger than their number.
    """
    centred = x - x.mean(axis=0)  # (n, d)
    _, vectors = np.linalg.eigh(centred @ centred.T)
    axis: Floats = vectors[:, -1] @ centred
    return unit(axis) if axis.any() else axis
