"""Evidence added up in feature space: what a client's features are on average over its rounds.

A client that poisons a part of its data moves a little in the same direction every round, while
what its sampling adds is different every time: the mean keeps the one and loses the other. What
goes in is what the server computed itself, so there is nothing to forge beyond the update. What the
mean cannot see soon is a client that changes: one that was benign for T rounds needs about as many
to move its mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import Validity, boolean, check_fields, integer, or_none
from ..errors import EvidenceError, StateError

Features = NDArray[np.float64]
State = dict[str, dict[str, Any]]

MIN_COHORT = 3  # clients of a round below which their median says nothing about the benign ones

_VALID: Mapping[str, Validity] = {
    **dict.fromkeys(("normalize", "relative"), boolean()),
    "sketch": or_none(integer(1)),
    "seed": integer(0),
}


@dataclass(frozen=True)
class FeatureMean:
    """Per client, the running mean over rounds of its feature vectors.

    The state is `{client: {"count": int, "size": int, "mean": array}}`: rounds added, p, and
    float64 (p,), or (sketch,) where a sketch is kept. It takes 8 p bytes (8 sketch) for every
    client ever seen.

    Attributes:
        normalize: divide every returned mean by its L2 norm. Noise cancels in a mean and makes it
            short, so a head that was fitted on unit vectors, and a cut made for it, would read less
            and less into the same direction; as a unit vector the mean is scored as one update that
            was trained on all rounds' data would be.
        relative: subtract from every returned mean the coordinate-wise median of the round's means
            over its clients, so that what all of them share (the drift of the global model, an
            unknown kind of benign data that all have) drops out. Only sensible where more than half
            of a round is benign: otherwise the median is the attackers'. With fewer than three
            clients nothing is subtracted.
        sketch: keep a CountSketch of this many numbers for each client in place of its p; None
            keeps all. The returned means are then unbiased estimates: a coordinate is off by about
            norm / sqrt(sketch), and so is the dot product with a fixed vector, times that vector's
            norm. A nonlinear head sees noise.
        seed: of the sketch's hashes. The same for every client and round, or they would not add up.

    Source: this project; the sketch: Charikar, Chen, Farach-Colton, Finding frequent items in data
        streams, 2002.
    """

    normalize: bool = True
    relative: bool = False
    sketch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, _VALID)

    def init(self) -> State:
        """The state before the first round: no client has been seen."""
        return {}

    def add(
        self, state: State, features: Mapping[str, ArrayLike]
    ) -> tuple[dict[str, Features], State]:
        """Add one round.

        Args:
            state: of the last round; it is not changed.
            features: client -> (p,), the clients of this round that have evidence, normalised by
                the featurizer.

        Returns:
            client -> (p,) float64, the mean over this client's rounds, this one included, for the
            clients of `features`, read-only; if `normalize` of L2 norm 1, in a sketch the sketch is
            (a mean of zero stays zero). And the new state.

        Raises:
            EvidenceError: a vector is not (p,) with the p of the others and of the rounds before,
                or not finite.
            StateError: the state was written with another `sketch`.
        """
        vectors = checked_vectors(
            features, "features", "(p,) finite numbers, reject the update first"
        )
        _check_sizes(vectors, state)
        if not vectors:
            return {}, dict(state)
        size = next(iter(vectors.values())).size
        hashes = None if self.sketch is None else _hashes(size, self.sketch, self.seed)
        new = {
            client: self._added(client, state.get(client), vectors[client], hashes)
            for client in sorted(vectors)
        }
        means: dict[str, Features] = {client: entry["mean"] for client, entry in new.items()}
        if self.relative and len(means) >= MIN_COHORT:
            # Exact in the sketch too: the median of -x is minus the median of x.
            median = np.median(np.stack(list(means.values())), axis=0)
            means = {client: _frozen(mean - median) for client, mean in means.items()}
        if self.normalize:
            # Before a sketch is undone: its length is that of the mean, whereas the estimate's is
            # mostly noise.
            means = {
                client: _frozen(mean / (np.linalg.norm(mean) or 1.0))
                for client, mean in means.items()
            }
        if hashes is not None:
            bucket, sign = hashes
            means = {client: _frozen(sign * mean[bucket]) for client, mean in means.items()}
        return means, {**state, **new}

    def _added(
        self,
        client: str,
        entry: Mapping[str, Any] | None,
        vector: Features,
        hashes: tuple[NDArray[Any], NDArray[Any]] | None,
    ) -> dict[str, Any]:
        term = vector
        if hashes is not None:
            bucket, sign = hashes
            term = np.bincount(bucket, vector * sign, self.sketch or 0).astype(np.float64)
        if entry is None:
            return {"count": 1, "size": vector.size, "mean": _frozen(term)}
        mean = entry["mean"]
        count = entry["count"] + 1
        if mean.shape != term.shape:
            raise StateError(
                f"client {client!r}: its kept mean has shape {mean.shape}; expected {term.shape},"
                " the state was written with another sketch"
            )
        return {"count": count, "size": vector.size, "mean": _frozen(mean + (term - mean) / count)}


def _hashes(size: int, sketch: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Bucket and sign of every coordinate, both (p,)."""
    rng = np.random.default_rng(seed)
    return rng.integers(sketch, size=size), rng.choice(np.array([-1.0, 1.0]), size=size)


def checked_vectors(
    arrays: Mapping[str, ArrayLike], what: str, expected: str
) -> dict[str, Features]:
    """Client -> a float64 copy of its 1-D array, in the order of the clients' ids.

    Raises:
        EvidenceError: an array is not numeric, 1-D, non-empty and finite; the message names the
            client.
    """
    vectors: dict[str, Features] = {}
    for client in sorted(arrays):
        try:
            vector = np.asarray(arrays[client])
        except (ValueError, TypeError) as error:
            raise EvidenceError(
                f"client {client!r}: got {what} that are no array ({error}); expected {expected}"
            ) from error
        if vector.ndim != 1 or vector.size == 0 or vector.dtype.kind not in "fiu":
            raise EvidenceError(
                f"client {client!r}: got {what} of shape {vector.shape} and type {vector.dtype};"
                f" expected {expected}"
            )
        vectors[client] = vector.astype(np.float64)
        if not np.isfinite(vectors[client]).all():
            raise EvidenceError(
                f"client {client!r}: got {what} that are not finite; expected {expected}"
            )
    return vectors


def _check_sizes(vectors: Mapping[str, Features], state: State) -> None:
    sizes = {entry["size"] for entry in state.values()}
    for client, vector in vectors.items():
        if sizes - {vector.size}:
            raise EvidenceError(
                f"client {client!r}: got {vector.size} features; expected {max(sizes)} as before,"
                " from one featurizer"
            )
        sizes = {vector.size}


def _frozen(array: Features) -> Features:
    """Read-only: a returned mean may share memory with the state."""
    array.setflags(write=False)
    return array
