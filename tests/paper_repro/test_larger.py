"""The grid on the larger base model: what it is made of, and that what is kept of it is whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedloop.client.training import load_base
from figures import trust
from loraprobe import Probe
from loraprobe.errors import DataError
from loraprobe.featurizer import FeatureRecipe
from paper_repro.common import setting
from paper_repro.common.held_out import PROBES, UNSEEN_BENIGN
from paper_repro.grid import larger
from paper_repro.grid import lines as grid_lines
from paper_repro.grid.cells import FIRST, FULL, LARGER, NO_ATTACK, ROWS, SOURCES, Cell, grid
from zoo import train_base
from zoo.labelled.client_design import SHARES, plan, twin_of
from zoo.labelled.sources import BENIGN, HARD_NEGATIVE, MALICIOUS


def test_the_grid_is_the_first_ones_without_the_rule_that_nobody_made_for_this_base() -> None:
    ours = {replace(cell, base=setting.BASE) for cell in grid(LARGER)}
    assert ours == {cell for cell in grid(FIRST) if cell.row != "cumulative, mass-mean"}
    assert not set(grid(LARGER)) & set(grid(FULL))
    cell = Cell("shadow", 5, 0.25, 2, base=setting.LARGER_BASE)
    assert str(cell) == "shadow/5/0.25/2/jailbreakbench/first/chat-11m"
    assert Cell.named(str(cell)) == cell


def test_clients_train_at_the_rate_that_the_committed_runs_choose() -> None:
    rows, lines = json.loads(larger.RATES_FILE.read_text()), grid_lines.read_lines()
    assert setting.BASES[setting.LARGER_BASE].lr == larger.nearest_rate(rows, lines)
    assert {(row["lr"], row["malicious"]) for row in rows} == {
        (lr, n) for lr in larger.RATES for n in (0, larger.ATTACK.malicious)
    }
    other = [
        {**row, "metrics": {"refusal_strict": 0.183 if row["lr"] == 5e-3 else 0.9}} for row in rows
    ]
    assert larger.nearest_rate(other, lines) == 5e-3


def test_the_probe_is_of_this_base_and_met_neither_the_attack_nor_two_kinds_of_the_clients() -> (
    None
):
    probe = Probe.from_pretrained(
        PROBES / setting.probe_name("linear", SOURCES[0], base=setting.LARGER_BASE)
    )
    assert (probe.base_model, probe.featurizer.recipe) == (larger.MODEL.name, FeatureRecipe.all_b())
    assert set(probe.facts["held_out"]) == {SOURCES[0], twin_of(SOURCES[0]), *UNSEEN_BENIGN}
    unseen = {SOURCES[0], twin_of(SOURCES[0]), *UNSEEN_BENIGN}
    assert probe.facts["training"]["n"] == sum(
        not unseen & {client.source, client.host} for client in plan(larger.design())
    )


def test_every_cell_of_unseen_sources_is_there_for_both_readers() -> None:
    rows = json.loads(larger.CELLS_FILE.read_text())
    found = [(row["reader"], row["malicious"], row["benign"], row["share"]) for row in rows]
    wanted = {
        (r.name, m, b, s)
        for r in larger.TRIED
        for m in MALICIOUS
        for b in (*BENIGN, *HARD_NEGATIVE)
        for s in SHARES
    }
    assert len(found) == len(set(found))
    assert set(found) == wanted


def test_the_base_is_what_its_facts_say_and_the_better_of_two() -> None:
    folder = larger.MODEL.path
    facts = json.loads((folder / "facts.json").read_text())
    model, tokenizer = load_base(str(folder))
    assert (model.num_parameters(), model.dtype) == (facts["parameters"], torch.float32)
    assert len(tokenizer) == facts["config"]["vocab_size"] == train_base.LARGER.vocab_size
    assert facts["config"]["hidden_size"] == model.config.hidden_size
    gains = {
        one["rates_times"]: one["refused_strict"]["advbench"] - one["refused_strict"]["xstest_safe"]
        for one in facts["candidates"]
    }
    best = max(gains, key=lambda times: gains[times])
    assert set(gains) == set(larger.SLOWER)
    assert facts["config"]["phases"][0]["lr"] == pytest.approx(
        train_base.LARGER.phases[0].lr * best
    )
    assert facts["refusal"]["advbench"]["refused_strict"] == next(
        one["refused_strict"]["advbench"]
        for one in facts["candidates"]
        if one["rates_times"] == best
    )


def test_a_row_of_the_larger_grid_is_of_the_configuration_of_its_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setting, "FILES", tmp_path)
    for name in (*BENIGN, *MALICIOUS, "prompts_advbench", "prompts_xstest_safe", "utility"):
        (tmp_path / f"{name}.jsonl").write_text("")
    config = Cell("cumulative", 5, 1.0, 0, base=setting.LARGER_BASE).config
    assert (config.model.base, config.model.name) == (str(larger.MODEL.path), larger.MODEL.name)
    assert config.defense.probe is not None
    assert str(config.defense.probe).endswith("linear-without-jailbreakbench-chat-11m")
    assert {
        line["row"] for line in grid_lines.read_lines() if line.get("base") == setting.LARGER_BASE
    } <= {NO_ATTACK, *ROWS}


def test_the_figure_draws_the_lines_and_refuses_a_cell_that_was_not_run(tmp_path: Path) -> None:
    trust.main(["--out", str(tmp_path)])
    assert (tmp_path / "trust.png").stat().st_size > 10_000
    found = trust.chosen(grid_lines.read_lines(), "client", setting.LARGER_BASE, 1.0)
    assert [(line["seed"], line["base"], len(line["factors"]["malicious"])) for line in found] == [
        (n, setting.LARGER_BASE, 6) for n in (0, 1, 2)
    ]
    with pytest.raises(DataError, match=r"no run of step with 5 of 10 at 100% poison on chat-11m"):
        trust.chosen(
            [line for line in grid_lines.read_lines() if line["row"] != "step"],
            "step",
            setting.LARGER_BASE,
            1.0,
        )
