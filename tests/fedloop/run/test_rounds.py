"""Whole federations on the tiny Llama.

That the seed decides everything, what a run leaves, attacks, evidence, state.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloop.config import Config
from fedloop.data.clients import Client
from fedloop.errors import ConfigError, StateError
from fedloop.run.build import build_clients
from fedloop.run.simulate import simulate
from loraprobe.adapters.load import load_adapter
from tests.helpers import federated
from tests.helpers.federated import Files, defended, run, settings, untimed, vector

# --- the seed decides everything


SEEDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "attacked": {
        "clients": {"sampled": 2, "update_attack": "gaussian"},
        "aggregation": {"rule": "dnc", "options": {"f": 1, "coordinates": 50}},
    },
    "measured": {
        "evaluation": {
            "harmful": "builtin:harmful_prompts",
            "utility": "builtin:heldout_benign",
            "limit": 3,
            "max_new_tokens": 4,
            "every": 1,
        }
    },
}


@pytest.mark.parametrize("name", SEEDED)
def test_the_same_configuration_gives_the_same_bits_and_another_seed_does_not(
    tiny_files: Files, name: str
) -> None:
    first, again, other = (run(tiny_files, **SEEDED[name], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(vector(first.adapter), vector(again.adapter))
    assert [*map(untimed, first.records)] == [*map(untimed, again.records)]
    assert first.roles == again.roles
    assert not torch.equal(vector(first.adapter), vector(other.adapter))
    assert [one.losses for one in first.records] != [one.losses for one in other.records]


# --- what a run says and leaves


def test_a_run_leaves_records_adapters_and_roles(tiny_files: Files, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    config = settings(
        tiny_files,
        output={"folder": str(tmp_path / "run")},
        clients={"sampled": 3},
        evaluation={"utility": "builtin:heldout_benign", "limit": 2},
    )
    result = simulate(config, watch=lambda what, number, *_: seen.append((what, number)))
    assert torch.equal(vector(load_adapter(tmp_path / "run" / "adapter")), vector(result.adapter))
    initial = load_adapter(tmp_path / "run" / "initial")
    assert all(not pair.B.any() and pair.A.any() for pair in initial.values())
    assert initial.base_model == result.adapter.base_model == federated.NAME
    assert result.folder == tmp_path / "run"
    assert [record.round for record in result.records] == [1, 2]
    for record in result.records:
        assert len(record.factors) == 3
        assert math.isclose(sum(record.weights.values()), 1)
        assert record.losses.keys() == record.weights.keys() == record.num_examples.keys()
        assert set(record.num_examples.values()) == {4}
        assert record.seconds.keys() >= {"train", "evidence", "assess", "aggregate"}
        assert record.bytes == {"update": 3 * 4 * vector(result.adapter).numel(), "evidence": 0}
        assert not record.skipped
    assert [bool(record.metrics) for record in result.records] == [False, True]
    assert ["evaluate" in record.seconds for record in result.records] == [False, True]
    assert result.metrics == result.records[1].metrics
    assert {"loss", "n_utility"} <= result.metrics.keys()
    clients = [[("client", number)] * 3 for number in (1, 2)]
    assert seen == [*clients[0], ("round", 1), *clients[1], ("round", 2)]
    assert [role["role"] for role in result.roles.values()].count("malicious") == 1
    assert len(result.roles) == 4
    again = simulate(config)  # a finished run is read, not played
    assert again.records == result.records
    assert torch.equal(vector(again.adapter), vector(result.adapter))
    with pytest.raises(StateError, match="another configuration"):
        simulate({**config, "seed": 5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "other/model"}}, r"'tiny/llama'; model.base is 'other/model'"),
        ({"lora": {"r": 2}}, "cannot read this federation's updates: (LayoutMismatch|.*shape)"),
        ({"lora": {"target_modules": ["k_proj"]}}, "cannot read this federation's updates"),
        ({"lora": {"alpha": 16}}, "cannot read this federation's updates.*scaling"),
    ],
)
def test_a_probe_of_other_adapters_is_refused_before_anybody_trains(
    tiny_files: Files, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny_files, defense=defended(tiny_files), **changes)


def test_evading_a_probe_without_a_direction_is_refused_before_anybody_trains(
    tiny_files: Files, tmp_path: Path
) -> None:
    files = Files(tiny_files.base, federated.fitted("spectral").save_pretrained(tmp_path / "probe"))
    with pytest.raises(ConfigError, match="no single direction"):
        run(files, defense=defended(files), clients={"update_attack": "probe_evasion"})


# --- attacks on updates


def test_a_round_without_honest_clients_has_no_update_attack_and_says_so(tiny_files: Files) -> None:
    clients = {"malicious": 3, "sampled": 2, "examples": 3, "update_attack": "sign_flip"}
    result = run(tiny_files, rounds=4, clients=clients)
    roles = result.roles
    honest = [
        any(roles[client]["role"] == "benign" for client in record.factors)
        for record in result.records
    ]
    for record, made in zip(result.records, honest, strict=True):
        assert ("no update attack: got no honest client in this round" in record.note) != made
        assert not record.skipped
    assert len(set(honest)) == 2


# --- evidence


def test_every_level_runs_and_scores_what_it_reads(tiny_files: Files) -> None:
    # B of q (32, 4) and v (16, 4), in two layers
    for level, options, steps, numbers in (
        ("step", {}, 2, 2 * 384),
        ("client", {}, 1, 0),
        ("shadow", {}, 2, 2 * 384),
        ("evidence", {}, 2, 2 * 384),
        ("cumulative", {}, 1, 0),
        ("shadow", {"evidence": "shadow_gradient"}, 1, 384),
        ("cumulative", {"evidence": "shadow_gradient", "sketch": 64, "relative": True}, 1, 384),
    ):
        result = run(tiny_files, defense=defended(tiny_files, level, **options))
        for record in result.records:
            assert not record.reasons
            assert {len(scores) for scores in record.scores.values()} == {steps}
            assert record.bytes["evidence"] == 4 * 4 * numbers
            assert not record.skipped


# --- state


def test_clients_hold_what_the_configuration_says(tiny_files: Files, tmp_path: Path) -> None:
    def made(**clients: Any) -> list[Client]:
        return build_clients(Config.of(settings(tiny_files, clients=clients)))

    sources = ["builtin:benign/facts", "builtin:benign/code"]
    by_source = made(benign=sources, partition="by_source", malicious=0)
    assert [client.source for client in by_source] == sources * 2
    hard = {"hard_negatives": 1, "hard_negative_source": "builtin:refusals"}
    mixed = made(partition="mixtures", column="category", **hard)
    roles = ["benign", "benign", "hard_negative", "malicious"]
    assert sorted(client.role for client in mixed) == roles
    rows = [f'{{"instruction": "q{n}", "response": "a", "country": "c{n % 3}"}}' for n in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    columns = {
        "benign": [str(tmp_path / "data.jsonl")],
        "partition": "by_column",
        "column": "country",
        "malicious": 0,
        "examples": 3,
    }
    assert [client.source for client in made(**columns, count=3)] == ["c0", "c1", "c2"]
    message = "got 4; expected 3, the number of values of column 'country'"
    with pytest.raises(ConfigError, match=message):
        made(**columns)


def test_scalars_are_written_for_tensorboard_if_asked_for(
    tiny_files: Files, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    simulate(settings(tiny_files, rounds=1, output={"folder": str(tmp_path), "tensorboard": True}))
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_step_is_shorter_by_what_is_not_trusted(tiny_files: Files, tmp_path: Path) -> None:
    def moved(how: str) -> tuple[torch.Tensor, float]:
        done = run(
            tiny_files,
            rounds=1,
            defense={"max_norm_ratio": 1.0},
            aggregation={"rejected": how},
            output={"folder": str(tmp_path / how)},
        )
        start = vector(load_adapter(tmp_path / how / "initial"))
        return vector(done.adapter) - start, done.records[0].trust

    (whole, trust), (shorter, _) = moved("left_out"), moved("no_change")
    assert 0 < trust < 1
    assert torch.allclose(shorter, trust * whole, atol=1e-6)
