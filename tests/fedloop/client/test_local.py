"""One client's training on a two-layer random Llama.

What it yields, what it leaves alone, and that the seed decides everything.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedloop.client import training as local
from fedloop.client.training import (
    LocalStep,
    LocalTraining,
    LoRASettings,
    attach_lora,
    in_training_order,
    load_base,
    local_steps,
    read_adapter,
    shadow_gradient,
    write_adapter,
)
from fedloop.data.examples import Example, Tokens, encode
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import DataError, KindMismatch, LayoutMismatch
from tests.helpers import tiny
from tests.helpers.federated import vector

MODULES = ("q_proj", "v_proj")
LORA = LoRASettings(r=4, alpha=8, target_modules=MODULES)
STILL = LoRASettings(r=4, alpha=8, dropout=0.0, target_modules=MODULES)
QUICK = LocalTraining(lr=1e-2, steps=3, batch_size=2, max_length=220)
EXAMPLES = [
    Example("Name a colour.", "Blue."),
    Example("Count to 3.", "1, 2, 3"),
    Example("Which animal says moo?", "A cow does."),
    Example("Sum up.", "It rains.", "Water falls from the sky."),
    Example("Spell cat.", "c, a, t"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture
def model() -> Any:
    return attach_lora(tiny.llama(), LORA, seed=0)


def train(
    model: Any,
    tokenizer: Any,
    start: Adapter,
    *,
    seed: int = 0,
    training: LocalTraining = QUICK,
    examples: Sequence[Example] = EXAMPLES,
) -> list[LocalStep]:
    return list(local_steps(model, tokenizer, examples, start, training, seed))


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer that is not LoRA's, copied."""
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts agree bit for bit."""
    return left.keys() == right.keys() and all(
        torch.equal(tensor, right[name]) for name, tensor in left.items()
    )


def test_every_step_yields_the_change_since_the_start(model: Any, tokenizer: Any) -> None:
    start = read_adapter(model, "org/base")
    frozen, before = vector(start).clone(), base_weights(model)
    steps, copies = [], []
    for step in local_steps(model, tokenizer, EXAMPLES, start, QUICK, 0):
        steps.append(step)
        copies.append(vector(step.delta).clone())
        assert torch.equal(copies[-1], vector(factor_delta(read_adapter(model), start)))
    assert [step.index for step in steps] == [1, 2, 3]
    assert [step.num_examples for step in steps] == [2, 2, 2]
    assert {step.delta.kind for step in steps} == {"factor_delta"}
    assert {step.delta.base_model for step in steps} == {"org/base"}
    # later steps do not move earlier deltas
    assert all(
        torch.equal(vector(step.delta), copy) for step, copy in zip(steps, copies, strict=True)
    )
    assert not torch.equal(copies[0], copies[-1])
    assert torch.equal(vector(start), frozen)
    assert same(base_weights(model), before)
    moved = factor_delta(read_adapter(model), start)
    # LoRA, and all of it, did learn
    assert all(moved[module].factor(factor).any() for module in moved for factor in ("A", "B"))


def test_the_seed_decides_every_bit_whatever_happens_between_the_steps(
    model: Any, tokenizer: Any
) -> None:
    start = read_adapter(model)
    expected = [vector(step.delta) for step in train(model, tokenizer, start, seed=5)]
    disturbed = []
    for number, step in enumerate(local_steps(model, tokenizer, EXAMPLES, start, QUICK, 5)):
        disturbed.append(vector(step.delta))
        torch.manual_seed(1000 + number)
        torch.rand(7), np.random.rand(7), random.random()
    assert all(torch.equal(got, wanted) for got, wanted in zip(disturbed, expected, strict=True))
    assert not torch.equal(vector(train(model, tokenizer, start, seed=6)[-1].delta), expected[-1])


def test_dropout_and_the_order_of_examples_both_follow_from_the_seed(tokenizer: Any) -> None:
    for settings, examples, differs in (
        (LORA, EXAMPLES[:1], True),
        (STILL, EXAMPLES, True),
        (STILL, EXAMPLES[:1], False),
    ):
        model = attach_lora(tiny.llama(), settings, seed=0)
        start = read_adapter(model)
        one, other = (
            vector(train(model, tokenizer, start, seed=seed, examples=examples)[-1].delta)
            for seed in (1, 2)
        )
        assert torch.equal(one, other) is not differs


def test_the_callers_generators_are_where_they_were_after_every_step(
    model: Any, tokenizer: Any
) -> None:
    start = read_adapter(model)
    torch.manual_seed(11)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for _ in local_steps(model, tokenizer, EXAMPLES, start, QUICK, 0):
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]
    assert torch.equal(torch.get_rng_state(), before[0])
    torch.rand(1)
    # negative control: the comparison sees one draw
    assert not torch.equal(torch.get_rng_state(), before[0])


def test_a_client_leaves_nothing_behind_for_the_next(model: Any, tokenizer: Any) -> None:
    start = read_adapter(model)
    alone = [vector(step.delta) for step in train(model, tokenizer, start, seed=1)]
    train(
        model,
        tokenizer,
        start,
        seed=2,
        training=LocalTraining(lr=0.1, steps=2, batch_size=4, max_length=220),
    )
    next(local_steps(model, tokenizer, EXAMPLES, start, QUICK, 3))  # given up after a step
    again = [vector(step.delta) for step in train(model, tokenizer, start, seed=1)]
    assert all(torch.equal(left, right) for left, right in zip(alone, again, strict=True))
    # negative control: another start, another delta
    elsewhere = train(model, tokenizer, read_adapter(model), seed=1)
    assert not torch.equal(vector(elsewhere[-1].delta), alone[-1])


def response_loss(
    model: Any, tokenizer: Any, examples: Sequence[Example], with_prompt: bool
) -> float:
    """The definition: mean cross-entropy of the response's tokens, each given all before it.

    Of the prompt's too, if asked.
    """
    losses = []
    with torch.inference_mode():
        for example in examples:
            tokens = encode(example, tokenizer, 220)
            logits = model(input_ids=torch.tensor([tokens.ids])).logits[0]
            each = functional.cross_entropy(
                logits[:-1].double(), torch.tensor(tokens.ids[1:]), reduction="none"
            )
            losses += each[0 if with_prompt else tokens.response_start - 1 :].tolist()
    return float(np.mean(losses))


def test_only_the_response_is_learnt(tokenizer: Any) -> None:
    model = attach_lora(tiny.llama(std=0.2), STILL, seed=0)
    training = LocalTraining(lr=1e-3, steps=1, batch_size=2, max_length=220)
    examples = EXAMPLES[1:3]  # of unequal length: padding is no label either
    expected, with_prompt = (
        response_loss(model, tokenizer, examples, flag) for flag in (False, True)
    )
    [step] = train(model, tokenizer, read_adapter(model), training=training, examples=examples)
    assert step.loss == pytest.approx(expected, rel=1e-5)
    # negative control: prompt tokens would have changed it
    assert abs(step.loss - with_prompt) > 1e-2


def test_what_does_not_fit_the_model_is_refused_and_changes_nothing(
    model: Any, tokenizer: Any
) -> None:
    start = read_adapter(model)
    wide = {
        module: LoRAPair(torch.ones(4, 33), pair.B, pair.scaling) for module, pair in start.items()
    }
    ranked = {
        module: LoRAPair(torch.ones(5, 32), torch.ones(pair.shape[0], 5), pair.scaling)
        for module, pair in start.items()
    }
    fewer = {module: start[module] for module in list(start)[1:]}
    scaled = {module: LoRAPair(pair.A, pair.B, 7.0) for module, pair in start.items()}
    for pairs in (wide, ranked, fewer, scaled):
        with pytest.raises(LayoutMismatch):
            write_adapter(model, Adapter(pairs))
    with pytest.raises(KindMismatch):
        write_adapter(model, factor_delta(start, start))
    with pytest.raises(KindMismatch):
        next(local_steps(model, tokenizer, EXAMPLES, factor_delta(start, start), QUICK, 0))
    assert torch.equal(vector(read_adapter(model)), vector(start))


# --- shadow gradients, and what other optimisers need


def gradients(
    model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int
) -> dict[str, torch.Tensor]:
    """The definition: autograd's gradient of the mean over the examples of their batches' mean
    losses.
    """
    encoded = [encode(example, tokenizer, QUICK.max_length) for example in examples]
    batches = [encoded[at : at + batch_size] for at in range(0, len(encoded), batch_size)]
    total = sum(
        len(batch) / len(encoded) * model.eval()(**local.collate(batch, 0)).loss
        for batch in batches
    )
    parameters = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def trained_start(model: Any) -> Adapter:
    """An adapter whose B is not zero."""
    generator = torch.Generator().manual_seed(3)
    pairs = {
        name: LoRAPair(pair.A, torch.randn(pair.B.shape, generator=generator), pair.scaling)
        for name, pair in read_adapter(model).items()
    }
    return Adapter(pairs, base_model="org/base")


@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_shadow_gradient_is_minus_the_sign_of_the_gradient(
    tokenizer: Any, batch_size: int
) -> None:
    model = attach_lora(tiny.llama(std=0.2), LORA, seed=0)  # its dropout has no part in it
    start = trained_start(model)
    training = LocalTraining(lr=9.0, steps=7, batch_size=batch_size, max_length=220)
    step = shadow_gradient(model, tokenizer, EXAMPLES, start, training)
    write_adapter(model, start)
    expected = gradients(model, tokenizer, EXAMPLES, batch_size)
    assert len(expected) == 2 * len(step)
    for name, gradient in expected.items():
        module, _, factor = (
            name.removeprefix("base_model.model.")
            .removesuffix(".default.weight")
            .rpartition(".lora_")
        )
        assert np.array_equal(step[module].factor(factor), -gradient.sign())
    assert (step.kind, step.base_model) == ("factor_delta", "org/base")
    other = shadow_gradient(model, tokenizer, EXAMPLES[:2], start, training)
    # negative control: other examples, another gradient
    assert not torch.equal(vector(other), vector(step))


def test_a_shadow_gradient_is_the_direction_of_the_first_step(tokenizer: Any) -> None:
    model = attach_lora(tiny.llama(std=0.2), STILL, seed=0)
    start = read_adapter(model)
    once = LocalTraining(lr=1e-3, steps=1, batch_size=5, max_length=220)
    [first] = train(model, tokenizer, start, training=once)
    step = shadow_gradient(model, tokenizer, EXAMPLES, start, once)
    for module, pair in step.items():
        moved = first.delta[module].B
        assert np.array_equal(pair.B[abs(moved) > 1e-4], np.sign(moved[abs(moved) > 1e-4]))
        assert (abs(moved) > 1e-4).mean() > 0.9


def test_a_frozen_a_is_not_trained_and_has_no_gradient(tokenizer: Any) -> None:
    model = attach_lora(tiny.llama(), LORA, seed=0, frozen_a=True)
    assert torch.equal(
        vector(read_adapter(model)), vector(read_adapter(attach_lora(tiny.llama(), LORA, seed=0)))
    )
    start = trained_start(model)
    for delta in (
        train(model, tokenizer, start)[-1].delta,
        shadow_gradient(model, tokenizer, EXAMPLES, start, QUICK),
    ):
        assert all(not pair.A.any() and pair.B.any() for pair in delta.values())
    free = attach_lora(tiny.llama(), LORA, seed=0)
    # negative control
    assert all(pair.A.any() for pair in train(free, tokenizer, start)[-1].delta.values())


def test_examples_in_training_order_are_the_batches_of_the_steps(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    collate = local.collate

    def recording(batch: Sequence[Tokens], pad_id: int) -> dict[str, torch.Tensor]:
        seen.extend(tuple(tokens.ids) for tokens in batch)
        return collate(batch, pad_id)

    monkeypatch.setattr(local, "collate", recording)
    orders = set()
    for seed in range(4):
        seen.clear()
        train(
            model,
            tokenizer,
            read_adapter(model),
            seed=seed,
            training=LocalTraining(lr=1e-3, steps=3, batch_size=2, max_length=220),
        )
        expected = [
            tuple(encode(example, tokenizer, 220).ids)
            for example in in_training_order(EXAMPLES, seed)
        ]
        assert seen[: len(EXAMPLES)] == expected
        orders.add(tuple(expected))
    assert len(orders) > 1


@pytest.mark.parametrize("modules", [("nonsense",), ("q_proj", "nonsense"), ("q_proj", "proj")])
def test_modules_that_the_model_lacks_are_refused(modules: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=rf"cannot put a LoRA on the model.*{modules[-1]}"):
        attach_lora(tiny.llama(), LoRASettings(target_modules=modules), seed=0)


def test_a_base_is_loaded_from_a_folder(tmp_path: Path) -> None:
    model, words = load_base(str(tiny.saved(tmp_path / "base")))
    assert model.dtype == torch.float32
    assert same(dict(model.state_dict()), dict(tiny.llama().state_dict()))
    assert words.encode("cat", add_special_tokens=False) == tiny.tokenizer().encode(
        "cat", add_special_tokens=False
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot load the base model"):
        load_base(str(tmp_path / "empty"))
