"""One federation of a published setting on a GPU: its data, its probe, the federation, its figures.

One command, which goes on after a kill.

    python -m paper_repro.gpu.run llama-3.1-8b-april cumulative --advbench harmful_behaviors.csv
    --malicious-gen maliciousQA.json python -m paper_repro.gpu.run qwen2.5-7b-june shadow --benign
    wildchat --malicious maliciousgen ...
    python -m paper_repro.gpu.run fedllm-attack FedAvg --show           # nothing is run
    python -m paper_repro.gpu.dry_run                                   # the same path without a
    GPU or the Hub, on random models

SETTING is a file of configs/, ROW a row of the tables: "no attack", "FedAvg", a level ("step",
"client", "shadow", "evidence", "cumulative", "shadow, cheap", "evidence, cheap") or a rule. There
is no published probe for these bases, so a row with a level first makes one (`.probes`),
in OUT/probe-paper or OUT/probe-linear; other rows of the setting use it again.

It needs pip install -e '.[fed,cli,figures,gpu]', one GPU, and a Hub token that may read the gated
base and datasets. AdvBench is data/advbench/harmful_behaviors.csv of
github.com/llm-attacks/llm-attacks; MaliciousGen is gen_data/Mistral/maliciousQA.json of
github.com/19dx/FedLLM-Attack. None of it was run by us: it takes the Hub's gated models and data.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedloop.client.training import quiet
from fedloop.config import Config
from fedloop.data.corpora import load_corpus
from fedloop.errors import ConfigError, FedloopError
from fedloop.run.run import Watch
from fedloop.run.simulate import simulate
from loraprobe.errors import DataError, LoraprobeError, MissingExtra
from zoo.labelled.deltas import duration

from ..grid.cells import NO_ATTACK
from .probes import fit_row
from .settings import (
    BENIGN,
    MALICIOUS,
    ROWS,
    SETTINGS,
    Choice,
    Inputs,
    experiment,
    read_setting,
    tables,
)

GOALS = 520  # in AdvBench


@dataclass(frozen=True)
class Smaller:
    """What a dry run does with less of.

    Attributes:
        experiment: tables to merge over the experiment's.
        probe: what `fit_row` has less of.
        goals: how many prompts there are.
    """

    experiment: Mapping[str, Any] = field(default_factory=dict)
    probe: Mapping[str, Any] = field(default_factory=dict)
    goals: int = GOALS


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare what is missing and run the federation, or go on with it."""
    options = parser().parse_args(arguments)
    choice = Choice(
        options.setting,
        options.row,
        options.benign,
        options.malicious,
        options.malicious_clients,
        options.share,
        options.probe,
        options.official_rules,
    )
    out = options.out or Path("out/gpu") / options.setting
    inputs = Inputs(
        out, out / "advbench.jsonl", options.malicious_gen, options.base, options.revision
    )
    if options.show:
        return show(choice, inputs)
    if options.advbench is None:
        raise ConfigError(
            "--advbench is missing; expected the file of AdvBench's goals: harmful_behaviors.csv,"
            " with a column goal"
        )
    if inputs.base is None and inputs.revision is None:
        inputs = replace(
            inputs, revision=pinned(read_setting(options.setting)["model"]["base"], out)
        )
    config = prepare(choice, inputs, options.advbench)
    quiet()
    result = simulate(config, watch=progress(config))
    print(json.dumps(dict(result.metrics)))
    print(f"written to {result.folder}; `fedloop report {result.folder}` draws it")
    if options.mt_bench:
        print(f"wrote {mt_bench(Path(str(result.folder)), options.mt_bench)}")
    return None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m paper_repro.gpu.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("setting", choices=SETTINGS, metavar="SETTING", help=", ".join(SETTINGS))
    add("row", choices=(NO_ATTACK, *ROWS), metavar="ROW", help=", ".join((NO_ATTACK, *ROWS)))
    add("--advbench", type=Path, help="AdvBench's goals: harmful_behaviors.csv")
    add(
        "--malicious-gen",
        type=Path,
        help="MaliciousGen: JSON lines or a list; rows with a level need it",
    )
    add("--benign", choices=BENIGN, help="what honest clients hold [default: the setting's]")
    add(
        "--malicious",
        choices=MALICIOUS,
        help="what malicious clients hold [default: the setting's]",
    )
    add("--malicious-clients", type=int, help="how many of the clients [default: the setting's]")
    add(
        "--share",
        type=float,
        help="of a malicious client's examples that are poison [default: the setting's]",
    )
    add(
        "--probe",
        choices=("paper", "linear"),
        help="[default: the paper's recipe for the paper's levels, all layers for the others]",
    )
    add(
        "--official-rules",
        action="store_true",
        help=(
            "aggregation rules as the official code computes them, where it differs from the"
            " textbook"
        ),
    )
    add("--base", type=Path, help="a local folder with the base model, instead of the Hub")
    add(
        "--revision",
        help="the base model's 40-digit commit [default: today's, noted in OUT/revision.txt]",
    )
    add(
        "--mt-bench",
        type=Path,
        help="FastChat's question.jsonl: also write the first-turn answers for its GPT-4 judge",
    )
    add("--out", type=Path, help="a folder for this setting [default: out/gpu/SETTING]")
    add("--show", action="store_true", help="print the experiment, and stop")
    return made


def show(choice: Choice, inputs: Inputs) -> None:
    """Print what would be run. Files that are not there yet stand as their names."""
    shown = replace(
        inputs,
        revision=inputs.revision or "COMMIT",
        malicious_gen=inputs.malicious_gen or Path("maliciousQA.json"),
    )
    print(json.dumps(tables(choice, shown), indent=1))


def progress(config: Config) -> Watch:
    """A line a round."""
    began = time.monotonic()

    def watch(what: str, number: int, client: str, value: float) -> None:
        if what == "round":
            print(
                f"round {number} of {config.rounds}, {duration(time.monotonic() - began)}: mean"
                f" factor {value:.2f}",
                flush=True,
            )

    return watch


def prepare(
    choice: Choice,
    inputs: Inputs,
    advbench: Path,
    smaller: Smaller | None = None,
    say: Callable[[str], None] = print,
) -> Config:
    """Everything that the federation needs, made or found in `inputs.out`; returns the experiment.

    Raises:
        ConfigError, DataError, MissingExtra: a file, a model or a dataset cannot be had or is not
            what it should be.
    """
    smaller = smaller or Smaller()
    write_goals(advbench, inputs.advbench, smaller.goals)
    config = experiment(choice, inputs, smaller.experiment)
    kind = choice.probe_kind
    if kind and not (Path(str(config.defense.probe)) / "config.json").is_file():
        say(f"making the {kind} probe of {choice.setting}")
        fit_row(choice, inputs, smaller.probe)
    return shared_out(config, say)


def write_goals(source: Path, target: Path, expected: int) -> None:
    """AdvBench's goals, from its CSV, as JSON lines of prompts.

    Raises:
        DataError: the file has no column goal, or not as many goals as AdvBench.
    """
    try:
        with source.open(newline="", encoding="utf-8") as file:
            goals = [row.get("goal") or "" for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"cannot read {source}: {error}. Expected AdvBench's harmful_behaviors.csv."
        ) from error
    if len(goals) != expected or not all(goal.strip() for goal in goals):
        raise DataError(
            f"{source} has {sum(bool(goal.strip()) for goal in goals)} goals in {len(goals)} rows;"
            f" expected {expected}, in a column goal"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        "".join(json.dumps({"prompt": goal}) + "\n" for goal in goals), encoding="utf-8"
    )


def shared_out(config: Config, say: Callable[[str], None] = print) -> Config:
    """The experiment with as many examples a client as its malicious source can be shared out into.

    The official code takes what there is of a source that is smaller than was asked for, and shares
    it out (MaliciousGen's 3,551 pairs among clients of 5,000).
    """
    of = config.clients
    pool = len(load_corpus(str(of.malicious_source)).examples) if of.malicious else 0
    most = of.examples
    while of.malicious * round(of.poison_share * most) > pool:
        most -= 1
    if most == of.examples:
        return config
    say(
        f"{of.malicious_source} has {pool} examples for {of.malicious} clients of {of.examples}:"
        f" every client gets {most} instead"
    )
    return config.model_copy(update={"clients": of.model_copy(update={"examples": most})})


def pinned(base: str, out: Path) -> str:
    """The commit of the base model that this folder's probes and runs are of.

    Noted the first time, the same ever after.

    Raises:
        DataError: the Hub does not say.
    """
    note = out / "revision.txt"
    if not note.exists():
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            commit = HfApi().model_info(base).sha
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise DataError(
                f"cannot ask the Hub for {base}: {str(error).splitlines()[0]}. Give --revision, or"
                " a local folder with --base."
            ) from error
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{commit}\n", encoding="utf-8")
    return note.read_text(encoding="utf-8").strip()


def mt_bench(folder: Path, questions: Path, max_new_tokens: int = 1024) -> Path:
    """The run's first-turn answers to MT-Bench, in FOLDER/mt_bench, for FastChat's judge."""
    from fedloop.measure.mtbench import first_turn_answers, read_questions, write_answers
    from fedloop.run.simulate import global_model

    asked = read_questions(questions)
    model, tokenizer = global_model(folder)
    out = folder / "mt_bench" / f"{folder.name}.jsonl"
    write_answers(
        out,
        folder.name,
        asked,
        first_turn_answers(model, tokenizer, asked, max_new_tokens=max_new_tokens),
    )  # type: ignore[arg-type]
    return out


if __name__ == "__main__":
    try:
        main()
    except (LoraprobeError, FedloopError, MissingExtra) as error:
        sys.exit(f"{type(error).__name__}: {error}")
