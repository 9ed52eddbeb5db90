"""What is measured of a global model, by whom, and the model that a run's folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedloop.client.training import read_adapter
from fedloop.config import Config
from fedloop.errors import ConfigError, StateError
from fedloop.measure import measurement as measuring
from fedloop.measure.measurement import Measurement
from fedloop.measure.refusal import refuses_by_rule, refuses_strictly
from fedloop.run.simulate import global_model, simulate
from fedloop.sections import EvaluationConfig
from loraprobe.adapters.load import load_adapter
from tests.helpers import tiny
from tests.helpers.boxed import fed
from tests.helpers.federated import Files, settings

SOURCES = {
    "harmful": "builtin:harmful_prompts",
    "safe": "builtin:safe_prompts",
    "utility": "builtin:heldout_benign",
}


def test_the_measures_are_shares_and_means_over_the_chosen_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    canned = {
        "refusal": ["I'm sorry, I can't help.", "He was an actor.", "Sure.", "No."],
        "over_refusal": ["Sure."] * 3 + ["Sorry, no."],
    }
    replies, judged = iter(canned.values()), []
    judge = SimpleNamespace(judge=lambda *asked: judged.append(asked) or [True, False] * 2)
    rewards = SimpleNamespace(score=lambda questions, answers: [0.0, 1.0, 2.0, 3.0])
    models = {"org/judge": judge, "org/reward": rewards}
    for name in ("MDJudge", "RewardModel"):
        kind = SimpleNamespace(from_pretrained=models.__getitem__)
        monkeypatch.setattr(measuring, name, kind)
    monkeypatch.setattr(measuring, "answers", lambda model, tokenizer, prompts, **_: next(replies))
    known = {"loss": 1.5, "rouge_l": 0.25}
    monkeypatch.setattr(measuring, "utility", lambda model, tokenizer, pairs, **_: dict(known))
    config = EvaluationConfig(**SOURCES, limit=4, judge="org/judge", reward_model="org/reward")
    measure = Measurement.of(config, 0, 64)
    metrics = measure(None, None)
    rules = {"rule": refuses_by_rule, "strict": refuses_strictly}
    shares = {
        f"{name}_{how}": sum(map(rule, group)) / 4
        for name, group in canned.items()
        for how, rule in rules.items()
    }
    # "was an" is what Rule over-counts
    assert shares["refusal_rule"] == 0.5 > shares["refusal_strict"] == 0.25
    sizes = {"n_refusal": 4, "n_over_refusal": 4, "n_utility": 4, "n_judged": 4}
    assert metrics == {**shares, **sizes, **known, "judged_safe": 0.5, "reward": 1.5}
    assert judged == [(measure.prompts["refusal"], canned["refusal"])]
    assert set(measure.names) == metrics.keys() - sizes.keys()


def test_the_choice_of_prompts_follows_from_the_seed() -> None:
    first, again, other = (
        Measurement.of(EvaluationConfig(**SOURCES, limit=5), seed, 64) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.prompts != other.prompts
    assert len(Measurement.of(EvaluationConfig(**SOURCES), 0, 64).prompts["refusal"]) > 5
    assert not Measurement.of(EvaluationConfig(), 0, 64)


@pytest.fixture(scope="module")
def run(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose aggregation folds residuals into the base."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    values = settings(
        tiny_files,
        aggregation={"lora": "exact"},
        output={"folder": str(folder)},
        evaluation={**SOURCES, "limit": 2, "max_new_tokens": 4},
    )
    simulate(values)
    return folder


def test_a_real_measurement_ends_in_the_record(run: Path) -> None:
    *_, last = (run / "records.jsonl").read_text().splitlines()
    metrics: dict[str, Any] = json.loads(last)["metrics"]
    assert {
        *"refusal_rule refusal_strict over_refusal_rule over_refusal_strict loss rouge_l".split()
    } <= metrics.keys()
    assert metrics["n_utility"] == 2
    assert metrics["loss"] > 0


def test_the_global_model_holds_the_last_lora_and_the_residuals(run: Path) -> None:
    model, _ = global_model(run)
    final = load_adapter(run / "adapter")
    assert all(
        np.array_equal(pair.B, final[module].B) and np.array_equal(pair.A, final[module].A)
        for module, pair in read_adapter(model).items()
    )
    plain = dict(tiny.llama().named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    assert not model.get_submodule(
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer"
    ).weight.equal(plain)


def test_a_run_without_a_finished_round_has_no_global_model(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(StateError, match="no finished round"):
        global_model(tmp_path)


def test_mt_bench_answers_are_written_for_fastchat(run: Path, tmp_path: Path) -> None:
    questions, out = tmp_path / "question.jsonl", tmp_path / "model.jsonl"
    asked = {"category": "writing", "turns": ["say one", "say two"]}
    lines = [json.dumps({"question_id": number, **asked}) for number in (82, 81)]
    questions.write_text("\n".join(lines))
    fed("mt-bench", run, questions, "--out", out, "--max-new-tokens", "3")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 82]
    assert all(row["model_id"] == "model" and len(row["choices"][0]["turns"]) == 1 for row in rows)


def test_a_judge_needs_something_to_judge() -> None:
    values = {"model": {"base": "b"}, "clients": {"benign": ["builtin:benign"]}}
    with pytest.raises(ConfigError, match="harmful is missing"):
        Config.of({**values, "evaluation": {"judge": "org/judge"}})
