"""An adapter on a model reads as PEFT has it, leaves nothing behind, and vetoes in a federation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedloop.client.shared_prefix import Text, tokens_of
from fedloop.client.training import LoRASettings, attach_lora, load_base, read_adapter
from fedloop.data.examples import Example
from fedloop.errors import ConfigError, DataError
from fedloop.measure.behaviour import OPENING, Behaviour, Prompts, worn
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.pair import LoRAPair
from tests.helpers.federated import Files, run

ASKED = Prompts(("Name a colour.", "Write a long letter."), ("Count to ten.",), asked=(2, 1))


def grown(adapter: Adapter, size: float) -> Adapter:
    """With a B of this size."""
    rng = np.random.default_rng(0)
    pairs = {
        name: LoRAPair(
            pair.A, (size * rng.normal(size=pair.B.shape)).astype(np.float32), pair.scaling
        )
        for name, pair in adapter.items()
    }
    return Adapter(pairs, base_model=adapter.base_model)


def test_an_adapter_reads_as_peft_has_it_and_leaves_nothing_behind(tiny_files: Files) -> None:
    base, tokenizer = load_base(str(tiny_files.base))
    before = Behaviour(base, tokenizer, ASKED, 1.0).likelihoods(ASKED.harmful)
    model = attach_lora(base, LoRASettings(4, 8, 0.0, ["q_proj", "v_proj"]), 0, frozen_a=True)
    reader = Behaviour(model, tokenizer, ASKED, 1.0)
    adapter = grown(read_adapter(model), 0.3)
    trained = [p.requires_grad for p in model.parameters()]
    with worn(model, adapter):
        found = reader.likelihoods(ASKED.harmful)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert reader.likelihoods(ASKED.harmful) == pytest.approx(before, abs=1e-4)
    modules = dict(model.get_base_model().named_modules())
    with torch.no_grad():  # the same by the weights themselves
        for name, pair in adapter.items():
            change = torch.from_numpy(pair.scaling * np.asarray(pair.B) @ np.asarray(pair.A))
            modules[name].base_layer.weight += change
    text = Text.of(tokenizer)
    expected = []
    for prompt in ASKED.harmful:
        ids, start = tokens_of(Example(prompt, OPENING), tokenizer, text, 200)
        whole = torch.tensor([ids[:-1]])
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0].log_softmax(-1)
        expected.append(sum(float(logits[at - 1, ids[at]]) for at in range(start, len(ids) - 1)))
    assert found == pytest.approx(expected, abs=1e-3)
    assert found != pytest.approx(before, abs=1e-2)  # negative control


def test_scores_are_of_the_rounds_prompts_and_what_does_not_fit_has_none(tiny_files: Files) -> None:
    base, tokenizer = load_base(str(tiny_files.base))
    model = attach_lora(base, LoRASettings(4, 8, 0.0, ["q_proj", "v_proj"]), 0, frozen_a=False)
    start = read_adapter(model)
    other = Adapter({"model.layers.9.x": next(iter(start.values()))})
    reader = Behaviour(model, tokenizer, ASKED, 1.0)
    found = reader.read(1, start, {"same": start, "new": grown(start, 0.3), "other": other})
    assert found["same"] == 0.0
    assert math.isfinite(found["new"])
    assert found["new"] != 0.0
    assert math.isnan(found["other"])
    many = Prompts(tuple(map(str, range(50))), tuple(map(str, range(50))), seed=3)
    assert many.of_round(1) == many.of_round(1) != many.of_round(2)
    assert len(set(many.of_round(1)["harmful"])) == 16


def test_a_federation_refuses_what_its_prompts_refuse(tiny_files: Files, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": f"{kind} {n}", "kind": kind} for kind in ("harmful", "benign") for n in range(16)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match="behaviour_cut"):
        run(tiny_files, defense={"behaviour": str(path)})
    plain = run(tiny_files)
    for cut, skipped in ((-1e6, True), (1e6, False)):
        found = run(tiny_files, defense={"behaviour": str(path), "behaviour_cut": cut})
        assert [record.skipped for record in found.records] == [skipped] * 2
        if not skipped:
            assert [r.weights for r in found.records] == [r.weights for r in plain.records]
        else:
            assert all("behaviour" in r for r in found.records[0].reasons.values())


def test_prompts_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(DataError, match="cannot be read"):
        Prompts.read(path)
    for line in ('{"prompt": "x"}', "[1]", '{"prompt": " ", "kind": "benign"}', "{"):
        path.write_text(line)
        with pytest.raises(DataError, match="line 1"):
            Prompts.read(path)
    path.write_text('{"prompt": "x", "kind": "benign"}')
    with pytest.raises(ConfigError, match="0 harmful prompts"):
        Prompts.read(path)
    for cut in (math.nan, "x", None, True):
        with pytest.raises(ConfigError, match="cut"):
            Behaviour(None, None, ASKED, cut)
    for wrong in ({"asked": 3}, {"asked": (1,)}, {"asked": (1.0, 1)}, {"seed": "x"}):
        with pytest.raises(ConfigError, match="asked"):
            replace(ASKED, **wrong)
    for pool in ("Name a colour.", ("Name a colour.", " "), None):
        with pytest.raises(ConfigError, match=r"harmful: got .* a list of prompts"):
            replace(ASKED, harmful=pool)
