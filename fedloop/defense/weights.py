"""From security factors to aggregation weights, and how many examples of a claim are counted."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import is_integer, is_number, is_share, plain
from ..errors import ConfigError, EvidenceError
from .accumulate import checked_vectors

MAX_EXAMPLES = 2**53  # up to here float64 counts exactly


def aggregation_weights(
    factors: Mapping[str, float], num_examples: Mapping[str, int], min_mean_factor: float = 0.2
) -> dict[str, float] | None:
    """Each client's share of the aggregate: n_k f_k, normalised over the round's clients.

    Args:
        factors: client -> security factor in [0, 1], for every client of the round.
        num_examples: client -> examples that count, for the same clients.
        min_mean_factor: the safety gate: below this mean factor the round is not worth aggregating.

    Returns:
        client -> weight, summing to 1; exactly 0.0 for a client of factor 0. None if the round is
        to be skipped and the global LoRA kept: mean factor < min_mean_factor, or every weight is
        zero.

    Raises:
        ConfigError: min_mean_factor is not in [0, 1].
        EvidenceError: no clients, not the same clients in both, a factor outside [0, 1] or not a
            number, or an example count that is not a positive integer.

    Source: arXiv:2601.07177, aggregation and safety gate.
    """
    if not is_share(min_mean_factor):
        raise ConfigError(f"min_mean_factor: got {min_mean_factor!r}; expected a number in [0, 1]")
    if not factors:
        raise EvidenceError(
            "got a round without clients; expected at least one factor, skip the round instead"
        )
    differ = sorted(factors.keys() ^ num_examples.keys())
    if differ:
        raise EvidenceError(
            f"factors and num_examples differ in the clients {differ}; expected both for every"
            " client of the round"
        )
    for client, factor in factors.items():
        if not is_share(factor):
            raise EvidenceError(
                f"client {client!r}: got factor {factor!r}; expected a number in [0, 1]"
            )
    examples = checked_examples(num_examples)
    # fsum is exact: the weights do not depend on the order of the clients, to the last bit.
    if math.fsum(factors.values()) / len(factors) < min_mean_factor:
        return None
    products = {client: examples[client] * float(factor) for client, factor in factors.items()}
    total = math.fsum(products.values())
    return {client: product / total for client, product in products.items()} if total > 0 else None


def counted_examples(
    claimed: Mapping[str, int],
    max_count_ratio: float | None = 3.0,
    registered: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many examples count for each client: a claim is its word, and weights grow with it.

    By default a claim counts up to floor(max_count_ratio x the round's lower median). While no more
    than half of a round's clients overstate, that is at most max_count_ratio x the largest honest
    claim; while fewer than half understate, it is at least floor(max_count_ratio x the smallest
    honest claim).

    Args:
        claimed: client -> the count that it sent.
        max_count_ratio: the cap, in medians, at least 1; None for no cap (the paper).
        registered: client -> the count that the server knows. If given, these count and no claim
            does; no cap.

    Returns:
        client -> count, for every client of `claimed`.

    Raises:
        ConfigError: max_count_ratio is not a finite number >= 1.
        EvidenceError: a claim or a registered count is not a positive integer, or a client is not
            registered: it has no count that can be trusted, so reject it before the round is
            weighed.
    """
    if max_count_ratio is not None:
        check_ratio("max_count_ratio", max_count_ratio)
    for client, count in claimed.items():
        _check_count(client, count)
    if registered is not None:
        unknown = sorted(claimed.keys() - registered.keys())
        if unknown:
            raise EvidenceError(
                f"clients {unknown} are not registered; expected a registered example count for"
                " each, reject or register them first"
            )
        return checked_examples({client: registered[client] for client in claimed})
    if max_count_ratio is None or not claimed:
        return {client: int(count) for client, count in claimed.items()}
    # Clipped first, so that a claim of any size is safe to turn into a float.
    counts = {client: min(int(count), MAX_EXAMPLES) for client, count in claimed.items()}
    lower_median = sorted(counts.values())[(len(counts) - 1) // 2]
    cap = math.floor(min(float(max_count_ratio) * lower_median, MAX_EXAMPLES))
    return {client: min(count, cap) for client, count in counts.items()}


def checked_examples(num_examples: Mapping[str, int]) -> dict[str, int]:
    """The counts as plain integers, in the same order.

    Raises:
        EvidenceError: a count is not an integer in [1, MAX_EXAMPLES], or a client id is not a
            string; the message names the client.
    """
    num_examples = {client: plain(count) for client, count in num_examples.items()}
    for client, count in num_examples.items():
        _check_count(client, count)
        if count > MAX_EXAMPLES:
            raise EvidenceError(
                f"client {client!r}: got more than 2**53 examples; expected fewer, cap claims with"
                " counted_examples first"
            )
    return {client: int(count) for client, count in num_examples.items()}


def checked_scores(
    scores: Mapping[str, ArrayLike], num_examples: Mapping[str, int], steps: int | None = None
) -> dict[str, NDArray[np.float64]]:
    """Client -> its scores, (n_steps,) float64.

    Raises:
        EvidenceError: a client without an example count, scores that are not (n_steps,) numbers in
            [0, 1], or not `steps` of them if that is given; the message names the client.
    """
    uncounted = sorted(scores.keys() - num_examples.keys())
    if uncounted:
        raise EvidenceError(
            f"got scores of the clients {uncounted} but no num_examples; expected a count for every"
            " client of the round"
        )
    checked = checked_vectors(scores, "scores", "(n_steps,) numbers in [0, 1]")
    for client, values in checked.items():
        if values.min() < 0 or values.max() > 1:
            raise EvidenceError(
                f"client {client!r}: got scores from {values.min():g} to {values.max():g}; expected"
                " probabilities in [0, 1]"
            )
        if steps is not None and len(values) != steps:
            raise EvidenceError(f"client {client!r}: got {len(values)} scores; expected {steps}")
    return checked


def _check_count(client: str, count: int) -> None:
    if not isinstance(client, str):
        raise EvidenceError(
            f"client {client!r}: got an id of type {type(client).__name__}; expected a string"
        )
    if not is_integer(count, 1):
        raise EvidenceError(
            f"client {client!r}: got num_examples {count!r}; expected a positive integer"
        )


def check_ratio(name: str, value: float) -> None:
    """Whether a cap in medians is one.

    Raises:
        ConfigError: it is not a finite number >= 1.
    """
    if not is_number(value) or value < 1:
        raise ConfigError(
            f"{name}: got {value!r}; expected a finite number >= 1, or None for no cap"
        )
