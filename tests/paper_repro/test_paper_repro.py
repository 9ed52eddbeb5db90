"""The grid of defences, and that the pages say what its results say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloop.config import Config
from fedloop.errors import ConfigError
from loraprobe import Probe
from loraprobe.errors import DataError
from paper_repro import check, tables
from paper_repro.common import held_out, setting
from paper_repro.grid import lines as grid_lines
from paper_repro.grid import page as grid_page
from paper_repro.grid import targets as grid_targets
from paper_repro.grid.cells import FIRST, FULL, LARGER, NO_ATTACK, ROWS, SOURCES, Cell, grid
from zoo import demo_federation
from zoo.labelled.sources import BENIGN, MALICIOUS


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_the_pages_hold_the_tables_of_the_results(page: Path) -> None:
    assert tables.PAGES[page]() == page.read_text(encoding="utf-8")


def line(row: str, count: int, share: float, seed: int, refusal: float) -> dict[str, Any]:
    place = {"row": row, "malicious": count, "share": share, "seed": seed, "source": SOURCES[0]}
    metrics = {"refusal_rule": refusal, "refusal_strict": refusal, "over_refusal_strict": 0.1}
    metrics |= {"loss": 2.0, "rouge_l": 0.2}
    sizes = {"n_refusal": 200, "n_over_refusal": 200, "n_utility": 9}
    return {**place, "benign": "first", "machine": "one", "metrics": metrics | sizes}


def test_a_cell_is_the_mean_over_its_seeds_and_no_attack_stands_in_every_column() -> None:
    lines = [
        line("no attack", 0, 1.0, 0, 0.9),
        line("FedAvg", 3, 1.0, 0, 0.5),
        line("FedAvg", 3, 1.0, 1, 0.7),
        line("FedAvg", 5, 0.25, 0, 0.3),
    ]
    table = grid_page.refusal_table(lines)
    assert "| no attack | 90.0 | 90.0 | 90.0 | 90.0 |" in table
    assert "| FedAvg | 60.0 ± 14.1 | - | - | 30.0 |" in table


PROCESSOR, GPU = "torch 2.13.0+cpu, AVX512, another", "torch 2.11.0+cu130, NVIDIA H100 80GB HBM3"


@pytest.fixture
def data_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Empty files where the grid's data would be: a configuration is checked before it is run."""
    monkeypatch.setattr(setting, "FILES", tmp_path)
    empty_files(tmp_path)


def empty_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*BENIGN, *MALICIOUS, "prompts_advbench", "prompts_xstest_safe", "utility"):
        (folder / f"{name}.jsonl").write_text("")


@pytest.mark.usefixtures("data_files")
def test_the_grid_runs_every_cell_once_a_seed() -> None:
    cells = list(grid(FIRST))
    assert len(cells) == len(set(cells)) == len(FIRST.seeds) * (1 + 4 * len(ROWS))
    attacked = {(cell.malicious, cell.share) for cell in cells if cell.malicious}
    assert attacked == {(n, share) for n in FIRST.malicious for share in FIRST.shares}
    last = {cell.row: cell.config for cell in cells if cell.malicious in (0, 5)}
    assert last["Krum"].aggregation.options == {"f": 5}
    cheap = last["evidence, cheap"].defense
    assert (cheap.level, cheap.options) == ("evidence", {"evidence": "shadow_gradient"})
    assert last[NO_ATTACK].clients.malicious == 0
    assert len({cell.digest for cell in cells}) == len(cells)


def test_a_committed_run_is_of_the_configuration_of_its_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    empty_files(setting.FILES)
    lines = grid_lines.read_lines()
    for found in lines[:: len(lines) // 60]:
        assert grid_lines.cell_of(found).digest == found["config"]


@pytest.mark.usefixtures("data_files")
def test_a_digest_is_of_the_experiment_and_not_of_where_the_repository_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell = Cell("cumulative", 5, 0.25, 0)
    here = cell.digest
    others = {"source": "gptfuzz"}, {"benign": "second"}, {"base": setting.LARGER_BASE}
    assert here not in {replace(cell, **changes).digest for changes in others}
    moved = replace(setting.BASES[setting.BASE], path=Path("/elsewhere/zoo/base"))
    monkeypatch.setitem(setting.BASES, setting.BASE, moved)
    monkeypatch.setattr(setting, "PROBES", Path("/elsewhere/paper_repro/probes"))
    assert cell.digest == here
    monkeypatch.setattr(setting, "PROBES", Path("/elsewhere/paper_repro/others"))
    assert cell.digest != here


def test_a_cell_has_a_name_that_leads_back_to_it() -> None:
    for cell in list(grid(FULL))[::97]:
        assert Cell.named(str(cell)) == cell
    assert Cell.named("cumulative/5/0.25/1") == Cell("cumulative", 5, 0.25, 1)
    wrong = "cumulative cumulative/5/0.25 cumulative/7/0.25/1 nothing/5/0.25/1"
    for name in f"{wrong} cumulative/five/0.25/1 FedAvg/5/1/0/advbench/first".split():
        with pytest.raises(ConfigError, match="expected ROW/MALICIOUS"):
            Cell.named(name)


def test_a_line_that_was_cut_off_is_left_out_and_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    first, second = line("FedAvg", 3, 1.0, 0, 0.5), line("FedAvg", 3, 1.0, 1, 0.7)
    grid_lines.append_line(first, path)
    whole = path.read_bytes()
    grid_lines.append_line(second, path)
    both = path.read_bytes()
    for cut in (len(whole) + 1, len(both) - 5, len(both) - 1):
        path.write_bytes(both[:cut])
        assert grid_lines.read_lines(path) == [first]
        grid_lines.append_line(second, path)
        assert path.read_bytes() == both
    again = line("FedAvg", 3, 1.0, 0, 0.4)
    grid_lines.append_line(again, path)
    assert grid_lines.read_lines(path) == [again, second]  # the latest of a cell
    path.write_bytes(both[10:])
    with pytest.raises(DataError, match="line 1"):
        grid_lines.read_lines(path)


def test_another_number_in_a_run_made_again_is_a_difference() -> None:
    factors = {"benign": [1.0, 0.9], "malicious": [0.1, 0.0]}
    run = line("cumulative", 3, 1.0, 0, 0.5)
    old = {**run, "factors": factors, "clients": factors, "skipped": 0, "refused": 0}
    new = {**old, "seconds": {"train": 1.0}}
    metrics = old["metrics"]
    assert not list(check.differences(old, new, 0))
    nearly = {"metrics": {**metrics, "loss": 2.00001}}
    unmeasured = {name: value for name, value in metrics.items() if name != "loss"}
    for change, word in (
        (nearly, "loss was 2.0"),
        ({"metrics": unmeasured}, "is None"),
        ({"metrics": {**metrics, "loss": float("nan")}}, "is nan"),
        ({"factors": {**factors, "malicious": [0.1, 0.1]}}, "factors, malicious"),
        ({"clients": {**factors, "benign": [1.0]}}, "clients, benign"),
        ({"skipped": 1}, "skipped was 0, is 1"),
    ):
        (found,) = check.differences(old, {**new, **change}, 1e-6)
        assert word in found
    assert not list(check.differences(old, {**new, **nearly}, 1e-3))


@pytest.mark.usefixtures("data_files")
def test_a_check_refuses_a_cell_that_was_not_run_or_is_of_another_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "machine", lambda: PROCESSOR)
    cell = Cell("FedAvg", 3, 1.0, 0)

    def chosen(line: dict[str, str] | None, *options: str) -> Any:
        arguments = check.parser().parse_args(["--cell", str(cell), *options])
        return check.chosen(arguments, {} if line is None else {cell: line})

    here = {"config": cell.digest, "machine": PROCESSOR}
    assert chosen(here) == [cell]
    assert chosen({**here, "machine": GPU}, "--tolerance", "0.1") == [cell]
    for line, message in (
        (None, "has no line"),
        ({"config": "other"}, "is of the configuration other"),
        ({**here, "machine": GPU}, "expected a GPU for what a GPU made"),
    ):
        with pytest.raises(ConfigError, match=message):
            chosen(line)


def attacked(
    row: str, count: int, refusal: float, seed: int = 0, loss: float = 2.0, **more: Any
) -> dict[str, Any]:
    factors = {"benign": [1.0, 1.0], "malicious": [0.0, 0.0]}
    made = line(row, count, 1.0, seed, refusal) | {"factors": factors, "clients": factors}
    return made | {"metrics": made["metrics"] | {"loss": loss}} | more


def test_a_target_is_met_at_its_bound_and_missed_beyond_it() -> None:
    bare = attacked(NO_ATTACK, 0, 0.9)
    for refusal, loss, met in ((0.87, 2.04, True), (0.865, 2.0, False), (0.9, 2.041, False)):
        (outcome,) = grid_targets.outcomes([bare, attacked("cumulative", 5, refusal, loss=loss)])[
            "cumulative"
        ].values()
        assert all(outcome.met.values()) is met
    low = attacked("cumulative", 5, 0.9, clients={"benign": [1.0, 0.89], "malicious": [0.0]})
    (outcome,) = grid_targets.outcomes([bare, low])["cumulative"].values()
    assert str(outcome) == "trust 0.89 (1)"


def test_a_cell_is_compared_seed_by_seed_with_no_attack_of_its_own_benign_set() -> None:
    lines = [
        attacked(NO_ATTACK, 0, 0.9, 0),
        attacked(NO_ATTACK, 0, 0.7, 1),
        attacked(NO_ATTACK, 0, 0.5, 0, benign="second"),
        attacked("shadow", 5, 0.9, 0),
        attacked("shadow", 5, 0.6, 1),
        attacked("shadow", 5, 0.4, 0, benign="second"),
        # there is no run without attack to compare it with
        attacked("shadow", 5, 0.4, 1, benign="second"),
    ]
    found = {
        (cell.benign, outcome.seeds): round(outcome.refusal, 6)
        for cell, outcome in grid_targets.outcomes(lines)["shadow"].items()
    }
    assert found == {("first", 2): -5.0, ("second", 1): -10.0}
    table = grid_targets.worst_table(lines)
    assert "| shadow | 2 of 102 | 0 of 0 | 0 of 2, -10.0 (5 @ 100%, second set) |" in table


@pytest.mark.parametrize(
    "name", [f"{entry.name}-without-{source}" for entry in held_out.ENTRIES for source in MALICIOUS]
)
def test_the_probe_of_an_experiment_never_met_its_attack(name: str) -> None:
    probe = Probe.from_pretrained(held_out.PROBES / name)
    source = name.partition("-without-")[2]
    assert {source, *held_out.UNSEEN_BENIGN} <= set(probe.facts["held_out"])


@pytest.mark.parametrize("source", SOURCES)
def test_the_probe_of_the_second_benign_set_never_met_two_of_its_kinds(source: str) -> None:
    probe = Probe.from_pretrained(
        held_out.PROBES / setting.probe_name("linear", source, held_out.SECOND)
    )
    assert {source, *held_out.UNSEEN_SECOND} <= set(probe.facts["held_out"])
    assert set(held_out.UNSEEN_SECOND) < set(setting.BENIGN_SETS[held_out.SECOND])
    assert not set(setting.BENIGN_SETS["first"]) & set(setting.BENIGN_SETS[held_out.SECOND])


@pytest.mark.parametrize("name", demo_federation.RUNS)
def test_the_demos_configurations_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_federation.Path(__file__).resolve().parents[2])
    config = Config.of(demo_federation.configuration(name))
    assert config.clients.malicious == (0 if name == "no attack" else 5)
    assert (config.defense.probe is None) == (config.defense.level == "none")


def test_the_grid_is_the_first_ones_without_the_rule_that_nobody_made_for_this_base() -> None:
    ours = {replace(cell, base=setting.BASE) for cell in grid(LARGER)}
    assert ours == {cell for cell in grid(FIRST) if cell.row != "cumulative, mass-mean"}
    assert not set(grid(LARGER)) & set(grid(FULL))
    cell = Cell("shadow", 5, 0.25, 2, base=setting.LARGER_BASE)
    assert str(cell) == "shadow/5/0.25/2/jailbreakbench/first/chat-11m"
    assert Cell.named(str(cell)) == cell
