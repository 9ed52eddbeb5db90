"""Splits of data: no example in two clients, none lost, and alpha does what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedloop.config import Config
from fedloop.data.corpora import load_corpus
from fedloop.data.examples import Example
from fedloop.data.partition import by_column, dirichlet, iid, mixtures
from fedloop.errors import ConfigError
from fedloop.run.build import build_clients

patient = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
Parts = Sequence[Sequence[Example]]


def rows(count: int, kinds: int = 4) -> tuple[list[Example], list[str]]:
    """Examples that are all different, and the category of each, which its response repeats."""
    labels = [f"kind {number * 7 % kinds}" for number in range(count)]
    return [Example(f"question {number}", label) for number, label in enumerate(labels)], labels


def rng(seed: int | list[int] = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


SPLITS: dict[str, Callable[[int, int, int], Parts]] = {
    "iid": lambda count, n, seed: iid(rows(count)[0], n, rng(seed)),
    "dirichlet": lambda count, n, seed: dirichlet(*rows(count), n, 0.5, rng(seed), min_size=0),
    "mixtures": lambda count, n, seed: mixtures(*rows(count), n, 0.5, rng(seed), size=count // n),
    "by_column": lambda count, n, seed: list(by_column(*rows(count, n)).values()),
}


def owners(parts: Parts) -> Counter[str]:
    """Example -> how many clients hold it."""
    return Counter(example.instruction for part in parts for example in part)


@pytest.mark.parametrize("name", SPLITS)
@patient
@given(count=st.integers(1, 80), n=st.integers(1, 9), seed=st.integers(0, 5))
def test_every_example_goes_to_exactly_one_client(name: str, count: int, n: int, seed: int) -> None:
    n = min(n, count)
    parts = SPLITS[name](count, n, seed)
    held = owners(parts)
    assert set(held.values()) <= {1}
    lost = {example.instruction for example in rows(count)[0]} - set(held)
    assert len(lost) == (count % n if name == "mixtures" else 0)  # equal sizes leave a remainder
    assert len(parts) == (len(set(rows(count, n)[1])) if name == "by_column" else n)


@pytest.mark.parametrize("name", ["iid", "dirichlet", "mixtures"])
def test_the_seed_decides(name: str) -> None:
    assert SPLITS[name](60, 4, 1) == SPLITS[name](60, 4, 1)
    assert SPLITS[name](60, 4, 1) != SPLITS[name](60, 4, 2)


def test_iid_sizes_differ_by_one_at_most_or_are_as_asked() -> None:
    examples = rows(23)[0]
    assert sorted(map(len, iid(examples, 5, rng()))) == [4, 4, 5, 5, 5]
    parts = iid(examples, 3, rng(), size=6)
    assert [len(part) for part in parts] == [6, 6, 6]
    assert set(owners(parts).values()) == {1}
    assert [example for part in iid(examples, 1, rng()) for example in part] != examples  # shuffled


def shares(parts: Parts) -> np.ndarray:
    """(n, kinds): how much of each client is of each category."""
    kinds = sorted({example.response for part in parts for example in part})
    counts = np.array(
        [[sum(example.response == kind for example in part) for kind in kinds] for part in parts],
        float,
    )
    return counts / counts.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("split", ["dirichlet", "mixtures"])
def test_a_large_alpha_is_even_and_a_small_one_is_not(split: str) -> None:
    examples, labels = rows(800)

    def cut(alpha: float, seed: int) -> np.ndarray:
        if split == "dirichlet":
            return shares(dirichlet(examples, labels, 4, alpha, rng(seed), min_size=1))
        return shares(mixtures(examples, labels, 4, alpha, rng(seed), size=50))

    even = np.mean([cut(1e5, seed).max(axis=1).mean() for seed in range(5)])
    skewed = np.mean([cut(0.05, seed).max(axis=1).mean() for seed in range(5)])
    assert even < 0.35  # of 4 categories, a quarter each
    assert skewed > 0.75


def test_dirichlet_draws_again_until_everybody_has_enough() -> None:
    examples, labels = rows(60)
    drawn = [
        min(map(len, dirichlet(examples, labels, 6, 0.2, rng(seed), min_size=0)))
        for seed in range(20)
    ]
    assert min(drawn) < 4  # negative control: a first draw may leave a client with too few
    assert all(
        min(map(len, dirichlet(examples, labels, 6, 0.2, rng(seed), min_size=4))) >= 4
        for seed in range(20)
    )


def test_an_experiment_runs_the_split_that_it_names() -> None:
    names = ("builtin:benign/facts", "builtin:benign/code")
    loaded = [load_corpus(name).examples for name in names]
    labels = [name for name, part in zip(names, loaded, strict=True) for _ in part]
    examples = [example for part in loaded for example in part]
    cuts = {
        "dirichlet": dirichlet(examples, labels, 4, 0.3, rng([5, 0])),
        "mixtures": mixtures(examples, labels, 4, 0.3, rng([5, 0]), size=20),
    }
    for partition, parts in cuts.items():
        clients = {"count": 4, "examples": 20, "benign": names, "partition": partition}
        values = {"seed": 5, "model": {"base": "none"}, "clients": {**clients, "alpha": 0.3}}
        made = [client.examples for client in build_clients(Config.of(values))]
        assert made == [part[:20] for part in parts]
    assert len({len(part) for part in cuts["dirichlet"]}) > 1


@pytest.mark.parametrize(
    "call",
    [
        lambda examples, labels: iid(examples, 0, rng()),
        lambda examples, labels: iid(examples, 11, rng()),
        lambda examples, labels: iid(examples, 3, rng(), size=4),
        lambda examples, labels: iid(examples, 3, rng(), size=0),
        lambda examples, labels: dirichlet(examples, labels[1:], 2, 1.0, rng()),
        lambda examples, labels: dirichlet([], [], 2, 1.0, rng()),
        lambda examples, labels: dirichlet(examples, labels, 0, 1.0, rng()),
        lambda examples, labels: dirichlet(examples, labels, 2, 0.0, rng()),
        lambda examples, labels: dirichlet(examples, labels, 2, float("nan"), rng()),
        lambda examples, labels: dirichlet(examples, labels, 2, 1.0, rng(), min_size=6),
        lambda examples, labels: dirichlet(examples, labels, 5, 1e-3, rng(), min_size=2),
        lambda examples, labels: mixtures(examples, labels, 2, 1.0, rng(), size=6),
        lambda examples, labels: mixtures(examples, labels, 2, 1.0, rng(), size=0),
        lambda examples, labels: mixtures(examples, labels, 2, float("inf"), rng(), size=2),
        lambda examples, labels: mixtures(examples, labels[1:], 2, 1.0, rng(), size=2),
        lambda examples, labels: by_column(examples, labels[1:]),
        lambda examples, labels: by_column([], []),
    ],
)
def test_a_split_that_cannot_be_is_refused(
    call: Callable[[list[Example], list[str]], object],
) -> None:
    with pytest.raises(ConfigError, match=r"got|no draw"):
        call(*rows(10))
