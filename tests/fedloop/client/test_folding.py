"""Residuals on the base's weights.

Always from the loaded ones, and off for as long as shadows need them off.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedloop.client.folding import FoldedBase
from fedloop.errors import AggregationError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SHAPES = {Q: (32, 32), V: (16, 32)}


def weight(model: Any, module: str) -> torch.Tensor:
    return model.get_submodule(f"base_model.model.{module}.base_layer").weight.data


def residual(seed: int, *modules: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        module: torch.randn(SHAPES[module], generator=generator, dtype=torch.float64)
        for module in modules
    }


@pytest.fixture
def model(peft_llama: Any) -> Any:
    return peft_llama()


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> set[str]:
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
        for name in left
        if not torch.equal(left[name], right[name])
    }


def test_residuals_add_up_on_the_loaded_weights(model: Any) -> None:
    loaded, base = weights(model), FoldedBase(model)
    assert base.residual == {}
    first, second = residual(1, Q, V), residual(2, Q, V)
    for one in (first, second):
        base.add(one)
    assert differing(weights(model), loaded) == {Q, V}
    for module in (Q, V):
        expected = (first[module].float() + second[module].float()) + loaded[
            f"base_model.model.{module}.base_layer.weight"
        ]
        assert torch.equal(weight(model, module), expected)
        assert base.residual[module].dtype == torch.float32


def test_a_resumed_base_is_the_same_to_the_bit(peft_llama: Any) -> None:
    whole, resumed = (peft_llama() for _ in range(2))
    base = FoldedBase(whole)
    for seed in range(5):
        base.add(residual(seed, Q, V))
    FoldedBase(resumed).set(base.residual)
    assert not differing(weights(whole), weights(resumed))
    other = peft_llama()
    FoldedBase(other).set(residual(9, Q, V))
    assert differing(weights(whole), weights(other)) == {Q, V}  # negative control


def test_unfolded_is_the_base_as_it_was_loaded(model: Any) -> None:
    loaded, base = weights(model), FoldedBase(model)
    with base.unfolded():
        assert not differing(weights(model), loaded)
    base.add(residual(1, Q, V))
    folded = weights(model)
    with base.unfolded():
        assert not differing(weights(model), loaded)
    assert not differing(weights(model), folded)
    with pytest.raises(KeyError), base.unfolded():
        raise KeyError
    assert not differing(weights(model), folded)
    assert differing(folded, loaded) == {Q, V}


def test_what_is_set_replaces_all_that_was_there(model: Any) -> None:
    loaded, base = weights(model), FoldedBase(model)
    base.add(residual(1, Q, V))
    base.set(residual(2, Q))
    assert differing(weights(model), loaded) == {Q}
    base.set({})
    assert not differing(weights(model), loaded)


def test_a_half_precision_base_keeps_the_sum_in_full(model: Any) -> None:
    model.to(torch.bfloat16)
    base, small = FoldedBase(model), 1e-4 * torch.ones(SHAPES[Q])
    loaded = weight(model, Q).clone()
    for _ in range(300):
        # each is lost in rounding where the weight is large; the sum of 0.03 is not
        base.add({Q: small})
    assert weight(model, Q).dtype == torch.bfloat16
    assert torch.equal(weight(model, Q), (loaded.float() + base.residual[Q]).to(torch.bfloat16))
    one_by_one = loaded.clone()
    for _ in range(300):
        one_by_one += small.to(torch.bfloat16)
    assert not torch.equal(one_by_one, weight(model, Q))  # negative control


def test_a_quantised_base_is_refused(model: Any) -> None:
    layer = model.get_submodule(f"base_model.model.{Q}.base_layer")
    layer.weight = torch.nn.Parameter(torch.zeros(SHAPES[Q], dtype=torch.int8), requires_grad=False)
    before = weights(model)
    with pytest.raises(AggregationError, match=r"int8 weights.*not quantised"):
        FoldedBase(model).add(residual(1, Q))
    assert not differing(weights(model), before)
