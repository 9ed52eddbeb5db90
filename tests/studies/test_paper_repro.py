"""The grid of defences, and that the pages say what its results say."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloop.config import Config
from fedloop.defense.accumulate import FeatureMean
from fedloop.errors import ConfigError
from loraprobe import Probe
from loraprobe.errors import DataError
from paper_repro import check, tables
from paper_repro.common import held_out, setting
from paper_repro.evidence import accumulation
from paper_repro.grid import lines as grid_lines
from paper_repro.grid import machines
from paper_repro.grid import page as grid_page
from paper_repro.grid import probes as grid_probes
from paper_repro.grid import reported as grid_reported
from paper_repro.grid import run as defences
from paper_repro.grid import tables as grid_tables
from paper_repro.grid import targets as grid_targets
from paper_repro.grid.cells import FIRST, FULL, LARGER, NO_ATTACK, ROWS, SOURCES, Cell, grid
from zoo import demo_federation
from zoo.markers import filled
from zoo.sources import BENIGN, MALICIOUS


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_the_pages_hold_the_tables_of_the_results(page: Path) -> None:
    assert tables.PAGES[page]() == page.read_text(encoding="utf-8")


def line(row: str, count: int, share: float, seed: int, refusal: float) -> dict[str, Any]:
    metrics = {
        "refusal_rule": refusal,
        "refusal_strict": refusal,
        "over_refusal_strict": 0.1,
        "loss": 2.0,
        "rouge_l": 0.2,
        "n_refusal": 200,
        "n_over_refusal": 200,
        "n_utility": 9,
    }
    place = {
        "row": row,
        "malicious": count,
        "share": share,
        "seed": seed,
        "source": SOURCES[0],
        "benign": "first",
    }
    return place | {"machine": "one", "metrics": metrics}


def test_a_cell_is_the_mean_over_its_seeds_and_no_attack_stands_in_every_column() -> None:
    lines = [
        line("no attack", 0, 1.0, 0, 0.9),
        line("FedAvg", 3, 1.0, 0, 0.5),
        line("FedAvg", 3, 1.0, 1, 0.7),
        line("FedAvg", 5, 0.25, 0, 0.3),
    ]
    rows = [
        [cell.strip() for cell in text.split("|")[1:-1]]
        for text in grid_page.refusal_table(lines).splitlines()
        if text.startswith("|")
    ]
    assert rows[2][:5] == ["no attack", "90.0", "90.0", "90.0", "90.0"]
    assert rows[3][:5] == ["FedAvg", "60.0 ± 14.1", "-", "-", "30.0"]


def test_markers_that_are_not_there_once_are_an_error() -> None:
    text = "<!-- a: written by python -m m -->\nold\n<!-- end of a -->"
    assert "new" in filled(text, "a", "new", "m")
    for wrong in ("", text + text, text.replace("end of a", "end of b")):
        with pytest.raises(ValueError, match="one pair of markers"):
            filled(wrong, "a", "new", "m")


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
    assert {(cell.malicious, cell.share) for cell in cells if cell.malicious} == {
        (n, share) for n in FIRST.malicious for share in FIRST.shares
    }
    krum = next(cell for cell in cells if cell.row == "Krum" and cell.malicious == 5).config
    assert krum.aggregation.options == {"f": 5}
    cheap = next(cell for cell in cells if cell.row == "evidence, cheap").config
    assert (cheap.defense.level, cheap.defense.options) == (
        "evidence",
        {"evidence": "shadow_gradient"},
    )
    assert next(cell for cell in cells if cell.row == NO_ATTACK).config.clients.malicious == 0
    assert len({cell.digest for cell in cells}) == len(cells)


@pytest.mark.usefixtures("data_files")
def test_the_full_grid_holds_the_first_and_has_no_run_twice() -> None:
    cells = list(grid(FULL))
    assert set(grid(FIRST)) < set(cells)
    sample = [
        cell
        for cell in cells
        if cell.seed == 0
        and cell.share != 0.5
        and cell.row in (NO_ATTACK, "FedAvg", "median", "cumulative")
    ]
    assert len({cell.digest for cell in sample}) == len(sample)
    assert len(set(cells)) == len(cells)
    attacked = len(FULL.shares) * 4 * len(FULL.sources)
    levels = sum("level" in row for row in ROWS.values())
    undefended = 1 + levels * len(FULL.sources) + (len(ROWS) - levels - 1)
    assert len(cells) == len(FULL.seeds) * len(FULL.benign) * (attacked * len(ROWS) + undefended)


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
    assert (
        Cell("cumulative", 5, 0.25, 0, "gptfuzz").digest
        != here
        != Cell("cumulative", 5, 0.25, 0, benign="second").digest
    )
    assert Cell("cumulative", 5, 0.25, 0, base=setting.LARGER_BASE).digest != here
    monkeypatch.setitem(
        setting.BASES,
        setting.BASE,
        replace(setting.BASES[setting.BASE], path=Path("/elsewhere/zoo/base")),
    )
    monkeypatch.setattr(setting, "PROBES", Path("/elsewhere/paper_repro/probes"))
    assert cell.digest == here
    monkeypatch.setattr(setting, "PROBES", Path("/elsewhere/paper_repro/others"))
    assert cell.digest != here


def test_a_cell_has_a_name_that_leads_back_to_it() -> None:
    for cell in list(grid(FULL))[::97]:
        assert Cell.named(str(cell)) == cell
    assert Cell.named("cumulative/5/0.25/1") == Cell("cumulative", 5, 0.25, 1)
    for wrong in (
        "cumulative",
        "cumulative/5/0.25",
        "cumulative/7/0.25/1",
        "nothing/5/0.25/1",
        "cumulative/five/0.25/1",
        "FedAvg/5/1/0/advbench/first",
    ):
        with pytest.raises(ConfigError, match="expected ROW/MALICIOUS"):
            Cell.named(wrong)


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
    grid_lines.append_line(line("FedAvg", 3, 1.0, 0, 0.4), path)
    assert [found["metrics"]["refusal_strict"] for found in grid_lines.read_lines(path)] == [
        0.4,
        0.7,
    ]  # the latest of a cell
    path.write_bytes(both[10:])
    with pytest.raises(DataError, match="line 1"):
        grid_lines.read_lines(path)


@pytest.mark.usefixtures("data_files")
def test_what_is_missing_is_what_has_no_line_of_its_configuration() -> None:
    cells = list(grid(defences.narrowed(FIRST, {"rows": ("FedAvg",), "seeds": (0,)})))
    lines = [
        line(cell.row, cell.malicious, cell.share, cell.seed, 0.5)
        | {
            "config": cell.digest,
            "seconds": {"train": 3600.0},
        }
        for cell in cells
    ]
    assert len(cells) == 5
    assert not defences.missing(cells, lines)
    assert defences.missing(cells, lines[1:]) == cells[:1]
    assert defences.missing(cells, [lines[0] | {"config": "another"}, *lines[1:]]) == cells[:1]
    assert (
        "3 of 5 runs are there, 2 to do: about 2.0 hours in 1 processes, 3600 s a run"
        in defences.outlook(cells, cells[:2], lines, 1)
    )
    with pytest.raises(ConfigError, match="--malicious: got 2"):
        defences.narrowed(FIRST, {"malicious": (2, 3)})


def test_runs_go_on_in_fresh_processes_and_one_that_fails_ends_them_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells = [Cell("FedAvg", 5, 1.0, seed) for seed in range(3)]
    monkeypatch.setattr(defences, "PER_PROCESS", 1)
    monkeypatch.setattr(defences, "run", str)
    assert dict(defences.finished(cells[:2], 1)) == {cell: str(cell) for cell in cells[:2]}
    monkeypatch.setattr(defences, "processes", ThreadPoolExecutor)
    monkeypatch.setattr(defences, "PER_PROCESS", 2)
    assert len(dict(defences.finished(cells, 1))) == 3
    monkeypatch.setattr(defences, "run", int)
    with pytest.raises(TypeError) as caught:
        list(defences.finished(cells, 1))
    assert caught.value.__notes__ == [f"in the run {cells[0]}"]


def test_another_number_in_a_run_made_again_is_a_difference() -> None:
    factors = {"benign": [1.0, 0.9], "malicious": [0.1, 0.0]}
    old = line("cumulative", 3, 1.0, 0, 0.5) | {
        "factors": factors,
        "clients": factors,
        "skipped": 0,
        "refused": 0,
    }
    new = old | {"seconds": {"train": 1.0}}
    assert not list(check.differences(old, new, 0))
    for changed, word in (
        (new | {"metrics": old["metrics"] | {"loss": 2.00001}}, "loss was 2.0"),
        (
            new
            | {
                "metrics": {name: value for name, value in old["metrics"].items() if name != "loss"}
            },
            "is None",
        ),
        (new | {"metrics": old["metrics"] | {"loss": float("nan")}}, "is nan"),
        (new | {"factors": factors | {"malicious": [0.1, 0.1]}}, "factors, malicious"),
        (new | {"clients": factors | {"benign": [1.0]}}, "clients, benign"),
        (new | {"skipped": 1}, "skipped was 0, is 1"),
    ):
        (found,) = check.differences(old, changed, 1e-6)
        assert word in found
    assert not list(
        check.differences(old, new | {"metrics": old["metrics"] | {"loss": 2.00001}}, 1e-3)
    )


def test_a_run_on_the_kind_of_machine_of_its_line_has_to_come_closer_than_on_another() -> None:
    old = line("cumulative", 3, 1.0, 0, 0.5)
    assert check.usual_tolerance(old, dict(old)) == 1e-6
    assert check.usual_tolerance(old, old | {"machine": "another"}) == 0.05


def test_the_distance_of_a_machine_is_from_the_committed_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(machine: str, share: float, refusal: float, factor: float) -> dict[str, Any]:
        return line("cumulative", 5, share, 0, refusal) | {
            "machine": machine,
            "clients": {"benign": [1.0], "malicious": [factor]},
        }

    lines = [made("wide", 0.5, 0.9, 0.1), made("wide", 0.1, 0.5, 0.0)]
    sample = machines.Sample(tuple(map(grid_lines.cell_of, lines)), tmp_path / "rows.json")
    monkeypatch.setattr(machines, "read_lines", lambda: lines)
    there = [
        made("narrow", 0.5, 0.88, 0.1),
        made("narrow", 0.1, 0.51, 0.02),
        made("other", 0.5, 0.9, 0.1),
        made("other", 0.1, 0.4, 0.0),
    ]
    sample.results.write_text(json.dumps([machines.kept(row) for row in there]))
    table = machines.table(sample)
    assert "| refusal, points | 1.5, 2.0 | 5.0, 10.0 |" in table
    assert "| mean factor of a client | 0.0050, 0.0200 | 0.0000, 0.0000 |" in table
    assert table.endswith("From the lines of wide: 2 runs with 4 clients.")
    monkeypatch.setattr(machines, "read_lines", lambda: lines[1:])
    with pytest.raises(DataError, match="no line of cumulative"):
        machines.table(sample)


@pytest.mark.usefixtures("data_files")
def test_a_check_refuses_a_cell_that_was_not_run_or_is_of_another_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "machine", lambda: PROCESSOR)
    cell = Cell("FedAvg", 3, 1.0, 0)
    options = check.parser().parse_args(["--cell", str(cell)])
    with pytest.raises(ConfigError, match="has no line"):
        check.chosen(options, {})
    with pytest.raises(ConfigError, match="is of the configuration other"):
        check.chosen(options, {cell: {"config": "other"}})
    assert check.chosen(options, {cell: {"config": cell.digest, "machine": PROCESSOR}}) == [cell]
    lines = {cell: {"config": cell.digest, "machine": GPU}}
    with pytest.raises(ConfigError, match="expected a GPU for what a GPU made"):
        check.chosen(options, lines)
    assert check.chosen(
        check.parser().parse_args(["--cell", str(cell), "--tolerance", "0.1"]), lines
    ) == [cell]


def test_the_small_check_is_of_committed_runs_of_one_kind_of_machine() -> None:
    lines = {grid_lines.cell_of(found): found for found in grid_lines.read_lines()}
    assert len({lines[cell]["machine"] for cell in check.SMALL}) == 1


@pytest.mark.usefixtures("data_files")
def test_a_draw_is_the_seeds_and_of_this_kind_of_machine_where_that_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "machine", lambda: PROCESSOR)
    cells = [Cell("FedAvg", 3, 1.0, seed) for seed in range(3)]
    lines = {
        cell: {
            "config": cell.digest,
            "machine": PROCESSOR if cell.seed else "torch 2.13.0+cpu, AVX2, one",
        }
        for cell in cells
    }
    lines[Cell("DnC", 3, 1.0, 0)] = {"config": Cell("DnC", 3, 1.0, 0).digest, "machine": GPU}
    options = check.parser().parse_args(["--random", "7", "--count", "3"])
    assert set(check.chosen(options, lines)) == set(cells)
    options = check.parser().parse_args(["--random", "7", "--count", "2"])
    assert check.chosen(options, lines) == check.chosen(options, dict(reversed(lines.items())))
    options = check.parser().parse_args(["--random", "7", "--count", "2", "--here"])
    assert set(check.chosen(options, lines)) == set(cells[1:])
    with pytest.raises(ConfigError, match="expected 1 to 1"):
        check.chosen(options, {cell: lines[cell] for cell in cells[:2]})


def test_a_gpu_is_known_by_its_name() -> None:
    assert defences.on_gpu(GPU)
    assert not defences.on_gpu(PROCESSOR)
    assert defences.on_gpu(defences.machine()) == torch.cuda.is_available()
    assert {
        defences.on_gpu(found["machine"])
        for found in grid_lines.read_lines()
        if found.get("base") == setting.LARGER_BASE
    } == {True, False}


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


def test_an_attack_works_where_averaging_misses_the_target_of_refusal() -> None:
    lines = [
        attacked(NO_ATTACK, 0, 0.9),
        attacked("FedAvg", 5, 0.5),
        attacked("FedAvg", 2, 0.9),
        attacked("shadow", 5, 0.9),
        attacked("shadow", 2, 0.9),
    ]
    table = grid_targets.worst_table(lines)
    assert "| FedAvg | 2 of 96 | 0 of 1 | 1 of 2, -40.0 (5 @ 100%) |" in table
    assert "| shadow | 2 of 102 | 1 of 1 | 2 of 2, +0.0 " in table


def test_a_row_without_runs_beyond_the_first_grid_is_on_the_page_of_cells_alone() -> None:
    lines = [
        attacked(NO_ATTACK, 0, 0.9),
        attacked("Krum", 5, 0.1),
        attacked("FedAvg", 5, 0.2),
        attacked("FedAvg", 2, 0.8),
    ]
    for found in lines:
        found["seconds"] = {"train": 1.0}
    table = grid_tables.grid_tables(lines)
    assert "| poison | malicious | FedAvg |" in table  # and no other row
    assert "| - | 0 of 10 | 90.0 |" in table
    assert "| 100% | 2 of 10 | 80.0 |" in table
    assert "| Krum | 5 of 10, 100% poison | 1 |" in grid_tables.cells_page(lines)


def test_every_reported_figure_has_a_source_and_stands_beside_a_cell_of_the_grid_or_none() -> None:
    figures = grid_reported.read_reported()
    places = {(cell.row, cell.malicious, cell.share) for cell in grid(FULL)}
    for figure in figures:
        beside = figure["measured"]
        assert beside is None or (
            (beside["row"], beside["malicious"], beside["share"]) in places
            and beside["metric"] in grid_reported.MEASURES
        )
        assert all(
            figure[name] for name in ("source", "setting", "defence", "attack", "measure", "value")
        )
    table = grid_reported.reported_table([])
    assert table.count("\n| ") - 4 + 1 == len(
        figures
    )  # two heads and two rules, the first without a line break before it
    assert "| 49.81 | - | 0 | FedAvg, 3 of 10, 100% poison: Rule |" in table


def test_a_reported_figure_without_its_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reported.json"
    path.write_text(json.dumps([dict.fromkeys(grid_reported.FIELDS - {"source"}, "x")]))
    with pytest.raises(DataError, match="expected attack, defence"):
        grid_reported.read_reported(path)


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
        held_out.PROBES / setting.probe_name("linear", source, grid_probes.SET)
    )
    assert {source, *grid_probes.UNSEEN} <= set(probe.facts["held_out"])
    assert set(grid_probes.UNSEEN) < set(setting.BENIGN_SETS[grid_probes.SET])
    assert not set(setting.BENIGN_SETS["first"]) & set(setting.BENIGN_SETS[grid_probes.SET])


def test_accumulated_evidence_is_the_mean_of_the_rounds_so_far() -> None:
    rng = np.random.default_rng(0)
    evidence = {"update": rng.normal(size=(4, 3, 5))}  # (rounds, clients, p)
    found = accumulation.accumulated("update", FeatureMean(normalize=False))(evidence, 3)
    np.testing.assert_allclose(found, evidence["update"][:3].mean(axis=0))


@pytest.mark.parametrize("name", demo_federation.RUNS)
def test_the_demos_configurations_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_federation.Path(__file__).resolve().parents[2])
    config = Config.of(demo_federation.configuration(name))
    assert config.clients.malicious == (0 if name == "no attack" else 5)
    assert (config.defense.probe is None) == (config.defense.level == "none")


def test_every_result_line_belongs_to_the_grid() -> None:
    known = {*grid(FULL), *grid(LARGER)}
    assert {grid_lines.cell_of(found) for found in grid_lines.read_lines()} <= known
