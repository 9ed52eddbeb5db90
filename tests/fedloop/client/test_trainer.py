"""One client's round on the tiny Llama.

What it sends, and that evidence is what the level asks for and the probe reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloop.client import client as module
from fedloop.client.client import ClientTrainer, Trained
from fedloop.client.training import (
    LocalTraining,
    LoRASettings,
    attach_lora,
    in_training_order,
    local_steps,
    read_adapter,
    shadow_gradient,
)
from fedloop.data.builtin import SETS
from fedloop.data.examples import Example
from fedloop.defense.levels import (
    LAST_STEP,
    LOCAL_STEPS,
    SHADOW_GRADIENT,
    SHADOW_STEPS,
    UPDATE_FEATURES,
)
from fedloop.defense.screening import Screening, check_updates
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta
from loraprobe.adapters.layout import pack
from tests.helpers import federated, tiny

EXAMPLES = [example for _, example in SETS["benign"]()[:5]]
TRAINING = LocalTraining(lr=5e-3, steps=3, batch_size=2, max_length=40)
SHADOW = LocalTraining(lr=5e-3, steps=99, batch_size=2, max_length=40)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Adapter]:
    """A model with a LoRA, its tokenizer, and the initial adapter."""
    model = attach_lora(
        tiny.llama(std=0.2),
        LoRASettings(r=4, alpha=8, target_modules=tuple(federated.DIMS)),
        seed=0,
    )
    return model, tiny.tokenizer(), read_adapter(model, federated.NAME)


def trainer(
    parts: tuple[Any, Any, Adapter], evidence: str | None, recipe: str = "all_b", **changes: Any
) -> ClientTrainer:
    model, tokenizer, initial = parts
    featurizer = federated.fitted(recipe).featurizer
    return replace(
        ClientTrainer(model, tokenizer, initial, evidence, featurizer, SHADOW, 2), **changes
    )


def later(initial: Adapter) -> Adapter:
    """The global LoRA of a later round."""
    noise = torch.randn(pack(initial)[0].shape, generator=torch.Generator().manual_seed(1))
    return add_delta(initial, federated.unpacked(0.01 * noise, initial))


def play(
    of: ClientTrainer,
    start: Adapter | None = None,
    seed: int = 3,
    wanted: bool = True,
    examples: Sequence[Example] = EXAMPLES,
) -> Trained:
    return of.train("c", examples, start or of.initial, TRAINING, seed, wanted=wanted)


def vectors(
    adapters: Sequence[Adapter], modules: Sequence[str] | None = None
) -> list[torch.Tensor]:
    return [
        pack(Adapter({name: one[name] for name in modules or one}, kind=one.kind))[0]
        for one in adapters
    ]


def same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(one, other) for one, other in zip(left, right, strict=True)
    )


def test_local_steps_are_the_trajectory_of_what_the_probe_reads(
    parts: tuple[Any, Any, Adapter],
) -> None:
    model, tokenizer, initial = parts
    steps = [step.delta for step in local_steps(model, tokenizer, EXAMPLES, initial, TRAINING, 3)]
    for recipe, count in (("paper", 2), ("all_b", 4), ("spectral", 4)):
        of = trainer(parts, LOCAL_STEPS, recipe)
        one = play(of)
        assert all(len(step) == count for step in one.update.steps)
        assert same(vectors(one.update.steps), vectors(steps, list(one.update.steps[0])))
        screening = Screening(initial, None, of.featurizer, trajectory=True, max_steps=3)
        _, refused = check_updates([one.update], screening)
        assert not refused


def test_evidence_bytes_are_those_of_what_the_probe_reads(parts: tuple[Any, Any, Adapter]) -> None:
    # B of q (32, 4) and v (16, 4), A (4, 32) of both, in two layers; three steps of float32
    for recipe, numbers in (
        ("paper", 32 * 4 + 16 * 4),
        ("all_b", 2 * (32 * 4 + 16 * 4)),
        ("all_a", 2 * 2 * 32 * 4),
        ("spectral", 2 * (192 + 256)),
    ):
        assert play(trainer(parts, LOCAL_STEPS, recipe)).evidence_bytes == 3 * 4 * numbers, recipe
    assert play(trainer(parts, SHADOW_GRADIENT)).evidence_bytes == 4 * 384


def test_nobody_sends_what_is_not_wanted_or_not_read(
    parts: tuple[Any, Any, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = module.local_steps

    def counting(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(module, "local_steps", counting)
    for evidence in (LOCAL_STEPS, SHADOW_STEPS, SHADOW_GRADIENT):
        one = play(trainer(parts, evidence), wanted=False)
        assert (one.update.steps, one.evidence_bytes) == ((), 0)
    for evidence in (LAST_STEP, UPDATE_FEATURES, None):
        assert play(trainer(parts, evidence)).update.steps == ()
    assert len(calls) == 6  # nobody trained a second time
    play(trainer(parts, SHADOW_STEPS))
    assert len(calls) == 8  # negative control


def test_the_shadow_branch_repeats_the_batches_from_the_initial_adapter(
    parts: tuple[Any, Any, Adapter],
) -> None:
    initial = parts[2]
    shadow = play(trainer(parts, SHADOW_STEPS)).update.steps
    local = play(trainer(parts, LOCAL_STEPS)).update.steps
    assert len(shadow) == 3
    # in the first round, at the same learning rate, they are one
    assert same(vectors(shadow), vectors(local))
    start = later(initial)
    # whatever the global LoRA has become
    assert same(vectors(play(trainer(parts, SHADOW_STEPS), start).update.steps), vectors(shadow))
    assert not same(vectors(play(trainer(parts, LOCAL_STEPS), start).update.steps), vectors(local))
    slow = trainer(parts, SHADOW_STEPS, shadow=replace(SHADOW, lr=1e-4))
    assert not same(vectors(play(slow).update.steps), vectors(shadow))
    assert not same(
        vectors(play(trainer(parts, SHADOW_STEPS), seed=4).update.steps), vectors(shadow)
    )


def test_a_shadow_gradient_is_of_the_first_examples_of_the_round(
    parts: tuple[Any, Any, Adapter],
) -> None:
    model, tokenizer, initial = parts
    few = in_training_order(EXAMPLES, 3)[:2]
    expected = vectors([shadow_gradient(model, tokenizer, few, initial, SHADOW)])
    for start in (initial, later(initial)):
        one = play(trainer(parts, SHADOW_GRADIENT), start)
        assert same(vectors(one.update.steps), expected)
    other = trainer(parts, SHADOW_GRADIENT, shadow_examples=3)
    assert not same(vectors(play(other).update.steps), expected)


def test_evidence_does_not_change_what_is_sent(parts: tuple[Any, Any, Adapter]) -> None:
    plain = vectors([play(trainer(parts, None)).delta])
    for evidence in (LOCAL_STEPS, SHADOW_STEPS, SHADOW_GRADIENT):
        one = play(trainer(parts, evidence))
        assert same(vectors([one.delta]), plain)
        # nor what the next client does
        assert same(vectors([play(trainer(parts, None)).delta]), plain)
