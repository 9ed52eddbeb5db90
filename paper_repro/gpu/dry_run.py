"""The whole path of the GPU experiments without a GPU or the Hub.

Real code and settings, random two-layer models, a few examples.

    python -m paper_repro.gpu.dry_run                                   # every setting with a few
    rows; minutes
    python -m paper_repro.gpu.dry_run qwen2.5-7b-june shadow Krum       # one setting, these rows

Of every setting and row: its file is read as for a GPU; a base of the same architecture and
tokenizer habits is made; labelled clients are trained on it and the row's probe fitted; the
federation runs with that level, is stopped and resumed, and has to end bit for bit where an
uninterrupted one does; its answers go through Rule, a judge, a reward model and MT-Bench's export.
What is smaller: layers, widths, rounds, clients beyond ten, examples, tokens. What is not met:
8-bit and bfloat16 weights, the real tokenizers, downloads. The numbers that come out mean nothing
and are not kept.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloop.client.training import LocalTraining, LoRASettings, quiet
from fedloop.config import Config
from fedloop.defense.levels import LOCAL_STEPS, SHADOW_GRADIENT, SHADOW_STEPS
from fedloop.defense.types import RoundRecord
from fedloop.errors import FedloopError
from fedloop.report.page import write_report
from fedloop.run.build import build_federation
from fedloop.run.run import RunResult
from fedloop.run.simulate import resume, simulate
from loraprobe.adapters.adapter import Adapter
from loraprobe.errors import LoraprobeError
from zoo.labelled.client_design import ZOO_DESIGN
from zoo.labelled.deltas import read_initial

from ..grid.cells import NO_ATTACK
from .models import save_base, save_judge, save_reward_model
from .rows import write_goals, write_malicious_gen, write_questions, write_sources
from .run import Smaller, mt_bench, prepare
from .settings import ROWS, SETTINGS, Choice, Inputs, read_setting

ROUNDS, CLIENTS, EXAMPLES, GOALS = 2, 10, 6, 5
# Every kind of evidence, both probes, and one rule.
FEW = (NO_ATTACK, "Krum", "step", "client", "evidence", "cumulative", "shadow, cheap")
PROBE: dict[str, Any] = {
    "design": {
        "per_source": 3,
        "per_cell": 1,
        "per_hard_cell": 1,
        "shares": (1.0, 0.5),
        "training": LocalTraining(5e-5, 2, 2, 256),
    },
    "base": {"dtype": "float32", "quantization": "none"},
    "held_out": 1,
}


class DryRunError(FedloopError):
    """Something on the path did not come out as it has to."""


class _Stop(Exception):
    """Raised in the middle of a run, as a kill would end it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Play the settings and rows that are asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m paper_repro.gpu.dry_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("setting", nargs="?", choices=SETTINGS, help="[default: all]")
    parser.add_argument(
        "rows", nargs="*", help=f"{', '.join((NO_ATTACK, *ROWS))} [default: {', '.join(FEW)}]"
    )
    options = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dry-run-") as folder:
        for setting in [options.setting] if options.setting else SETTINGS:
            for row in options.rows or FEW:
                began = time.monotonic()
                result = rehearse(Choice(setting, row), Path(folder))
                shown = ", ".join(
                    f"{name} {value:g}"
                    for name, value in result.metrics.items()
                    if name.startswith("n_")
                )
                print(
                    f"{setting}, {row}: {len(result.records)} rounds, resumed bit for bit, measured"
                    f" ({shown}), {time.monotonic() - began:.0f} s"
                )


def rehearse(choice: Choice, folder: Path) -> RunResult:
    """Play one choice from its file to its figures.

    Models, data and probes of a folder are made once.

    Raises:
        DryRunError: something did not come out as it has to.
    """
    config, inputs = prepared(choice, folder)
    if choice.probe_kind:
        _same_start(config, inputs)
    for run in (config, _elsewhere(config)):
        shutil.rmtree(str(run.output.folder), ignore_errors=True)
    whole = simulate(config)
    again = _interrupted(_elsewhere(config))
    if _untimed(whole.records) != _untimed(again.records) or not _same(
        whole.adapter, again.adapter
    ):
        raise DryRunError(
            "the resumed run ended elsewhere than the uninterrupted one; expected the same records"
            " and adapter, bit for bit"
        )
    _check(whole, choice)
    write_report(Path(str(whole.folder)))
    out = mt_bench(
        Path(str(whole.folder)), write_questions(folder / "question.jsonl"), max_new_tokens=4
    )
    if len(out.read_text(encoding="utf-8").splitlines()) != 2:
        raise DryRunError(f"{out} has not the answers to two questions")
    return whole


def prepared(choice: Choice, folder: Path) -> tuple[Config, Inputs]:
    """The smaller experiment, with its data and probe, and what they were made from."""
    inputs = ready(choice, folder)
    smaller = Smaller(smaller_experiment(choice, folder), _probe(choice), GOALS)
    with redirect_stdout(
        io.StringIO()
    ):  # what a probe measures on random weights would be read as a result
        return prepare(choice, inputs, folder / "harmful_behaviors.csv", smaller), inputs


def ready(choice: Choice, folder: Path) -> Inputs:
    """The base model, data and prompts of a setting, in place of what a user brings.

    What is there already is not made again.
    """
    base = folder / Path(read_setting(choice.setting)["model"]["base"]).name
    if not base.exists():
        save_base(read_setting(choice.setting)["model"]["base"], base)
    if not (folder / "judge").exists():
        save_judge(folder / "judge")
        save_reward_model(folder / "reward")
    count = CLIENTS * EXAMPLES + 10
    gen = write_malicious_gen(
        folder / "data" / "maliciousQA.json", 2 * EXAMPLES
    )  # too few for three clients, as MaliciousGen is
    write_goals(folder / "harmful_behaviors.csv", GOALS)
    out = folder / choice.setting
    return Inputs(
        out, out / "advbench.jsonl", gen, base, sources=write_sources(folder / "data", count)
    )


def smaller_experiment(choice: Choice, folder: Path) -> dict[str, Any]:
    """What a dry run changes of an experiment; all else is the setting's own."""
    values = read_setting(choice.setting)
    steps, clients = min(2, int(values["training"]["steps"])), {"examples": EXAMPLES}
    if values["clients"]["count"] > CLIENTS:
        clients |= {
            "count": CLIENTS,
            "sampled": CLIENTS,
            "malicious": 0 if choice.row == NO_ATTACK else 3,
        }
    return {
        "rounds": ROUNDS,
        "model": {"dtype": "float32", "quantization": "none"},
        "training": {"steps": steps, "batch_size": 2, "shadow_examples": 2},
        "clients": clients,
        "evaluation": {
            "judge": str(folder / "judge"),
            "reward_model": str(folder / "reward"),
            "max_new_tokens": 4,
        },
    }


def _probe(choice: Choice) -> dict[str, Any]:
    entry = {"threshold": "fpr:0.25"} if choice.probe_kind == "linear" else {}
    return {**PROBE, "entry": entry}


def _same_start(config: Config, inputs: Inputs) -> None:
    """Whether the clients that the probe learnt from started at the federation's initial LoRA."""
    design = replace(
        ZOO_DESIGN, lora=LoRASettings(alpha=config.lora.alpha)
    )  # nothing else of it is read
    known = read_initial(
        inputs.out / "work" / "replicate-0" / "deltas", str(config.model.name), design
    )
    if not _same(known, build_federation(config).initial):
        raise DryRunError(
            "the probe's clients started at another LoRA than the federation does; expected one"
            " initial adapter"
        )


def _interrupted(config: Config) -> RunResult:
    """The run, stopped after its first round and in the middle of its second, and resumed from its
    folder.
    """

    def kill(what: str, number: int, client: str, value: float) -> None:
        if what == "client" and number == 2:
            raise _Stop

    try:
        simulate(config, watch=kill)
    except _Stop:
        return resume(str(config.output.folder))
    raise DryRunError("the run was not stopped; expected it to call back after every client")


def _elsewhere(config: Config) -> Config:
    return config.model_copy(
        update={
            "output": config.output.model_copy(update={"folder": f"{config.output.folder}-resumed"})
        }
    )


def _check(result: RunResult, choice: Choice) -> None:
    """Whether every client was heard, the level scored with the evidence it reads, and every
    figure was taken.
    """
    config, level = result.config, ROWS.get(choice.row, {}).get("level")
    asked_for = config.clients.sampled or config.clients.count
    for record in result.records:
        if record.reasons or len(record.factors) != asked_for:
            raise DryRunError(
                f"round {record.round}: got factors of {len(record.factors)} clients and refusals"
                f" {dict(record.reasons)}; expected none"
            )
    first = result.records[0]
    evidence = config.defense.make_level(0.5).evidence if level else None
    if level and len(first.scores) != asked_for:
        raise DryRunError(
            f"round 1: got scores of {len(first.scores)} clients; expected all {asked_for}"
        )
    if (first.bytes["evidence"] > 0) != (evidence in (LOCAL_STEPS, SHADOW_STEPS, SHADOW_GRADIENT)):
        raise DryRunError(
            f"round 1: got {first.bytes['evidence']} bytes of evidence for a level that reads"
            f" {evidence}"
        )
    wanted = {"refusal_rule", "refusal_strict", "judged_safe", "reward", "n_refusal", "n_judged"}
    if not wanted <= result.metrics.keys() or result.metrics["n_refusal"] != GOALS:
        raise DryRunError(
            f"got the metrics {dict(result.metrics)}; expected {', '.join(sorted(wanted))}, of"
            f" {GOALS} goals"
        )


def _untimed(records: Sequence[RoundRecord]) -> list[RoundRecord]:
    return [replace(record, seconds={}) for record in records]


def _same(left: Adapter, right: Adapter) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(pair.A, right[name].A) and np.array_equal(pair.B, right[name].B)
        for name, pair in left.items()
    )


if __name__ == "__main__":
    try:
        main()
    except (LoraprobeError, FedloopError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
