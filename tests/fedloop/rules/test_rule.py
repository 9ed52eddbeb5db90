"""A rule over rounds: the same bits whatever plays it, what it remembers and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedloop import AGGREGATORS, ClientUpdate, Defense, make_rule
from fedloop.client.client import Trained
from fedloop.config import Config
from fedloop.errors import AggregationError, ConfigError, StateError
from fedloop.plugins import Reply, defend_round
from fedloop.rules.rule import RULES
from fedloop.run.global_lora import GlobalLoRA
from fedloop.run.plan import plan_round
from fedloop.run.round import OpenRound
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, pack, unpack
from paper_repro.attackers.replay import aggregated, name
from tests.helpers import make

SEED = 7
CLIENTS = tuple(name(index) for index in range(6))
START = make.adapter(r=2, seed=3)
LAYOUT = Layout.of(START)
# Everything that a round brings is used: history, generator, sizes, an f that has to be lowered.
OPTIONS: dict[str, dict[str, Any]] = {
    "trimmed_mean": {"f": 2},
    "meamed": {"f": 2},
    "krum": {"f": 1, "pre": "nnm"},
    "multi_krum": {"f": 9},
    "nnm": {"f": 2},
    "centered_clipping": {"tau": "median", "iterations": 2},
    "dnc": {"f": 1, "coordinates": 20, "iterations": 2},
    "flame": {"noise": 0.01},
}


def rounds() -> list[dict[str, torch.Tensor]]:
    """Client -> its delta (d,) float32, three rounds of them. The last two push the same way."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(LAYOUT.size, generator=generator)
    played = []
    for _ in range(3):
        rows = 0.01 * (torch.randn(len(CLIENTS), LAYOUT.size, generator=generator) + 1)
        rows[-2:] += 0.01 * direction
        played.append(dict(zip(CLIENTS, rows, strict=True)))
    return played


def adapter(row: torch.Tensor) -> Adapter:
    return unpack(row, Layout(LAYOUT.slots, LAYOUT.scalings, "factor_delta"))


def counts() -> dict[str, int]:
    return {client: 30 + index for index, client in enumerate(CLIENTS)}


def simulated(rule: str, options: dict[str, Any]) -> torch.Tensor:
    config = Config.of(
        {
            "model": {"base": "none"},
            "clients": {"count": len(CLIENTS), "benign": ["builtin:benign"]},
            "aggregation": {"rule": rule, "options": options},
        }
    )
    federation = GlobalLoRA(START, Defense(None, None), config)
    for number, sent in enumerate(rounds(), start=1):
        generator = np.random.default_rng([SEED, number])
        plan = plan_round(config, number)._replace(generator=generator)
        with OpenRound(federation, plan, CLIENTS) as arriving:
            for client, row in sent.items():
                update = ClientUpdate(client, counts()[client], adapter(row))
                arriving.receive(client, Trained(update, 1.0, {"train": 0.0, "evidence": 0.0}, 0))
            record = arriving.close().record()
        assert not record.note
    return pack(federation.lora)[0]


def plugged(rule: str, options: dict[str, Any], **changes: Any) -> torch.Tensor:
    defense = Defense(None, None)
    state: Any = START.state_dict()
    for number, sent in enumerate(rounds(), start=1):
        replies = [
            Reply(client, counts()[client], adapter(row).state_dict(), kind="factor_delta")
            for client, row in sent.items()
        ]
        arguments = {"rule": rule, "options": options, "seed": SEED, **changes}
        done = defend_round(defense, number, replies, state, alpha=2 * 2, **arguments)
        assert not done.record.note
        state = done.state
    return pack(Adapter.from_state_dict(state, alpha=2 * 2))[0]


def replayed(rule: str, options: dict[str, Any]) -> torch.Tensor:
    chosen = make_rule(rule, **options)
    memory = chosen.init()
    lora = pack(START)[0]
    for number, sent in enumerate(rounds(), start=1):
        rows = np.stack([row.numpy() for row in sent.values()])
        weights = np.array([counts()[client] for client in CLIENTS], dtype=float)
        weights /= math.fsum(weights)
        moved, memory = aggregated(chosen, memory, rows, weights, LAYOUT, number, SEED)
        lora = (lora.double() + torch.from_numpy(moved).double()).float()
    return lora


@pytest.mark.parametrize("rule", RULES)
def test_simulation_plugin_and_replay_give_the_same_bits(rule: str) -> None:
    options = OPTIONS.get(rule, {})
    expected = simulated(rule, options)
    assert not torch.equal(expected, pack(START)[0])
    assert torch.equal(plugged(rule, options), expected)
    assert torch.equal(replayed(rule, options), expected)


def test_memory_generator_and_sizes_are_part_of_the_rule() -> None:
    """Negative controls: without what a round brings, three rules are other rules."""
    rows = [torch.stack(list(sent.values())) for sent in rounds()]
    weights = torch.tensor(list(counts().values()))
    for rule in ("foolsgold", "lasa"):
        forgetful = pack(START)[0]
        for deltas in rows:
            forgetful = forgetful + AGGREGATORS[rule](deltas, weights)
        assert float((forgetful - simulated(rule, {})).norm()) > 1e-3
    for rule in ("dnc", "flame"):
        assert not torch.equal(plugged(rule, OPTIONS[rule], seed=8), simulated(rule, OPTIONS[rule]))


def test_foolsgold_remembers_sybils_that_send_noise_now() -> None:
    rng = np.random.default_rng(0)
    honest = rng.standard_normal((2, 4, 200))
    sybils = np.repeat(rng.standard_normal((1, 200)), 2, axis=0)
    first = np.vstack([honest[0], 50 * sybils])
    second = np.vstack([honest[1], rng.standard_normal((2, 200))])
    rule = make_rule("foolsgold")
    start = rule.init()
    _, state = rule.apply(start, first, np.ones(6), clients=list("abcdef"))
    assert start == {"history": {}}
    order = [5, 0, 3, 1, 4, 2]
    delta, _ = rule.apply(state, second[order], np.ones(6), clients=[*"fadbec"])
    torch.testing.assert_close(delta, torch.from_numpy(honest[1].mean(0)), rtol=0, atol=0.05)
    fresh, _ = rule.apply(rule.init(), second, np.ones(6), clients=[*"abcdef"])
    assert float((fresh - torch.from_numpy(honest[1].mean(0))).abs().max()) > 0.1


def test_a_rejected_client_leaves_no_trace_in_what_is_remembered() -> None:
    rule = make_rule("foolsgold")
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    rows[1] = math.nan
    _, state = rule.apply(rule.init(), rows, [1, 0, 1, 1], clients=[*"abcd"])
    assert set(state["history"]) == {*"acd"}


def test_f_is_lowered_to_what_the_rule_bears_of_those_that_count() -> None:
    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    rule = make_rule("krum", f=np.int64(2))
    for weights, f in (([1, 1, 1, 1, 1], 2), ([1, 1, 1, 0, 0], 1), ([1, 0, 0, 0, 0], 0)):
        expected = AGGREGATORS["krum"](rows, weights, f=f)
        assert torch.equal(rule.apply({}, rows, weights)[0], expected)
    assert (rule.options.f, type(rule.options.f)) == (2, int)
    assert make_rule("centered_clipping", tau=np.array(0.5)).options.tau == 0.5


def test_what_a_rule_cannot_be_applied_to_is_refused() -> None:
    rows = torch.ones(2, 3)
    rule = make_rule("foolsgold")
    for clients in ((), ("a",), ("a", "a")):
        with pytest.raises(AggregationError, match="give clients="):
            rule.apply(rule.init(), rows, [1, 1], clients=clients)
    for other, state in ((rule, {}), (make_rule("mean"), rule.init()), (rule, {"sums": {}})):
        with pytest.raises(StateError, match="expected that of rule"):
            other.apply(state, rows, [1, 1], clients=("a", "b"))
    _, later = rule.apply(rule.init(), torch.eye(2, 3), torch.ones(2), clients=("a", "b"))
    with pytest.raises(StateError, match="of another LoRA"):
        rule.apply(later, torch.ones(2, 4), torch.ones(2), clients=("a", "b"))
    with pytest.raises(AggregationError, match="no generator"):
        make_rule("flame", noise=0.1).apply({}, rows, [1, 1])


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("krumm", {}, "'krumm'; expected one of mean, median, trimmed_mean"),
        (None, {}, "got rule None"),
        ("krum", {}, "rule 'krum' needs the option f"),
        ("krum", {"f": 1, "n": 2}, "no option 'n'; expected any of f, variant"),
        ("dnc", {"f": 1, "rng": 0}, "no option 'rng'"),
        ("lasa", {"sizes": [3]}, "no option 'sizes'"),
        *[("krum", {"f": f}, r"Krum\.f: got") for f in (-1, 1.5, True, "1", None, math.nan)],
        ("median", {"variant": "Official"}, "expected one of textbook, official"),
        ("multi_krum", {"f": 2, "m": "x"}, "MultiKrum.m: got 'x'; expected None or a whole"),
        ("multi_krum", {"f": 2, "m": 0}, "at least 1"),
        ("geometric_median", {"iterations": "3"}, "GeometricMedian.iterations: got '3'"),
        ("geometric_median", {"smoothing": 0}, "a finite number above 0 and below 1"),
        ("centered_clipping", {"tau": math.nan}, "above 0, or 'median'"),
        ("centered_clipping", {"tau": "mean"}, "above 0, or 'median'"),
        ("residual", {"confidence": 0}, "above 0"),
        ("residual", {"threshold": math.inf}, "of at least 0"),
        ("residual", {"floor": 0}, "above 0"),
        ("dnc", {"f": 1, "iterations": 0}, "at least 1"),
        ("dnc", {"f": 1, "coordinates": True}, "at least 1"),
        ("dnc", {"f": 1, "removed": -1}, "at least 0"),
        ("flame", {"noise": math.nan}, "at least 0"),
        ("lasa", {"sparsity": 1}, "of at least 0 and below 1"),
        ("lasa", {"norm_bound": 0}, "above 0"),
        ("lasa", {"sign_bound": "1"}, "above 0"),
        ("mean", {"pre": "nnm"}, "needs the option f, of at least 1"),
        ("mean", {"pre": "mixed", "f": 1}, "expected None or 'nnm'"),
    ],
)
def test_names_and_options_are_checked_before_anything_runs(
    rule: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_rule(rule, **options)
    values = {
        "model": {"base": "none"},
        "clients": {"benign": ["builtin:benign"]},
        "aggregation": {"rule": rule, "options": options},
    }
    with pytest.raises(ConfigError, match=message if isinstance(rule, str) else "valid string"):
        Config.of(values)
    with pytest.raises(ConfigError) as plugged:
        defend_round(Defense(None, None), 1, {}, {}, alpha=1, rule=rule, options=options)
    assert str(plugged.value) == str(caught.value)
