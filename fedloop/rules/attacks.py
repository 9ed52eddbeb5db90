"""Attacks on updates: what Byzantine clients send, made from what the honest ones send.

Every attack is called alike, ``(honest (h, d), n_byzantine, *, rng, **parameters) -> (n_byzantine,
d)``, and works on deltas. The arithmetic is float64. What comes back is of the kind that `honest`
was: a NumPy array or a torch tensor (on its device), of its floating-point type; float64 for
anything else. Only "gaussian" draws from `rng`.

The attacker is omniscient: it knows every honest update of the round. Attacks on data are in
    fedloop.data.examples.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import AggregationError

Array = TypeVar("Array", NDArray[Any], torch.Tensor)
Attack = Callable[..., Any]


def sign_flip(
    honest: Array, n_byzantine: int, *, rng: np.random.Generator | None = None, scale: float = 1.0
) -> Array:
    """Every attacker sends -scale × the mean of the honest updates.

    Raises:
        AggregationError: updates or parameters that are not valid (so for every attack here).

    Source: Allen-Zhu et al. 2021 (arXiv:2012.14368); agrees with ByzFL's SignFlipping at scale 1.
    """
    x, n = _matrix(honest, "honest"), _count(n_byzantine)
    return _like(honest, _copies(-_number(scale, "scale") * x.mean(axis=0), n))


def scaling(
    honest: Array,
    n_byzantine: int,
    *,
    rng: np.random.Generator | None = None,
    factor: float = 10.0,
    own: NDArray[Any] | torch.Tensor | None = None,
) -> Array:
    """Every attacker sends factor × its own update.

    Args:
        own: (n_byzantine, d), what the attackers trained; without it, the mean of the honest
            updates stands in.

    Source: model replacement, Bagdasaryan et al. 2020 (arXiv:1807.00459), Eq. 3.
    """
    x, n = _matrix(honest, "honest"), _count(n_byzantine)
    return _like(honest, _number(factor, "factor") * _own(own, x, n, x.mean(axis=0)))


def gaussian(
    honest: Array,
    n_byzantine: int,
    *,
    rng: np.random.Generator | None = None,
    std: float | None = None,
) -> Array:
    """Every attacker sends independent noise, normal with mean 0.

    Args:
        std: deviation of a coordinate; without it, the root mean square of the honest coordinates,
            so that the noise is about as long as an honest update.

    Source: Blanchard et al. 2017 (arXiv:1703.02757), section 5, there with a deviation of 200.
    """
    x, n = _matrix(honest, "honest"), _count(n_byzantine)
    if not isinstance(rng, np.random.Generator):
        raise AggregationError(
            f"got rng {rng!r}; expected a numpy.random.Generator: this attack is random"
        )
    deviation = math.sqrt(np.mean(x * x)) if std is None else _number(std, "std")
    if deviation < 0:
        raise AggregationError(f"got std {std}; expected 0 or more")
    return _like(honest, rng.normal(0.0, deviation, (n, x.shape[1])))


def ipm(
    honest: Array, n_byzantine: int, *, rng: np.random.Generator | None = None, tau: float = 2.0
) -> Array:
    """Inner-product manipulation: every attacker sends -tau × the mean of the honest updates.

    A small tau hides among the honest updates; the plain mean turns round when n_byzantine × tau >
    h.

    Source: Xie et al. 2020 (arXiv:1903.03936); agrees with ByzFL's InnerProductManipulation.
    """
    return sign_flip(honest, n_byzantine, rng=rng, scale=_number(tau, "tau"))


def alie(
    honest: Array,
    n_byzantine: int,
    *,
    rng: np.random.Generator | None = None,
    z: float | None = None,
    tau: float | None = None,
) -> Array:
    """A little is enough: every attacker sends mean + z × deviation of the honest updates,
    coordinate by coordinate.

    The deviation is the sample's (divided by h - 1), so there have to be two honest updates.

    Args:
        z: how many deviations; without it `alie_z` of h + n_byzantine clients.
        tau: another name of z, ByzFL's; give one of the two.

    Source: Baruch et al. 2019 (arXiv:1902.06156), Algorithm 3; agrees with ByzFL's ALittleIsEnough.
    """
    x, n = _matrix(honest, "honest"), _count(n_byzantine)
    if len(x) < 2:
        raise AggregationError(
            f"got {len(x)} honest update; expected at least 2, or they have no deviation"
        )
    if z is not None and tau is not None:
        raise AggregationError(f"got both z {z} and tau {tau}; they are one parameter, give one")
    given = tau if z is None else z
    deviations = alie_z(len(x) + n, n) if given is None else _number(given, "z")
    return _like(honest, _copies(x.mean(axis=0) + deviations * x.std(axis=0, ddof=1), n))


def alie_z(n: int, n_byzantine: int) -> float:
    """The z up to which enough honest updates lie farther out than the attackers' to make a
    majority with them.

    z with Φ(z) = (n - m - s) / (n - m) for n clients, m of them attackers, and s = ⌊n/2 + 1⌋ - m.
    It is negative
    where s is more than half of the honest: then the attackers come to lie on the other side of the
        mean.

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


def mimic(
    honest: Array,
    n_byzantine: int,
    *,
    rng: np.random.Generator | None = None,
    index: int | None = None,
    direction: NDArray[Any] | torch.Tensor | None = None,
) -> Array:
    """Every attacker copies one honest client, so that its data count for more than they should.

    Args:
        index: which; attackers keep to one client over rounds by passing what they chose at first.
        direction: (d,), `warm_up_direction` of the rounds seen so far; the client with the largest
            |projection| on it is chosen, the first of equals. Without it and without index, the
            direction of this round's updates.

    Source: Karimireddy et al. 2022 (arXiv:2006.09365), section 4.2 and appendix; exact where their
    code follows the direction with Oja's rule, and with |projection| as the sign of a direction is
    arbitrary.
    """
    x, n = _matrix(honest, "honest"), _count(n_byzantine)
    if index is not None and direction is not None:
        raise AggregationError(
            "got both index and direction; expected one of them: the direction only serves to find"
            " the index"
        )
    if index is None:
        z = _unit_direction(x) if direction is None else _row(direction, "direction", x.shape[1])
        chosen = int(np.argmax(np.abs(x @ z)))
    else:
        chosen = _whole(index, "index")
    if not 0 <= chosen < len(x):
        raise AggregationError(
            f"got index {index}; expected the row of one of the {len(x)} honest updates"
        )
    return _like(honest, _copies(x[chosen], n))


def warm_up_direction(history: Array) -> Array:
    """The unit vector along which honest updates vary most, (d,).

    The first principal axis of `history`.

    Args:
        history: (rounds × h, d), the honest updates of all rounds so far below one another.

    Returns:
        the direction, its sign arbitrary; the zero vector if all updates are equal.

    Source: Karimireddy et al. 2022 (arXiv:2006.09365), appendix on the mimic attack.
    """
    return _like(history, _unit_direction(_matrix(history, "history")))


def probe_evasion(
    honest: Array,
    n_byzantine: int,
    *,
    rng: np.random.Generator | None = None,
    own: NDArray[Any] | torch.Tensor | None = None,
    direction: NDArray[Any] | torch.Tensor | None = None,
    target: float | None = None,
    max_norm: float | None = None,
) -> Array:
    """Attackers who know a linear probe send their own updates, moved as little as needed to look
    harmless to it.

    Args:
        own: (n_byzantine, d), what the attackers trained; without it, the negated mean of the
            honest updates stands in.
        direction: (d,), the probe's weights in the space of the updates, of any length. Without it
            the attackers
            guess it: the mean of their own updates minus the mean of the honest ones.
        target: signed length along the direction that `evade` moves every update to; without it,
            the honest updates' mean one. A score on L2-normalised updates does not see the scale:
            aim at 0 there.
        max_norm: no update is sent that is longer (L2).

    Source: this project; see `evade` for what is guaranteed.
    """
    x, n = _matrix(honest, "honest"), _count(n_byzantine)
    mean = x.mean(axis=0)
    sent = _own(own, x, n, -mean)
    w = sent.mean(axis=0) - mean if direction is None else _row(direction, "direction", x.shape[1])
    aim = float(mean @ _unit(w)) if target is None else _number(target, "target")
    return _like(honest, np.stack([evade(row, w, aim, max_norm) for row in sent]))


def evade(
    update: Array,
    direction: NDArray[Any] | torch.Tensor,
    target: float = 0.0,
    max_norm: float | None = None,
) -> Array:
    """The vector nearest to an update whose signed length along a direction is `target` and whose
    norm is at most `max_norm`.

    With u = direction / ‖direction‖: what is orthogonal to u is kept, and shortened if the norm
    asks for it; the part along u is replaced by target × u. A score sigmoid(w·x + c) becomes
    sigmoid(target × ‖w‖ + c).

    Args:
        update: (d,).
        direction: (d,), of any length but 0.
        target: the signed length, x·u, to end up with.
        max_norm: bound on the L2 norm of the result, at least |target|; None for no bound.

    Raises:
        AggregationError: the direction is zero, shapes differ, something is not finite, or max_norm
            < |target|.

    Source: orthogonal projection on the intersection of a hyperplane and a ball.
    """
    x = _row(update, "update")
    u = _unit(_row(direction, "direction", len(x)))
    aim = _number(target, "target")
    rest = x - (x @ u) * u
    rest -= (
        rest @ u
    ) * u  # once more: the first subtraction leaves a rounding error of the size of x·u
    if max_norm is not None:
        bound = _number(max_norm, "max_norm")
        if bound < abs(aim):
            raise AggregationError(
                f"got max_norm {bound} and target {aim}; expected a max_norm of at least |target|,"
                " or no update fulfils both"
            )
        length, room = float(np.linalg.norm(rest)), math.sqrt((bound - aim) * (bound + aim))
        if length > room:
            rest *= room / length
    return _like(update, aim * u + rest)


ATTACKS: dict[str, Attack] = {
    "sign_flip": sign_flip,
    "scaling": scaling,
    "gaussian": gaussian,
    "ipm": ipm,
    "alie": alie,
    "mimic": mimic,
    "probe_evasion": probe_evasion,
}


def attack(name: str) -> Attack:
    """The attack of this name.

    Raises:
        AggregationError: there is none; the message lists the names there are.
    """
    if name not in ATTACKS:
        raise AggregationError(f"got attack {name!r}; expected one of {', '.join(ATTACKS)}")
    return ATTACKS[name]


# --- checks and conversions
# -------------------------------------------------------------------------------------------


def _array(values: Any, name: str, form: str, ndim: int) -> NDArray[np.float64]:
    """A float64 array of this many dimensions, none of them empty, and everything in it finite."""
    given = (
        values.detach().to("cpu", torch.float64).numpy()
        if isinstance(values, torch.Tensor)
        else values
    )
    try:
        array = np.asarray(given)
    except ValueError as error:  # rows of several lengths
        raise AggregationError(
            f"got {name} of no single shape ({error}); expected {form}"
        ) from error
    if array.dtype.kind not in "fiu" or array.ndim != ndim or array.size == 0:
        raise AggregationError(
            f"got {name} of shape {array.shape} and type {array.dtype}; expected numbers of shape"
            f" {form}, none of them empty"
        )
    if not np.isfinite(array).all():
        raise AggregationError(
            f"got {name} with NaN or infinity in it; expected finite numbers. Reject such updates"
            " first."
        )
    return array.astype(np.float64)


def _matrix(values: Any, name: str) -> NDArray[np.float64]:
    return _array(values, name, "(clients, d)", 2)


def _row(values: Any, name: str, length: int | None = None) -> NDArray[np.float64]:
    row = _array(values, name, "(d,)", 1)
    if length is not None and len(row) != length:
        raise AggregationError(
            f"got {name} of length {len(row)}; expected {length}, the length of an update"
        )
    return row


def _own(
    own: Any, honest: NDArray[np.float64], n: int, otherwise: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The attackers' own updates (n, d); n copies of another row if they are not given."""
    if own is None:
        return _copies(otherwise, n)
    rows = _matrix(own, "own")
    if rows.shape != (n, honest.shape[1]):
        raise AggregationError(
            f"got own of shape {rows.shape}; expected {(n, honest.shape[1])}: one update of each"
            " attacker"
        )
    return rows


def _whole(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError("a truth value")
        return operator.index(value)
    except TypeError as error:
        raise AggregationError(f"got {name} {value!r}; expected a whole number") from error


def _count(n_byzantine: Any) -> int:
    n = _whole(n_byzantine, "n_byzantine")
    if n < 1:
        raise AggregationError(
            f"got n_byzantine {n}; expected at least 1. Without attackers there is nothing to send."
        )
    return n


def _number(value: Any, name: str) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.integer | np.floating)
        or not math.isfinite(value)
    ):
        raise AggregationError(f"got {name} {value!r}; expected a finite number")
    return float(value)


def _copies(row: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    return np.repeat(row[None, :], n, axis=0)  # (n, d)


def _unit(direction: NDArray[np.float64]) -> NDArray[np.float64]:
    # By the largest entry first: squares of very small numbers would underflow.
    largest = np.abs(direction).max()
    if largest == 0:
        raise AggregationError(
            "got a direction of length 0; expected the weights of a probe, or own updates that"
            " differ from the honest mean"
        )
    scaled: NDArray[np.float64] = direction / largest
    return scaled / np.linalg.norm(scaled)


def _unit_direction(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first principal axis of rows, through their Gram matrix.

    D is far larger than their number.
    """
    centred = x - x.mean(axis=0)  # (n, d)
    _, vectors = np.linalg.eigh(centred @ centred.T)
    axis: NDArray[np.float64] = vectors[:, -1] @ centred
    return _unit(axis) if axis.any() else axis


def _like(given: Array, result: NDArray[np.float64]) -> Array:
    """The result as an array or tensor of the type that was given.

    What overflows on the way is an error.
    """
    if not isinstance(given, torch.Tensor):
        kind = getattr(given, "dtype", None)
        with np.errstate(over="ignore"):
            array = result.astype(kind if kind is not None and kind.kind == "f" else np.float64)
        _still_finite(bool(np.isfinite(array).all()))
        return array
    tensor = torch.from_numpy(result).to(
        given.device, given.dtype if given.is_floating_point() else torch.float64
    )
    _still_finite(bool(torch.isfinite(tensor).all()))
    return tensor


def _still_finite(finite: bool) -> None:
    if not finite:
        raise AggregationError(
            "the attack's update overflows the type of the honest updates; expected a smaller"
            " scale, factor, std, tau or z"
        )
