"""How benign data are split over clients: evenly, by Dirichlet draws over categories, by a column.

No rule gives an example to two clients, and without a size every example goes to one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError
from .examples import Example

Part = tuple[Example, ...]
_MAX_DRAWS = 1000


def iid(
    examples: Sequence[Example], n: int, rng: np.random.Generator, *, size: int | None = None
) -> list[Part]:
    """A random split over n clients.

    Args:
        size: examples a client; None uses all of them, and sizes then differ by at most one.

    Raises:
        ConfigError: n is not positive, or there are too few examples.
    """
    needed = n * (1 if size is None else size)
    if n < 1 or not 1 <= needed <= len(examples):
        raise ConfigError(
            f"got {len(examples)} examples for {n} clients of {size or 'at least one'}; expected at"
            " least one client and enough for each"
        )
    order = rng.permutation(len(examples))
    return [
        _take(examples, rows)
        for rows in np.array_split(order if size is None else order[:needed], n)
    ]


def dirichlet(
    examples: Sequence[Example],
    categories: Sequence[str],
    n: int,
    alpha: float,
    rng: np.random.Generator,
    *,
    min_size: int = 1,
) -> list[Part]:
    """Label skew: each category is cut over the n clients in shares drawn from Dirichlet(alpha).

    A small alpha gives every client few categories, a large one all of them evenly. Draws in which
    a client gets fewer than `min_size` examples are repeated.

    Raises:
        ConfigError: categories do not match the examples, n or alpha is not positive, or no draw
            out of 1000 gives every client `min_size`.

    Source: arXiv:2102.02079, Sec. IV (distribution-based label imbalance).
    """
    _check(examples, categories)
    if n < 1 or not 0 < alpha < np.inf or min_size < 0:
        raise ConfigError(
            f"got n={n}, alpha={alpha}, min_size={min_size}; expected n >= 1, a finite alpha > 0"
            " and min_size >= 0"
        )
    if n * min_size > len(examples):
        raise ConfigError(
            f"got {len(examples)} examples for {n} clients of at least {min_size}; expected at"
            f" least {n * min_size}"
        )
    groups = [
        np.flatnonzero(np.asarray(categories) == category) for category in sorted(set(categories))
    ]
    for _ in range(_MAX_DRAWS):
        owned: list[list[int]] = [[] for _ in range(n)]
        for rows in groups:
            ends = np.rint(np.cumsum(rng.dirichlet(np.full(n, alpha))) * len(rows)).astype(int)[:-1]
            for part, mine in zip(owned, np.split(rng.permutation(rows), ends), strict=True):
                part.extend(mine.tolist())
        if min(map(len, owned)) >= min_size:
            return [_take(examples, rng.permutation(part)) for part in owned]
    raise ConfigError(
        f"no draw of {_MAX_DRAWS} gave each of {n} clients {min_size} examples at alpha={alpha};"
        " raise alpha or lower min_size"
    )


def mixtures(
    examples: Sequence[Example],
    categories: Sequence[str],
    n: int,
    alpha: float,
    rng: np.random.Generator,
    *,
    size: int,
) -> list[Part]:
    """n clients of `size` examples, each with a mixture of categories drawn from Dirichlet(alpha).

    Clients draw one after the other without replacement; what a used-up category cannot give comes
    from the others, in the client's own proportions.

    Raises:
        ConfigError: categories do not match the examples, n, size or alpha is not positive, or
            there are too few examples.

    Source: arXiv:1909.06335, Sec. 3, with a uniform prior over categories.
    """
    _check(examples, categories)
    if n < 1 or size < 1 or not 0 < alpha < np.inf or n * size > len(examples):
        raise ConfigError(
            f"got {len(examples)} examples for {n} clients of {size} at alpha={alpha}; expected"
            " enough, and each of these positive"
        )
    stock = [
        rng.permutation(np.flatnonzero(np.asarray(categories) == category)).tolist()
        for category in sorted(set(categories))
    ]
    parts = []
    for _ in range(n):
        wished = rng.dirichlet(np.full(len(stock), alpha))
        indices: list[int] = []
        while len(indices) < size:
            left = np.array([len(rows) for rows in stock])
            weights = np.where(left > 0, wished, 0.0)
            if not weights.sum() > 1e-12:  # a small alpha can wish for used-up categories alone
                weights = left.astype(float)
            counts = rng.multinomial(size - len(indices), weights / weights.sum())
            for rows, count in zip(stock, counts, strict=True):
                taken = min(int(count), len(rows))
                indices += rows[:taken]
                del rows[:taken]
        parts.append(_take(examples, rng.permutation(indices)))
    return parts


def by_column(examples: Sequence[Example], values: Sequence[str]) -> dict[str, Part]:
    """One client for each value of a column, such as who wrote a row: value -> its examples.

    Raises:
        ConfigError: there is no example, or not one value for each.
    """
    _check(examples, values)
    parts: dict[str, list[Example]] = {value: [] for value in sorted(set(values))}
    for example, value in zip(examples, values, strict=True):
        parts[value].append(example)
    return {value: tuple(part) for value, part in parts.items()}


def _check(examples: Sequence[Example], categories: Sequence[str]) -> None:
    if not examples or len(examples) != len(categories):
        raise ConfigError(
            f"got {len(examples)} examples and {len(categories)} categories; expected one category"
            " for each of at least one example"
        )


def _take(examples: Sequence[Example], rows: np.ndarray) -> Part:
    return tuple(examples[row] for row in rows.tolist())
