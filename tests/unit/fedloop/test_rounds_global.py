"""Whole federations on the tiny Llama: who can move the global LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from fedloop.client.client import Trained
from fedloop.client.training import LocalTraining
from fedloop.config import Config
from fedloop.rules.rule import make_rule
from fedloop.run import round as federation_module
from fedloop.run.simulate import build_clients, build_federation, client_seed
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta
from tests.helpers import federated
from tests.helpers.federated import Files, defended, run, settings, vector

RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "median": {},
    "trimmed_mean": {"f": 1},
    "meamed": {"f": 1},
    "krum": {"f": 1},
    "multi_krum": {"f": 1},
    "geometric_median": {},
    "centered_clipping": {},
    "nnm": {"f": 1},
    "foolsgold": {},
    "residual": {},
    "dnc": {"f": 1},
    "lasa": {},
}


# --- who can move the global LoRA
# ----------------------------------------------------------------------------------------------


Sent = Callable[
    [dict[str, Trained], Adapter], Mapping[str, Trained]
]  # what came out of training, the global LoRA -> what is sent


class Bench:
    """One federation whose first round can be played again and again, with what its clients send
    changed on the way.
    """

    def __init__(self, files: Files, **changes: Any) -> None:
        self.config = Config.of(settings(files, **changes))
        self.clients = build_clients(self.config)
        self.malicious = next(
            client.client_id for client in self.clients if client.role == "malicious"
        )
        self.federation = build_federation(self.config)
        self.fresh = self.federation.state_dict()

    def play(
        self,
        sent: Callable[[dict[str, Trained], Adapter], Mapping[str, Trained]],
        monkeypatch: pytest.MonkeyPatch,
        absent: str = "",
    ) -> tuple[Any, Any]:
        """One round from the beginning: its record, and the new global LoRA."""
        rule = self.federation._rule
        self.federation.load_state_dict({**self.fresh, "rule": rule.init()})

        def changed(
            trained: dict[str, Trained],
            malicious: Any,
            config: Any,
            defense: Any,
            start: Adapter,
            generator: Any,
        ) -> Mapping[str, Trained]:
            return sent(trained, start)

        monkeypatch.setattr(federation_module, "attacked", changed)
        of = self.config.training
        present = [client for client in self.clients if client.client_id != absent]
        seeds = [client_seed(0, 1, self.clients.index(client)) for client in present]
        training = LocalTraining(of.lr, of.steps, of.batch_size, of.max_length)
        record = self.federation.round(
            1, present, training, seeds, np.random.default_rng(0), lambda *_: None
        )
        return record, vector(self.federation.lora).clone()


@cache
def bench(files: Files) -> Bench:
    return Bench(files)


def untouched(trained: dict[str, Trained], start: Adapter) -> dict[str, Trained]:
    return trained


def bending(
    client: str, change: Callable[[Trained, Adapter], Trained]
) -> Callable[[dict[str, Trained], Adapter], dict[str, Trained]]:
    return lambda trained, start: {
        name: change(one, start) if name == client else one for name, one in trained.items()
    }


def scaled(factor: float, **fields: Any) -> Callable[[Trained, Adapter], Trained]:
    """A client that sends its change times a factor."""

    def change(one: Trained, start: Adapter) -> Trained:
        delta = federated.mapped(one.delta, lambda tensor: factor * tensor)
        return replace(
            one, delta=delta, update=replace(one.update, adapter=add_delta(start, delta), **fields)
        )

    return change


@pytest.mark.parametrize("rule", RULES)
def test_a_rejected_client_cannot_move_the_global_lora(
    rule: str, tiny_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = bench(tiny_files)
    of.federation._rule = make_rule(rule, **RULES[rule])
    rejected = (
        scaled(math.nan),
        scaled(math.inf),
        scaled(1.0, num_examples=0),
        scaled(-50.0, num_examples=True),
        scaled(50.0, num_examples="4"),
    )
    moved = set()
    for change in rejected:
        record, lora = of.play(bending(of.malicious, change), monkeypatch)
        assert record.factors[of.malicious] == 0.0
        assert record.reasons.keys() == {of.malicious}
        assert not record.skipped
        assert not record.note
        moved.add(tuple(lora.tolist()))
    without, expected = of.play(untouched, monkeypatch, absent=of.malicious)
    assert moved == {tuple(expected.tolist())}
    assert without.factors.keys() == record.factors.keys() - {of.malicious}
    counted, free = of.play(
        bending(of.malicious, scaled(-50.0)), monkeypatch
    )  # negative control: if it is not rejected, it counts
    assert not counted.reasons
    if rule not in ("krum", "median", "trimmed_mean", "multi_krum", "dnc", "meamed"):
        assert not torch.equal(free, expected)
    assert not torch.equal(expected, of.fresh["lora"])


def test_flame_skips_a_round_without_a_majority_and_says_so(tiny_files: Files) -> None:
    result = run(tiny_files, aggregation={"rule": "flame"}, clients={"malicious": 0})
    for record in result.records:
        assert record.skipped is ("skipped:" in record.note)
        assert bool(record.weights) is not record.skipped


def test_a_skipped_round_keeps_the_global_lora(
    tiny_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = bench(tiny_files)
    of.federation._rule = make_rule("mean")
    record, lora = of.play(
        lambda trained, start: {
            name: scaled(math.nan)(one, start) for name, one in trained.items()
        },
        monkeypatch,
    )
    assert record.skipped
    assert record.weights == {}
    assert torch.equal(lora, of.fresh["lora"])
    gated = run(tiny_files, defense={**defended(tiny_files), "threshold": 1e-6})
    assert all(record.skipped and set(record.factors.values()) == {0.0} for record in gated.records)
    assert torch.equal(vector(gated.adapter), of.fresh["lora"])


def test_a_client_that_diverged_is_refused_and_the_record_can_be_written(
    tiny_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = bench(tiny_files)
    of.federation._rule = make_rule("mean")
    record, _ = of.play(
        bending(
            of.malicious, lambda one, start: replace(scaled(math.nan)(one, start), loss=math.nan)
        ),
        monkeypatch,
    )
    assert of.malicious not in record.losses
    assert len(record.losses) == 3
    assert of.malicious in record.to_json()


def test_an_error_of_the_rule_is_a_skipped_round_with_a_note(
    tiny_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = bench(tiny_files)
    of.federation._rule = make_rule("dnc", f=1, removed=9)
    record, lora = of.play(untouched, monkeypatch)
    assert record.skipped
    assert record.weights == {}
    assert record.note == "skipped: got removed=9; expected 4 > c f >= 0"
    assert torch.equal(lora, of.fresh["lora"])
