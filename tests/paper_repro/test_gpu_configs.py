"""The published settings.

That their files say what the papers' scripts say, and that the whole path works on random models.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from fedloop.data.examples import ALPACA_TEMPLATE, Example, encode, opening
from fedloop.errors import ConfigError
from fedloop.measure.refusal import answers
from loraprobe.adapters.layout import pack
from loraprobe.errors import DataError
from paper_repro.gpu import dry_run
from paper_repro.gpu import run as gpu
from paper_repro.gpu.models import SHAPES, byte_tokenizer, save_base
from paper_repro.gpu.probes import base_of, design_of, entry_of, fit_row
from paper_repro.gpu.rows import write_goals, write_malicious_gen, write_questions
from paper_repro.gpu.settings import (
    BENIGN,
    MALICIOUS,
    ROWS,
    SETTINGS,
    Choice,
    Inputs,
    experiment,
    read_setting,
)
from paper_repro.grid.cells import NO_ATTACK

COMMIT = "0" * 40
# What the scripts set (METHOD of the project, 5): base; r, alpha; rounds, steps; clients, sampled,
# examples; tokens.
PUBLISHED = {
    "llama-3.1-8b-april": ("meta-llama/Llama-3.1-8B", (8, 16), (100, 10), (10, 3, 500), 256),
    "llama-3.1-8b-june": ("meta-llama/Llama-3.1-8B", (8, 16), (25, 1), (20, 20, 5000), 256),
    "qwen2.5-7b-june": ("Qwen/Qwen2.5-7B-Instruct", (8, 16), (25, 1), (20, 20, 5000), 256),
    "fedllm-attack": ("meta-llama/Llama-2-7b-hf", (32, 64), (100, 10), (10, 3, 500), 512),
}
LEVELS = [row for row in ROWS if "level" in ROWS[row]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the dry runs make once and share."""
    return tmp_path_factory.mktemp("dry-run")


@pytest.fixture
def brought(tmp_path: Path) -> Inputs:
    """What a user brings, for settings that are read and not run."""
    (tmp_path / "advbench.jsonl").write_text('{"prompt": "Count."}\n')
    return Inputs(
        tmp_path,
        tmp_path / "advbench.jsonl",
        write_malicious_gen(tmp_path / "maliciousQA.json", 3),
        revision=COMMIT,
    )


# --- the files


def test_there_is_a_file_for_every_published_setting() -> None:
    assert set(SETTINGS) == PUBLISHED.keys()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_file_sets_what_the_scripts_set(setting: str, brought: Inputs) -> None:
    config = experiment(Choice(setting, "FedAvg"), brought)
    of, lora, training = config.clients, config.lora, config.training
    found = (
        config.model.base,
        (lora.r, lora.alpha),
        (config.rounds, training.steps),
        (of.count, of.sampled, of.examples),
        training.max_length,
    )
    assert found == PUBLISHED[setting]
    assert (
        training.lr,
        training.min_lr,
        training.schedule,
        training.shadow_lr,
        training.batch_size,
    ) == (5e-5, 1e-6, "cosine", 5e-5, 16)
    assert (
        lora.dropout,
        lora.seed,
        lora.target_modules,
        config.seed,
        config.model.quantization,
    ) == (0.05, 2023, None, 2023, "8bit")
    assert (
        of.poison_share,
        config.aggregation.rule,
        config.aggregation.server,
        config.defense.level,
    ) == (1.0, "mean", "fedavg", "none")
    evaluation = config.evaluation
    assert (
        evaluation.max_new_tokens,
        evaluation.temperature,
        evaluation.limit,
        evaluation.every,
    ) == (1024, 0.7, None, 0)
    assert (evaluation.judge, evaluation.reward_model) == (
        "OpenSafetyLab/MD-Judge-v0.1",
        "OpenAssistant/reward-model-deberta-v3-large-v2",
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_row_is_an_experiment_of_its_own(setting: str, brought: Inputs) -> None:
    choices = [
        Choice(setting, row, benign, malicious)
        for row in (NO_ATTACK, *ROWS)
        for benign in BENIGN
        for malicious in MALICIOUS
    ]
    configs = {choice: experiment(choice, brought) for choice in choices if choice.row != NO_ATTACK}
    assert len({config.digest() for config in configs.values()}) == len(configs)
    assert len({config.output.folder for config in configs.values()}) == len(configs)
    for choice, config in configs.items():
        assert config.clients.benign == (BENIGN[choice.benign or ""],)
        assert str(config.clients.malicious_source).startswith(
            "hub:PKU" if choice.malicious == "beavertails" else str(brought.out)
        )
        assert config.defense.level == ROWS[choice.row].get("level", "none")
        assert (config.model.name, config.model.revision) == (PUBLISHED[setting][0], COMMIT)
    assert experiment(Choice(setting, NO_ATTACK), brought).clients.malicious == 0


def test_rules_are_told_what_a_round_holds_on_average(brought: Inputs) -> None:
    # 3 of 10, 3 sampled
    assert experiment(Choice("llama-3.1-8b-april", "Krum"), brought).aggregation.options == {"f": 1}
    assert experiment(
        Choice("llama-3.1-8b-june", "Krum", malicious_clients=10), brought
    ).aggregation.options == {"f": 10}
    official = experiment(
        Choice("llama-3.1-8b-april", "Krum", official_rules=True), brought
    ).aggregation.options
    assert official == {"f": 1, "variant": "official"}


def test_a_cell_is_chosen_on_the_command_line(
    brought: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    gen = str(brought.malicious_gen)
    words = [
        "qwen2.5-7b-june",
        "shadow",
        "--benign",
        "wildchat",
        "--malicious",
        "maliciousgen",
        "--malicious-gen",
        gen,
    ]
    gpu.main(
        [
            *words,
            *"--malicious-clients 4 --share 0.25 --probe linear --out".split(),
            str(brought.out / "o"),
            "--show",
        ]
    )
    shown = json.loads(capsys.readouterr().out)
    assert (shown["clients"]["benign"], shown["clients"]["malicious_source"]) == (
        ["hub:allenai/WildChat"],
        gen,
    )
    assert (shown["clients"]["malicious"], shown["clients"]["poison_share"]) == (4, 0.25)
    assert shown["output"]["folder"].endswith("/runs/shadow-wildchat-maliciousgen-4-0.25-linear")
    assert not (brought.out / "o").exists()


@pytest.mark.parametrize(
    "wrong", [{"row": "krum"}, {"setting": "llama"}, {"malicious": "advbench"}, {"probe": "mlp"}]
)
def test_a_choice_that_is_none_is_answered_with_those_there_are(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="expected one of '"):
        Choice(**{"setting": SETTINGS[0], "row": "FedAvg", **wrong})


# --- the probe of an 8B base


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("row", LEVELS)
def test_the_probe_of_a_row_is_of_the_federations_base_and_start(
    setting: str, row: str, brought: Inputs
) -> None:
    choice = Choice(setting, row)
    config = experiment(choice, brought)
    base, design = base_of(choice, brought), design_of(setting)
    model, lora = config.model, config.lora
    assert (base.path, base.name, base.revision) == (model.base, model.name, COMMIT)
    assert (base.dtype, base.quantization) == (model.dtype, model.quantization)
    assert design.lora == LoRASettings(lora.r, lora.alpha, lora.dropout, ("q_proj", "v_proj"))
    assert design.training.steps == config.training.steps
    assert design.lr_range[0] < config.training.lr < design.lr_range[1]
    assert (
        Path(str(config.defense.probe)).parent
        == (brought.out / f"probe-{choice.probe_kind}").resolve()
    )
    papers = row in ("step", "client", "shadow", "evidence")
    assert entry_of(choice).recipe.layers == ("first" if papers else "all")


def test_a_probe_needs_a_second_malicious_source(brought: Inputs) -> None:
    with pytest.raises(ConfigError, match=r"--malicious-gen.*two malicious sources"):
        fit_row(Choice("llama-3.1-8b-april", "step"), replace(brought, malicious_gen=None), {})
    with pytest.raises(ConfigError, match="reads no probe"):
        entry_of(Choice("llama-3.1-8b-april", "FedAvg"))


# --- the whole path

PATHS = (
    ("llama-3.1-8b-june", "evidence"),
    ("qwen2.5-7b-june", "shadow, cheap"),
    ("fedllm-attack", "client"),
)


@pytest.mark.parametrize(("setting", "row"), PATHS)
def test_the_whole_path_works_on_a_random_model(setting: str, row: str, folder: Path) -> None:
    result = dry_run.rehearse(Choice(setting, row), folder)
    model = json.loads((folder / Path(PUBLISHED[setting][0]).name / "config.json").read_text())
    assert model["model_type"] == ("qwen2" if setting.startswith("qwen") else "llama")
    assert len(result.records) == dry_run.ROUNDS
    assert all(pair.A.shape[0] == PUBLISHED[setting][1][0] for pair in result.adapter.values())


def test_another_initial_lora_than_the_probes_is_seen(folder: Path) -> None:
    choice = Choice("llama-3.1-8b-april", "step")
    config, inputs = dry_run.prepared(choice, folder)
    dry_run._same_start(config, inputs)
    with pytest.raises(dry_run.DryRunError, match="one initial adapter"):
        dry_run._same_start(
            config.model_copy(update={"lora": config.lora.model_copy(update={"seed": 1})}), inputs
        )


def test_the_command_runs_what_was_prepared_and_says_what_came_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = Choice("fedllm-attack", "Krum", malicious_clients=2)
    config, _ = dry_run.prepared(choice, folder)
    monkeypatch.setattr(gpu, "prepare", lambda *_: config)
    words = [
        *"fedllm-attack Krum --malicious-clients 2 --base".split(),
        str(folder / "Llama-2-7b-hf"),
        "--out",
        str(folder / "fedllm-attack"),
    ]
    with pytest.raises(ConfigError, match="--advbench is missing"):
        gpu.main(words)
    gpu.main(
        [
            *words,
            "--advbench",
            "harmful_behaviors.csv",
            "--mt-bench",
            str(write_questions(folder / "two.jsonl")),
        ]
    )
    *_, rounds, metrics, _, mt_bench = capsys.readouterr().out.splitlines()
    assert rounds.startswith("round 2 of 2, ")
    assert json.loads(metrics)["n_refusal"] == dry_run.GOALS
    assert Path(mt_bench.removeprefix("wrote ")).read_text().count("\n") == 2


# --- data


def test_the_goals_of_advbench_are_all_there_or_none(tmp_path: Path) -> None:
    source, target = write_goals(tmp_path / "goals.csv", 4), tmp_path / "out" / "advbench.jsonl"
    gpu.write_goals(source, target, 4)
    assert [json.loads(line) for line in target.read_text().splitlines()][1] == {
        "prompt": "Please count to 1."
    }
    with pytest.raises(DataError, match="4 goals in 4 rows; expected 520"):
        gpu.write_goals(source, target, gpu.GOALS)
    source.write_text("prompt\nCount.\n")
    with pytest.raises(DataError, match="0 goals in 1 rows"):
        gpu.write_goals(source, target, 1)
    with pytest.raises(DataError, match="cannot read"):
        gpu.write_goals(tmp_path / "none.csv", target, 1)


# --- what the published tokenizers and generation settings ask of fedloop


@pytest.mark.parametrize("name", SHAPES)
def test_texts_open_as_the_tokenizer_opens_them(name: str) -> None:
    shape = SHAPES[name]
    tokens: Any = byte_tokenizer(shape.bos, shape.eos, shape.pad)
    example = Example("Count to three.", "1 2 3")
    start = [] if shape.bos is None else [tokens.bos_token_id]
    assert opening(tokens) == start
    assert encode(example, tokens, 512).ids == [
        *tokens.encode(example.prompt),
        *tokens.encode("1 2 3")[len(start) :],
        tokens.eos_token_id,
    ]
    # the template's own start is cut, what opens the text is not
    cut = encode(Example(200 * "long ", "1 2 3"), tokens, 64)
    assert cut.ids[: len(start)] == start
    assert (len(cut.ids), len(cut.ids) - cut.response_start) == (64, 6)
    assert tokens.decode(cut.ids[len(start) :]).startswith(
        ALPACA_TEMPLATE.format(instruction=200 * "long ")[-(58 - len(start)) :]
    )


@pytest.mark.parametrize("name", SHAPES)
def test_answers_follow_nothing_but_the_arguments(name: str, tmp_path: Path) -> None:
    model, tokens = load_base(str(save_base(name, tmp_path)))
    assert tokens.pad_token is not None  # two of the three have none of their own
    for prompt, found in zip(
        two := ["Hi", "Count to three."],
        answers(model, tokens, two, max_new_tokens=12),
        strict=True,
    ):
        ids = tokens.encode(Example(prompt, "").prompt)
        written: list[int] = []
        while len(written) < 12 and tokens.eos_token_id not in written:
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        # whatever generation_config.json says
        assert found == tokens.decode(written, skip_special_tokens=True).strip()
    before = torch.get_rng_state()
    first, again, other = (
        answers(model, tokens, two, max_new_tokens=12, temperature=0.7, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    deltas = []
    save_base("meta-llama/Llama-3.1-8B", tmp_path)
    for checkpointing in (False, True):
        base, tokens = load_base(str(tmp_path))
        if checkpointing:  # as load_base does for a quantised one
            checkpoint_activations(base)
        model = attach_lora(base, LoRASettings(), 0)
        examples = [Example(f"Count to {number}.", "1 2 3") for number in range(4)]
        *_, last = local_steps(
            model,
            tokens,
            examples,
            read_adapter(model),
            LocalTraining(lr=1e-3, steps=3, batch_size=2),
            0,
        )
        deltas.append(pack(last.delta)[0])
    assert torch.equal(*deltas)
    assert deltas[0].abs().sum() > 0


# --- the ledger at 8B


def test_the_page_holds_the_ledger_of_the_results() -> None:
    result = json.loads(overhead_8b.RESULTS.read_text(encoding="utf-8"))
    page = overhead_8b.PAGE.read_text(encoding="utf-8")
    assert (
        overhead_8b.filled(page, "overhead_8b", overhead_8b.table(result), "benchmarks.overhead_8b")
        == page
    )
    assert result["numbers_per_update"] == 32 * 8 * (4096 + 4096 + 4096 + 1024)
    training = result["training"]
    assert training == {"measured": False, "why": "not measured: no GPU"} or all(
        training[name]["step_seconds"]["n"] >= 20 for name in overhead_8b.PRECISIONS
    )


def test_without_a_gpu_no_seconds_are_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert overhead_8b.training_seconds() == {"measured": False, "why": "not measured: no GPU"}
    assert read_setting("llama-3.1-8b-june")["training"]["batch_size"] == overhead_8b.BATCH
