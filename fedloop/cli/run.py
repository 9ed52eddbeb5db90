"""What each `fedloop` sub-command does. Heavy libraries are imported inside: help must be quick."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    track,
)
from rich.table import Table

from loraprobe._version import __version__
from loraprobe.errors import LoraprobeError
from loraprobe.outputs import free_path

from ..errors import ConfigError, FedloopError, missing_extra

if TYPE_CHECKING:
    from ..config import Config
    from ..run.run import RunResult, Watch

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated LoRA fine-tuning that weighs its clients.",
)
console = Console()


@contextmanager
def errors_shown() -> Iterator[None]:
    """Errors that are about the input are printed, not traced; exit code 2."""
    try:
        yield
    except (LoraprobeError, FedloopError, ImportError, OSError) as error:
        shown = missing_extra(error) if isinstance(error, ImportError) else error
        say(f"{type(shown).__name__}: {shown}", Console(stderr=True))
        raise typer.Exit(2) from None


def say(line: str, where: Console | None = None) -> None:
    """Print a line as it stands."""
    (where or console).print(line, highlight=False, markup=False, soft_wrap=True)


def _version(value: bool) -> None:
    if value:
        print(f"fedloop {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""
    log = logging.getLogger("fedloop.data")  # what was read, and as what
    log.setLevel(logging.INFO)
    log.handlers = [_ConsoleLog()]


class _ConsoleLog(logging.Handler):
    """Log records as lines of the command's output."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


class Engine(StrEnum):
    """Where the clients of an experiment run."""

    IN_PROCESS = "in-process"
    FLOWER = "flower"


EngineOption = Annotated[
    Engine,
    typer.Option(
        help="in-process, or flower: a SuperLink and one SuperNode a client, on this machine."
    ),
]
TimeoutOption = Annotated[
    float, typer.Option(help="flower: seconds until a round's missing clients are given up.")
]
ROUND_TIMEOUT = 600.0
WIRE = "float32"
ForceOption = Annotated[bool, typer.Option("--force", help="Write over what is there.")]
WireOption = Annotated[str, typer.Option(help="flower: float32, or float16 for half the bytes.")]


@app.command()
def run(
    config: Annotated[
        Path, typer.Argument(help="The experiment: a TOML file; `fedloop example` prints one.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for records, checkpoints and adapters; output.folder if not given.",
        ),
    ] = None,
    engine: EngineOption = Engine.IN_PROCESS,
    round_timeout: TimeoutOption = ROUND_TIMEOUT,
    wire: WireOption = WIRE,
) -> None:
    """Run a federation on this machine, or go on with one that was interrupted."""
    with errors_shown():
        from ..config import Config
        from ..run.folder import written_to

        experiment = Config.read(config)
        if out is not None:
            experiment = written_to(experiment, out)
        result = _play(experiment, engine, round_timeout, wire)
    _print(result)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of an interrupted run.")],
    rounds: Annotated[
        int | None, typer.Option(help="So many rounds from now on, finished ones counted.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="A TOML file: measure what its [evaluation] says.")
    ] = None,
    engine: EngineOption = Engine.IN_PROCESS,
    round_timeout: TimeoutOption = ROUND_TIMEOUT,
    wire: WireOption = WIRE,
) -> None:
    """Go on with an interrupted run; it ends bit for bit where an uninterrupted one would have.

    What a flag changes is written down: in the next record, and in the audit log.
    """
    with errors_shown():
        from ..run.simulate import continued, flagged

        experiment = continued(folder, rounds, evaluation)
        changing = flagged(rounds, evaluation)
        result = _play(experiment, engine, round_timeout, wire, changing=changing)
    _print(result)


def _play(
    experiment: Config,
    engine: Engine,
    round_timeout: float,
    wire: str,
    *,
    changing: Collection[str] = (),
) -> RunResult:
    """Run or go on with an experiment, with progress bars."""
    from ..client.training import quiet

    quiet()
    with _progress(
        experiment.rounds, experiment.clients.sampled or experiment.clients.count
    ) as watch:
        if engine is Engine.IN_PROCESS:
            if (round_timeout, wire) != (ROUND_TIMEOUT, WIRE):
                raise ConfigError(
                    f"got --round-timeout {round_timeout:g} and --wire {wire} in one process, which"
                    " has no wire; expected --engine flower with them, or neither"
                )
            from ..run.simulate import simulate

            return simulate(experiment, watch=watch, changing=changing)
        from ..flower.deploy.launch import run_on_loopback
        from ..flower.settings import EngineSettings

        settings = EngineSettings(round_timeout=round_timeout, wire=wire)
        return run_on_loopback(
            experiment,
            settings,
            watch=watch,
            say=say,
            changing=changing,
        )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page to write; FOLDER/report.html if not given."),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Write one HTML page: trust, scores, weights, metrics and the overhead ledger of a run."""
    with errors_shown():
        from ..report.page import write_report

        if out is not None:
            free_path(out, force, file=True)
        page = write_report(folder, out)
    say(f"wrote {page}")


@app.command("mt-bench")
def mt_bench(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    questions: Annotated[Path, typer.Argument(help="FastChat's question.jsonl.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The file of answers; FastChat names the model by it: <model id>.jsonl.",
        ),
    ],
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer, at most.", min=1)
    ] = 1024,
    force: ForceOption = False,
) -> None:
    """Answer MT-Bench's first turns with a run's global model, in FastChat's format."""
    with errors_shown():
        from ..client.training import quiet
        from ..measure.mtbench import first_turn_answers, read_questions, write_answers
        from ..run.simulate import global_model

        free_path(out, force, file=True)
        quiet()
        prompts = read_questions(questions)
        model, tokenizer = global_model(folder)
        with console.status(f"answering {len(prompts)} questions"):
            replies = first_turn_answers(model, tokenizer, prompts, max_new_tokens)  # type: ignore[arg-type]
        write_answers(out, prompts, replies)
    say(f"wrote {out}")


@app.command()
def example(
    adapters: Annotated[
        Path | None,
        typer.Option(help="Instead, write labelled adapters into this folder, and two CSVs."),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Print an example configuration that runs as it is: all it needs comes with the package."""
    with errors_shown():
        from ..example import example_config, write_adapters

        if adapters is None:
            print(example_config(), end="")
            return
        for path in write_adapters(adapters, force):
            say(f"wrote {path}")


@app.command()
def client(
    base: Annotated[
        str, typer.Argument(help="The base model: a folder or Hub id that transformers loads.")
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="JSONL, JSON, CSV or Parquet (alpaca, prompt/completion, messages, ShareGPT, ...),"
            " hub:ORG/NAME or builtin:NAME."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for initial/ and adapter/, both in PEFT's format."
        ),
    ],
    base_name: Annotated[
        str | None,
        typer.Option(help="What the adapters call the base model, if not BASE: a probe's word."),
    ] = None,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.", min=1e-12)] = 5e-5,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 10,
    batch_size: Annotated[int, typer.Option(help="Examples a step.", min=1)] = 16,
    r: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 8,
    alpha: Annotated[float, typer.Option(help="lora_alpha.", min=1e-12)] = 16,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--module", help="An adapted module's name; PEFT's defaults if none is given."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    force: ForceOption = False,
) -> None:
    """Train one client's LoRA on its own data, as a round of the federation would."""
    with errors_shown():
        from ..client.training import (
            LocalTraining,
            LoRASettings,
            attach_lora,
            load_base,
            local_steps,
            read_adapter,
        )
        from ..data.corpora import load_corpus

        free_path(out, force)
        examples = load_corpus(data).examples
        model, tokenizer = load_base(base)
        peft_model = attach_lora(
            model, LoRASettings(r, alpha, target_modules=tuple(modules) if modules else None), seed
        )
        peft_model.save_pretrained(str(out / "initial"))
        start = read_adapter(peft_model)
        training = LocalTraining(lr=lr, steps=steps, batch_size=batch_size)
        for step in track(
            local_steps(peft_model, tokenizer, examples, start, training, seed),
            "training",
            total=steps,
            console=console,
        ):
            console.print(f"step {step.index}: loss {step.loss:.4f}")
        peft_model.save_pretrained(str(out / "adapter"))
        for saved in ("initial", "adapter"):
            _name_base(out / saved / "adapter_config.json", base_name or base)
    say(f"wrote {out / 'initial'} and {out / 'adapter'}")


def _name_base(config: Path, name: str) -> None:
    """Write what an adapter calls its base model; PEFT would ask the Hub for a name like that."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["base_model_name_or_path"] = name
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _progress(rounds: int, clients: int) -> Iterator[Watch]:
    """Bars for rounds and for the clients of the round, with the last client's loss and the
    round's mean factor.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        outer = bars.add_task("rounds", total=rounds, note="")
        inner = bars.add_task("clients", total=clients, note="")

        def watch(what: str, number: int, name: str, value: float) -> None:
            if what == "round":
                bars.update(outer, completed=number, note=f"mean factor {value:.2f}")
                bars.reset(inner)
            else:
                bars.update(inner, advance=1, note=f"{name}: loss {value:.3f}")

        yield watch


def _print(result: RunResult) -> None:
    title = escape(f"{result.config.name}: {len(result.records)} rounds")
    table = Table("client", "role", "last factor", "last weight", "rounds at 0", title=title)
    last = result.records[-1]
    for client_id, role in result.roles.items():
        factors = [
            record.factors[client_id] for record in result.records if client_id in record.factors
        ]
        weight = last.weights.get(client_id)
        table.add_row(
            client_id,
            str(role["role"]),
            f"{factors[-1]:.2f}" if factors else "-",
            f"{weight:.3f}" if weight is not None else "-",
            str(sum(factor == 0 for factor in factors)),
        )
    console.print(table)
    for name, value in result.metrics.items():
        console.print(f"{name}: {value:.4g}", highlight=False)
    if result.folder is not None:
        say(f"written to {result.folder}; `fedloop report {result.folder}` draws it")
    if result.problem:
        say(result.problem, Console(stderr=True))
        raise typer.Exit(1)
