"""The study of mixed poison.

What is left out is left out, the rule keeps its budget on what it saw, the page says what the
results say.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from loraprobe.metrics import auroc
from paper_repro.common.held_out import PROBES
from paper_repro.common.setting import probe_name
from paper_repro.common.setting import rule_of as saved_rule
from paper_repro.grid.cells import SOURCES
from paper_repro.mixed import accumulated, cuts, levers
from paper_repro.mixed.federations import PARTICIPATIONS
from paper_repro.mixed.probes import rule_of
from paper_repro.mixed.readers import BUDGET


def test_the_rule_keeps_its_budget_on_the_federations_that_it_was_made_on() -> None:
    rng = np.random.default_rng(0)
    spread = 1.5 / np.sqrt(np.arange(1, PARTICIPATIONS + 1))[:, None]
    others = [1 / (1 + np.exp(-rng.normal(-2, spread, (PARTICIPATIONS, 400)))) for _ in range(3)]
    level = cuts.rule(others)
    for participations in (1, PARTICIPATIONS):
        seen = np.concatenate([other[participations - 1] for other in others])
        flagged = (seen >= level.cut(participations)).mean()
        assert BUDGET - 2 / len(seen) <= flagged <= BUDGET + 1e-9
    assert level.floor < level.threshold


def scored(
    rng: np.random.Generator,
    benign: float = -3.0,
    quarter: float = 1.0,
    shift: float = 0.0,
    each: int = 40,
) -> cuts.Scored:
    """A federation of honest clients and some with a quarter of poison, with references, whose log
    odds lie around these means.
    """
    role = np.repeat(["benign", "hard_negative", "malicious", "reference"], each)
    middle = np.where(role == "malicious", quarter, benign) + shift
    single = rng.normal(middle, 1.0, (PARTICIPATIONS, len(role)))
    mean = np.cumsum(single, axis=0) / np.arange(1, PARTICIPATIONS + 1)[:, None]
    kinds = [frozenset({f"kind {number % 8}"}) for number in range(len(role))]
    probabilities = (1 / (1 + np.exp(-values)) for values in (mean, single))
    return cuts.Scored(
        *probabilities, role, np.where(role == "malicious", cuts.QUARTER, 1.0), kinds
    )


@pytest.mark.parametrize("name", list(cuts.WAYS))
def test_every_way_finds_most_of_a_quarter_of_poison_and_flags_few_others(name: str) -> None:
    rng = np.random.default_rng(0)
    one, others = scored(rng), [scored(rng) for _ in range(3)]
    flagged = cuts.WAYS[name](one, others)
    assert flagged.shape == one.mean.shape
    assert flagged[-1, one.role == "malicious"].mean() > 0.9
    assert flagged[-1, one.honest].mean() < 0.06
    by_role = accumulated.counted(one, flagged)
    assert by_role["0.25"] == {
        "n": 40,
        "flagged": flagged[:, one.role == "malicious"].sum(axis=1).tolist(),
    }
    assert sum(group["n"] for group in by_role.values()) == 120  # no reference is counted


def test_the_first_verdict_of_the_sequential_test_stands() -> None:
    rng = np.random.default_rng(0)
    others = [scored(rng) for _ in range(3)]
    one = scored(rng)
    turned = one.single.copy()
    turned[1:] = 1 - turned[:1]  # who looked honest looks poisoned from then on, and the reverse
    flagged = cuts.sequential(cuts.Scored(one.mean, turned, one.role, one.share, one.kinds), others)
    assert flagged[0].any()
    assert flagged[:, flagged[0]].all()
    certain = one.single[0] < 1e-2
    assert certain.any()
    assert not flagged[:, certain].any()


def labelled_rows(
    rng: np.random.Generator, each: int, p: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise (3 * each, p) with roles and three kinds a role."""
    role = np.repeat(["benign", "hard_negative", "malicious"], each)
    return (
        rng.normal(size=(len(role), p)).astype(np.float32),
        role,
        np.array([f"{name}{number % 3}" for number, name in enumerate(role)]),
    )


@pytest.mark.parametrize(
    "fit", [lever.fit for lever in levers.LEVERS.values()], ids=list(levers.LEVERS)
)
def test_levers_find_a_direction_and_nothing_in_noise(fit: levers.Fit) -> None:
    rng = np.random.default_rng(0)
    noise, role, kind = labelled_rows(rng, 80, 100)
    shift = 5 * np.eye(100, dtype=np.float32)[0]
    labels, fresh = np.arange(400) % 2, rng.normal(size=(400, 100)).astype(np.float32)
    found = fit(noise + np.where(role == "malicious", 1, 0)[:, None] * shift, role, kind)
    assert auroc(labels, found(fresh + labels[:, None] * shift)) > 0.75
    assert 0.4 < auroc(labels, fit(noise, role, kind)(fresh)) < 0.6


@pytest.mark.parametrize("benign", ["first", "second"])
@pytest.mark.parametrize("source", SOURCES)
def test_saved_probes_carry_the_rule_that_was_measured(source: str, benign: str) -> None:
    probe = PROBES / probe_name("mass-mean", source, benign)
    rule = rule_of(source)
    assert saved_rule(probe) == {
        "threshold": rule["threshold"],
        "options": {"floor": rule["floor"]},
    }
    assert source in json.loads((probe / "config.json").read_text())["facts"]["held_out"]
    assert saved_rule(PROBES / probe_name("linear", source, benign)) == {}
