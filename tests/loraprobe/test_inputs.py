"""docs/inputs.md: input x way in -> answer. Every row of the page in every way in, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
from typer.testing import CliRunner

from fedloop import Defense
from fedloop.plugins import defend_round
from loraprobe import FeatureRecipe, Probe, fit_probe
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta
from loraprobe.adapters.load import load_adapter, save_adapter
from loraprobe.adapters.pair import LoRAPair
from loraprobe.cli import commands  # noqa: F401  # registers them
from loraprobe.cli.terminal import app
from loraprobe.errors import LoraprobeError
from tests.helpers import make, probes, serving
from tests.helpers.inputs import (
    BASE,
    CASES,
    CONFIG,
    PLAIN,
    START,
    TOOLS,
    WEIGHTS,
    Answer,
    Case,
    named,
    product_of,
)

pytestmark = pytest.mark.enable_socket  # on the loopback interface only

PAGE = Path(__file__).resolve().parents[2] / "docs" / "inputs.md"


@cache
def probe_for(name: str, sizes: tuple[tuple[str, tuple[int, int]], ...]) -> Probe:
    """A probe of factors by the name of its recipe, or one of products of these sizes."""
    if name != "plain":
        return probes.tiny_probe("linear", name)
    many = [
        named(
            {
                module: make.pair(*size, 2, seed=31 * row + n)
                for n, (module, size) in enumerate(sizes)
            }
        )
        for row in range(8)
    ]
    groups = [str(row) for row in range(8)]
    return fit_probe(many, [0, 1] * 4, recipe=FeatureRecipe.invariant(k=2), groups=groups)


def probe_of(case: Case) -> Probe:
    read = case.folder if isinstance(case.folder, Adapter) else PLAIN
    return probe_for(
        case.probe, tuple((module, pair.shape) for module, pair in sorted(read.items()))
    )


class World(NamedTuple):
    """Where probes and services are."""

    folder: Path
    started: dict[tuple[str, ...], serving.Service]
    stack: ExitStack

    def probe(self, case: Case) -> Path:
        probe = probe_of(case)
        path = self.folder / f"{case.probe}-{len(probe.featurizer.modules)}"
        return path if path.exists() else probe.save_pretrained(path)

    def start(self, case: Case) -> list[str]:
        if case.probe == "plain":
            return []
        path = self.folder / "start"
        return ["--base", str(path if path.exists() else save_adapter(START, path))]

    def service(self, case: Case) -> serving.Service:
        options = ("--probe", str(self.probe(case)), *self.start(case))
        if options not in self.started:
            log = self.folder / f"{len(self.started)}.log"
            self.started[options] = self.stack.enter_context(serving.running(log, *options))
        return self.started[options]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("inputs"), {}, stack)


def decided(verdict: str, score: Any, reason: str) -> float:
    if verdict not in ("benign", "malicious"):
        raise LoraprobeError(reason)
    return float(score)


def in_python(case: Case, path: Path, world: World) -> float:
    adapter = load_adapter(path)
    probe = probe_of(case)
    probe.check_base_model(adapter)
    adapter.check_finite()
    change = adapter if case.probe == "plain" else factor_delta(adapter, START)
    [verdict] = probe.verdicts([change])
    return decided(verdict.label, verdict.score, verdict.reason)


def by_command(case: Case, path: Path, world: World, *command: str) -> dict[str, Any]:
    options = ["--probe", str(world.probe(case)), *world.start(case)]
    result = CliRunner().invoke(app, [*command, str(path), *options])
    [entry] = json.loads(result.stdout)["results"]
    return dict(entry)


def by_score(case: Case, path: Path, world: World) -> float:
    entry = by_command(case, path, world, "score", "--json")
    return decided(entry["verdict"], entry["score"], entry["reason"])


def by_scan(case: Case, path: Path, world: World) -> float:
    entry = by_command(case, path, world, "scan", "--format", "json")
    reasons = "; ".join(finding["message"] for finding in entry["findings"])
    scored = entry["scores"] or [{"verdict": "error", "score": None}]
    assert entry["decision"] != "allow" or scored[0]["verdict"] == "benign"
    return decided(scored[0]["verdict"], scored[0]["score"], reasons)


def by_client(case: Case, path: Path, world: World) -> float:
    [result] = world.service(case).client().score(path)
    return decided(result.verdict, result.score, result.reason)


def by_http(case: Case, path: Path, world: World) -> float:
    query = f"alpha={case.lora['alpha']}&base_model={case.lora.get('base_model', BASE)}"
    answer = world.service(case).score((path / WEIGHTS).read_bytes(), query)
    if "error" in answer.body:
        raise LoraprobeError(answer.body["error"]["message"])
    [result] = answer.body["results"]
    assert "config" in result["unchecked"]
    return decided(result["verdict"], result["score"], result["reason"])


def in_a_round(case: Case, path: Path, world: World) -> float:
    read = case.state if isinstance(case.state, Adapter) else PLAIN
    zero = {module: LoRAPair(p.A, 0 * p.B, p.scaling) for module, p in read.items()}
    start = named(zero) if case.probe == "plain" else START
    defense = Defense(probe_of(case), "client")
    sent = {"c": (10, safetensors.torch.load_file(path / WEIGHTS))}
    done = defend_round(defense, 1, sent, start.state_dict(), **case.lora)
    if "c" not in done.record.scores:
        assert done.record.factors["c"] == 0
        raise LoraprobeError(done.record.reasons["c"])
    return float(done.record.scores["c"][-1])


COLUMNS: tuple[dict[str, Callable[[Case, Path, World], float]], ...] = (
    {"python": in_python, "score": by_score, "scan": by_scan, "client": by_client},
    {"http": by_http},
    {"round": in_a_round},
)
ASKED = [
    pytest.param(case, way, case.but.get(name, answer), id=f"{title}-{name}")
    for title, case in CASES.items()
    for ways, answer in zip(COLUMNS, (case.folder, case.body, case.state), strict=True)
    for name, way in ways.items()
    if answer is not None
]


@pytest.mark.parametrize(("case", "way", "answer"), ASKED)
def test_every_input_gets_its_answer_in_every_way_in(
    case: Case, way: Callable[..., float], answer: Answer, tmp_path: Path, world: World
) -> None:
    folder = make.folder(tmp_path / "a", make.tensors(), base_model_name_or_path=BASE)
    case.build(folder)
    if isinstance(answer, str):
        with pytest.raises(LoraprobeError, match=f"(?s){answer}"):
            way(case, folder, world)
        return
    assert isinstance(answer, Adapter)
    expected = answer if case.probe == "plain" else factor_delta(answer, START)
    [verdict] = probe_of(case).verdicts([expected])
    assert way(case, folder, world) == pytest.approx(verdict.score, rel=1e-4)


def test_the_page_claims_what_is_tested_and_nothing_else() -> None:
    table = PAGE.read_text().partition("## What a file may cost")[0].partition("|---|")[2]
    cells = [line.split("|")[1:-1] for line in table.splitlines()[1:] if line]
    told = {
        (row.strip(), *(cell.partition(":")[0].strip() for cell in rest)) for row, *rest in cells
    }
    words = {Adapter: "read", str: "refused", type(None): ""}
    tested = {
        (case.row, *(words[type(answer)] for answer in (case.folder, case.body, case.state)))
        for case in CASES.values()
    }
    assert told == tested


def test_what_is_left_out_is_reported(tmp_path: Path) -> None:
    fields = {"lorap_lr_ratio": 16.0, "_comment": "run 17"}
    folder = make.folder(tmp_path, make.tensors(), **fields)
    assert set(load_adapter(folder).ignored) == set(fields)
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert "_comment" in shown.stdout


def test_what_mlx_lm_wrote_is_what_it_adds_once_converted_as_the_message_says() -> None:
    stated = json.loads((TOOLS / "mlx-lm" / CONFIG).read_text())["lora_parameters"]
    given = safetensors.torch.load_file(TOOLS / "mlx-lm" / "adapters.safetensors")
    endings = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight"}
    converted = {f"base_model.model.{k[:-7]}{endings[k[-7:]]}": v.T for k, v in given.items()}
    adapter = Adapter.from_state_dict(converted, alpha=stated["scale"] * stated["rank"])
    expected = product_of("mlx-lm")
    assert adapter.keys() == expected.keys()
    for module, pair in adapter.items():
        np.testing.assert_allclose(pair.dense(), expected[module].dense(), atol=1e-4)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    path = make.folder(tmp_path, make.tensors()) / WEIGHTS
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes((0x10280).to_bytes(8, "little") + data[8:end].ljust(0x10280) + data[end:])
    assert load_adapter(tmp_path).keys() == PLAIN.keys()


@pytest.mark.parametrize(
    ("init", "zero"),
    [(True, True), ("gaussian", True), ("eva", True), ("orthogonal", False), (False, False)],
)
def test_a_start_that_was_not_zero_has_to_be_given(init: Any, zero: bool, tmp_path: Path) -> None:
    adapter = load_adapter(make.folder(tmp_path, make.tensors(), init_lora_weights=init))
    assert factor_delta(adapter, make.adapter()).kind == "factor_delta"
    if zero:
        assert factor_delta(adapter, None).kind == "factor_delta"
        return
    with pytest.raises(LoraprobeError, match=r"B did not start at zero .* pass the start"):
        factor_delta(adapter, None)


@pytest.mark.parametrize("load", [load_adapter, Probe.from_pretrained])
def test_a_mistyped_path_is_said_before_the_network_is_asked(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make.folder(tmp_path / "runs" / "good", make.tensors())
    with pytest.raises(LoraprobeError, match="no file or folder 'runs/goof'; there is a folder"):
        load("runs/goof")
