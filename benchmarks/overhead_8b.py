"""What a defence costs at the shape of Llama-3.1-8B.

Seconds and bytes of a round, and examples trained on beside the clients' own.

    python -m benchmarks.overhead_8b  # benchmarks/results/overhead_8b.json and the table in
                                      # paper_repro/DEVIATIONS.md (minutes)

A round of 20 clients whose LoRA (r = 8 on q_proj and v_proj of 32 layers, float32) has the real
shapes and random numbers. Measured of every level: checking, featurizing, scoring and weighing
(`Defense.assess`); of all alike, packing the updates, the weighted mean and applying it; medians of
CPU seconds on one thread. Counted: bytes that clients send, and the examples that go forward and
backward for evidence, played over all rounds of the settings of April and June 2026 with clients
whose scores never waver. The seconds of a training step and of a shadow gradient are measured where
there is a GPU, on random weights of the full model in bfloat16 and in 8 bits, and nowhere else:

    TMPDIR=/dev/shm python -m benchmarks.overhead_8b --training     # two minutes, 32 GB of GPU
    memory and 16 GB of temporary files
"""

from __future__ import annotations

import json
import time
import timeit
import tomllib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedloop.config import Config
from fedloop.defense.defense import Defense
from fedloop.defense.levels import (
    LAST_STEP,
    LOCAL_STEPS,
    SHADOW_GRADIENT,
    SHADOW_STEPS,
    UPDATE_FEATURES,
    Level,
    make_level,
)
from fedloop.defense.types import ClientUpdate
from fedloop.rules.rule import AGGREGATORS
from fedloop.run.plan import plan_round
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta, factor_delta
from loraprobe.adapters.layout import Layout, pack, unpack
from loraprobe.featurizer import FeatureRecipe
from loraprobe.probe import Probe
from paper_repro.common.paths import CONFIGS
from paper_repro.grid import cells
from zoo.markers import markdown
from zoo.program import documented

from . import common
from .common import ROOT, fill, random_probe, summary, write
from .overhead_training import BATCH, PRECISIONS, training_seconds
from .scale import LLAMA_8B, Shape

if TYPE_CHECKING:
    pass

RESULTS = common.RESULTS / "overhead_8b.json"
PAGE = ROOT / "paper_repro/DEVIATIONS.md"
CLIENTS, REPETITIONS = 20, 5
# Without those that need a probe of one of this repository's bases.
ROWS = {name: row for name, row in cells.ROWS.items() if "probe" not in row}
PAPERS_LEVELS = ("step", "client", "shadow", "evidence")
LEVELS = ("none", *(row for row in ROWS if "level" in ROWS[row]))
SETTINGS = {"April 2026": "llama-3.1-8b-april", "June 2026": "llama-3.1-8b-june"}


def main() -> None:
    """Measure, print and save."""
    parser = documented(__doc__)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument(
        "--training",
        action="store_true",
        help="measure the seconds of training steps alone, on a GPU, and keep all else",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = (
        {**json.loads(RESULTS.read_text()), "training": training_seconds()}
        if options.training
        else measure_all(options.repetitions)
    )
    write(RESULTS, result)
    fill(PAGE, "overhead_8b", table(result), "benchmarks.overhead_8b")
    print(table(result))


def measure_all(repetitions: int) -> dict[str, Any]:
    """Everything that the table holds."""
    of = Round(LLAMA_8B)
    return {
        "command": "python -m benchmarks.overhead_8b",
        "machine": common.machine(threads=1),
        "clients": CLIENTS,
        "numbers_per_update": of.layout.size,
        "repetitions": repetitions,
        "aggregation_cpu_seconds": aggregation(of, repetitions),
        "rounds": [
            costs(of, row, steps, repetitions) for row in LEVELS for steps in step_counts(row)
        ],
        "extra_examples": {
            name: {row: extra_examples(row, setting) for row in LEVELS}
            for name, setting in SETTINGS.items()
        },
        "training": training_seconds(),
    }


def level_of(row: str) -> Level | None:
    """The level of a row of the tables; None for no defence."""
    of = ROWS.get(row)
    return (
        None if of is None else make_level(of["level"], **of.get("defense", {}).get("options", {}))
    )


def step_counts(row: str) -> tuple[int, ...]:
    """The local steps at which a row is measured.

    April's and June's where it reads steps, one where they do not matter.
    """
    level = level_of(row)
    return (10, 1) if level and level.evidence in (LOCAL_STEPS, SHADOW_STEPS) else (10,)


class Round:
    """What CLIENTS clients send in a round, of a shape: random updates from one global LoRA."""

    def __init__(self, shape: Shape) -> None:
        first, self.deltas = (
            shape.adapter(0),
            [shape.adapter(number) for number in range(1, CLIENTS + 1)],
        )
        self.layout = Layout.of(first)  # of a factor delta
        self.start = unpack(pack(first)[0], replace(self.layout, kind="weights"))
        self.updates = [add_delta(self.start, delta) for delta in self.deltas]

    def sent(self, level: Level | None, probe: Probe | None, steps: int) -> list[ClientUpdate]:
        """Every client's update with the evidence that the level reads."""
        evidences = [evidence(level, probe, delta, steps) for delta in self.deltas]
        return [
            ClientUpdate(f"client-{number:02}", steps * BATCH, update, steps_of)
            for number, (update, steps_of) in enumerate(zip(self.updates, evidences, strict=True))
        ]


def costs(of: Round, row: str, steps: int, repetitions: int) -> dict[str, Any]:
    """A round at one level.

    CPU seconds of checking, featurizing, scoring and weighing, and bytes a client.
    """
    level = level_of(row)
    probe = random_probe(of.deltas[0], recipe_of(row)[1]) if level else None
    sent = of.sent(level, probe, steps)
    record = Defense(probe, level).assess(1, sent, start=of.start)
    if record.reasons:
        raise RuntimeError(f"{row}: a benchmark's update was refused: {dict(record.reasons)}")
    return {
        "row": row,
        "probe": (
            None
            if probe is None
            else {"recipe": recipe_of(row)[0], "features": probe.featurizer.num_features}
        ),
        "steps": steps,
        "assess_cpu_seconds": measured(
            lambda: Defense(probe, level).assess(1, sent, start=of.start), repetitions
        ),
        "bytes_a_client": {
            "update": 4 * of.layout.size,
            "evidence": sum(evidence_bytes(step, probe) for step in sent[0].steps),
        },
    }


def aggregation(of: Round, repetitions: int) -> dict[str, dict[str, float]]:
    """CPU seconds of what follows at every level.

    Packing the updates, their weighted mean, and applying it.
    """
    read = [factor_delta(update, of.start) for update in of.updates]
    shares = torch.full((CLIENTS,), 1 / CLIENTS, dtype=torch.float64)
    rows = torch.stack([pack(delta)[0] for delta in read])
    moved = AGGREGATORS["mean"](rows, shares)
    tasks: dict[str, Callable[[], object]] = {
        "pack": lambda: torch.stack([pack(delta)[0] for delta in read]),
        "mean": lambda: AGGREGATORS["mean"](rows, shares),
        "apply": lambda: add_delta(of.start, unpack(moved, of.layout)).load(),
    }
    return {name: measured(task, repetitions) for name, task in tasks.items()}


def measured(task: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Median, least and most CPU seconds of this process; once before, not counted."""
    task()
    return summary(timeit.repeat(task, timer=time.process_time, number=1, repeat=repetitions))


def recipe_of(row: str) -> tuple[str, FeatureRecipe]:
    """What a row's probe reads.

    The paper's recipe at the paper's levels, B of all layers at the others.
    """
    if row in PAPERS_LEVELS:
        return "B of the first layer", FeatureRecipe.paper()
    return "B of all layers", FeatureRecipe.all_b()


def evidence(
    level: Level | None, probe: Probe | None, delta: Adapter, steps: int
) -> tuple[Adapter, ...]:
    """What a client sends beside its update.

    The probed modules of so many points on the way to it, or of one gradient.
    """
    if level is None or probe is None or level.evidence in (LAST_STEP, UPDATE_FEATURES):
        return ()
    count = 1 if level.evidence == SHADOW_GRADIENT else steps
    vector, layout = pack(delta)
    points = (unpack(vector * (number / count), layout) for number in range(1, count + 1))
    return tuple(
        Adapter(
            {name: point[name] for name in probe.featurizer.layout.scalings}, kind="factor_delta"
        ).load()
        for point in points
    )


def evidence_bytes(step: Adapter, probe: Probe | None) -> int:
    """Float32 bytes of what the probe reads of a step."""
    factors = probe.featurizer.recipe.factors if probe else ()
    return sum(
        4 * int(np.prod(pair.shape_of(factor))) for pair in step.values() for factor in factors
    )


def extra_examples(row: str, setting: str) -> dict[str, float]:
    """Examples that go forward and backward for evidence, as a share of those that clients train
    on, over a setting's rounds.

    Malicious clients score 1 and benign ones 0 throughout, the case in which the evidence level
    asks least.
    """
    values = tomllib.loads((CONFIGS / f"{setting}.toml").read_text(encoding="utf-8"))
    config = Config.of({**values, "evaluation": {}})
    level, of = level_of(row), config.training
    state = level.init() if level else {}
    trained = extra = asked = scored = 0
    for number in range(1, config.rounds + 1):
        clients = [f"client-{index:02}" for index in plan_round(config, number).chosen]
        trained += len(clients) * of.steps * of.batch_size
        wanted = level.wanted(state, clients) if level else set()
        asked, scored = asked + len(clients), scored + len(wanted)
        each = {SHADOW_STEPS: of.steps * of.batch_size, SHADOW_GRADIENT: of.shadow_examples}.get(
            level.evidence if level else "", 0
        )
        extra += each * len(wanted)
        if level:
            bad = {f"client-{index:02}" for index in range(config.clients.malicious)}
            count = of.steps if level.evidence in (LOCAL_STEPS, SHADOW_STEPS) else 1
            scores = {client: np.full(count, float(client in bad)) for client in wanted}
            _, state = level.update(state, scores, dict.fromkeys(clients, of.steps * of.batch_size))
    return {
        "trained": trained,
        "extra": extra,
        "extra_share": round(extra / trained, 4),
        "participations": asked,
        "scored": scored,
    }


def table(result: dict[str, Any]) -> str:
    """The page's table of what was measured and counted."""
    columns = (
        "level | probe reads | local steps | check, score, weigh, s | update sent, MB"
        " | evidence sent, MB"
    )
    extra = [f"extra training, {name}" for name in SETTINGS]
    lines = [[*columns.split(" | "), *extra, "server, of the clients' training"]]
    for row in result["rounds"]:
        seconds, level = row["assess_cpu_seconds"], row["row"]
        sent = [f"{row['bytes_a_client'][what] / 1e6:.2f}" for what in ("update", "evidence")]
        asked = [result["extra_examples"][name][level]["extra_share"] for name in SETTINGS]
        lines.append(
            [
                *(level, row["probe"]["recipe"] if row["probe"] else "-", str(row["steps"])),
                f"{seconds['median']:.2f} [{seconds['min']:.2f}, {seconds['max']:.2f}]",
                *sent,
                *(f"{share:.1%}" for share in asked),
                server_share(result, row),
            ]
        )
    after = {name: seconds["median"] for name, seconds in result["aggregation_cpu_seconds"].items()}
    return (
        f"{markdown(lines)}\nA round of {result['clients']} clients of"
        f" {result['numbers_per_update']:,} numbers each: CPU seconds on one thread, median [least,"
        f" most] of {result['repetitions']}; at every level packing the updates takes"
        f" {after['pack']:.2f} s more, their mean {after['mean']:.2f} s, and applying it"
        f" {after['apply']:.3f} s. Bytes a client. Extra training: examples for evidence over"
        " examples trained on, counted over all rounds. Seconds of a training step of"
        f" {BATCH} x 256 tokens: {trained(result['training'])}."
    )


def server_share(result: dict[str, Any], row: dict[str, Any]) -> str:
    """What a server does in a round, all of it, as a share of the seconds that the round's clients
    train in 8 bits.
    """
    if not result["training"]["measured"]:
        return "-"
    seconds = row["assess_cpu_seconds"]["median"] + sum(
        of["median"] for of in result["aggregation_cpu_seconds"].values()
    )
    each = result["clients"] * result["training"]["8 bits"]["step_seconds"]["median"]
    steps = [row["steps"]] if len(step_counts(row["row"])) > 1 else [10, 1]
    return ", ".join(
        f"{seconds / (each * count):.1%}"
        + (f" ({count} step{'s' * (count > 1)})" if len(steps) > 1 else "")
        for count in steps
    )


def trained(of: dict[str, Any]) -> str:
    """The seconds of training, in words."""
    if not of["measured"]:
        return str(of["why"])
    parts = [
        f"{own['step_seconds']['median']:.2f} in {name} (n = {own['step_seconds']['n']},"
        f" {own['step_seconds']['min']:.2f} to {own['step_seconds']['max']:.2f}, at most"
        f" {own['peak_bytes'] / 2**30:.0f} GiB; a shadow gradient of 8 examples"
        f" {own['shadow_gradient_seconds']['median']:.2f})"
        for name, own in ((name, of[name]) for name in PRECISIONS)
    ]
    return f"{', '.join(parts)}, on {of['device']}"


if __name__ == "__main__":
    main()
