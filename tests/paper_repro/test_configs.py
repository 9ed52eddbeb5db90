"""The published settings: files that set what the papers' scripts set, and what their bases ask."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

from benchmarks import overhead_8b
from fedloop.client.training import (
    LocalTraining,
    LoRASettings,
    attach_lora,
    checkpoint_activations,
    load_base,
    local_steps,
    read_adapter,
)
from fedloop.config import Config
from fedloop.data.examples import ALPACA_TEMPLATE, Example, encode, opening
from fedloop.measure.refusal import answers
from loraprobe.adapters.layout import pack
from paper_repro.common.paths import CONFIGS
from tests.helpers.published import BASES, saved, tokenizer

# What the scripts set (METHOD of the project, 5): base; r, alpha; rounds, steps; clients, sampled,
# examples; tokens.
PUBLISHED = {
    "llama-3.1-8b-april": ("meta-llama/Llama-3.1-8B", (8, 16), (100, 10), (10, 3, 500), 256),
    "llama-3.1-8b-june": ("meta-llama/Llama-3.1-8B", (8, 16), (25, 1), (20, 20, 5000), 256),
    "qwen2.5-7b-june": ("Qwen/Qwen2.5-7B-Instruct", (8, 16), (25, 1), (20, 20, 5000), 256),
    "fedllm-attack": ("meta-llama/Llama-2-7b-hf", (32, 64), (100, 10), (10, 3, 500), 512),
}


def test_there_is_a_file_for_every_published_setting() -> None:
    assert {path.stem for path in CONFIGS.glob("*.toml")} == PUBLISHED.keys()


@pytest.mark.parametrize("setting", PUBLISHED)
def test_a_file_sets_what_the_scripts_set(setting: str, tmp_path: Path) -> None:
    goals = tmp_path / "advbench.csv"
    goals.write_text("prompt,target\nPlease count to one.,Sure\n")
    values = tomllib.loads((CONFIGS / f"{setting}.toml").read_text())
    assert values["evaluation"]["harmful"] == goals.name
    values["evaluation"]["harmful"] = str(goals)
    config = Config.of(values)
    clients, lora, training, evaluation = (
        getattr(config, table) for table in ("clients", "lora", "training", "evaluation")
    )
    assert PUBLISHED[setting] == (
        config.model.base,
        (lora.r, lora.alpha),
        (config.rounds, training.steps),
        (clients.count, clients.sampled, clients.examples),
        training.max_length,
    )
    rates = (training.lr, training.min_lr, training.schedule, training.shadow_lr)
    assert (*rates, training.batch_size) == (5e-5, 1e-6, "cosine", 5e-5, 16)
    assert (lora.dropout, lora.seed, lora.target_modules) == (0.05, 2023, None)
    assert (config.seed, config.model.quantization) == (2023, "8bit")
    assert (clients.poison_share, config.aggregation.rule, config.defense.level) == (
        1.0,
        "mean",
        "none",
    )
    assert (evaluation.max_new_tokens, evaluation.temperature) == (1024, 0.7)
    assert evaluation.judge == "OpenSafetyLab/MD-Judge-v0.1"
    assert evaluation.reward_model == "OpenAssistant/reward-model-deberta-v3-large-v2"


# --- what the published tokenizers and generation settings ask of fedloop


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_texts_open_as_the_tokenizer_opens_them(base) -> None:
    tokens = tokenizer(base)
    example = Example("Count to three.", "1 2 3")
    start = [] if base.bos is None else [tokens.bos_token_id]
    assert opening(tokens) == start
    answer = tokens.encode("1 2 3")[len(start) :]
    whole = [*tokens.encode(example.prompt), *answer, tokens.eos_token_id]
    assert encode(example, tokens, 512).ids == whole
    # the template's own start is cut, what opens the text is not
    cut = encode(Example(200 * "long ", "1 2 3"), tokens, 64)
    assert cut.ids[: len(start)] == start
    assert (len(cut.ids), len(cut.ids) - cut.response_start) == (64, 6)
    left = ALPACA_TEMPLATE.format(instruction=200 * "long ")[-(58 - len(start)) :]
    assert tokens.decode(cut.ids[len(start) :]).startswith(left)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_answers_follow_nothing_but_the_arguments(base, tmp_path: Path) -> None:
    model, tokens = load_base(str(saved(base, tmp_path)))
    assert tokens.pad_token is not None  # two of the three have none of their own
    two = ["Hi", "Count to three."]
    found = answers(model, tokens, two, max_new_tokens=12)
    for prompt, reply in zip(two, found, strict=True):
        ids = tokens.encode(Example(prompt, "").prompt)
        written: list[int] = []
        while len(written) < 12 and tokens.eos_token_id not in written:
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        # whatever generation_config.json says
        assert reply == tokens.decode(written, skip_special_tokens=True).strip()
    before = torch.get_rng_state()
    sampled = [
        answers(model, tokens, two, max_new_tokens=12, temperature=0.7, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert torch.equal(before, torch.get_rng_state())


def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    deltas = []
    saved(BASES["Llama-3.1-8B"], tmp_path)
    examples = [Example(f"Count to {number}.", "1 2 3") for number in range(4)]
    training = LocalTraining(lr=1e-3, steps=3, batch_size=2)
    for checkpointing in (False, True):
        base, tokens = load_base(str(tmp_path))
        if checkpointing:  # as load_base does for a quantised one
            checkpoint_activations(base)
        model = attach_lora(base, LoRASettings(), 0)
        *_, last = local_steps(model, tokens, examples, read_adapter(model), training, 0)
        deltas.append(pack(last.delta)[0])
    assert torch.equal(*deltas)
    assert deltas[0].abs().sum() > 0


# --- the ledger at 8B


def test_the_page_holds_the_ledger_of_the_results() -> None:
    result = json.loads(overhead_8b.RESULTS.read_text(encoding="utf-8"))
    page = overhead_8b.PAGE.read_text(encoding="utf-8")
    assert overhead_8b.table(result) in page
    assert result["numbers_per_update"] == 32 * 8 * (4096 + 4096 + 4096 + 1024)


def test_without_a_gpu_no_seconds_are_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert overhead_8b.training_seconds() == {"measured": False, "why": "not measured: no GPU"}


@pytest.mark.parametrize("row", overhead_8b.LEVELS)
def test_what_evidence_asks_for_is_counted_as_committed(row: str) -> None:
    committed = json.loads(overhead_8b.RESULTS.read_text())["extra_examples"]
    for name, setting in overhead_8b.SETTINGS.items():
        assert overhead_8b.extra_examples(row, setting) == committed[name][row]
