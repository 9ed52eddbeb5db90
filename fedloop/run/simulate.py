"""One process, a whole federation.

Sample clients, train them, weigh their updates, average, measure, save.

    result = simulate("experiment.toml")

Everything random follows from the experiment's seed, the round and the client's number, never from
what ran before, so that a run that was killed and resumed ends bit for bit where an uninterrupted
one does (on the same machine, with the same number of threads).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..callbacks import Callback
from ..checks import is_integer
from ..config import Config, read_values
from ..errors import ConfigError, StateError
from .build import build_clients, build_federation, roles_of
from .folder import RunFolder, read_config, written_to
from .identity import data_digest
from .plan import plan_round
from .run import Run, RunResult, Watch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def simulate(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    watch: Watch | None = None,
    callbacks: Sequence[Callback] = (),
    changing: Collection[str] = (),
) -> RunResult:
    """Run an experiment in this process, or go on with it if its output folder holds a part of it.

    Args:
        config: a Config, a nested dict of its fields, or the path of a TOML file.
        callbacks: called with every round's record once the round is saved.
        changing: which of "rounds" and "evaluation" may be others than so far in a run that is
            gone on with; what changes is recorded.

    Raises:
        ConfigError: a field is wrong, or two that do not fit together; or a callback is none.
        DataError, MissingExtra, ProbeFormatError, HubError: model, data or probe cannot be loaded.
        StateError: the output folder holds another experiment or a damaged one, or another process
            is at work in it.
        RunError: no room on the disk, no memory, or a folder that cannot be written to; the message
            says what is saved.
    """
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ConfigError(f"callbacks: got {callbacks!r:.80}; expected a list of functions")
    if not isinstance(config, Config):
        config = Config.read(config) if isinstance(config, str | Path) else Config.of(config)
    clients = build_clients(config)
    roles = roles_of(clients)
    folder = None
    if config.output.folder:
        path = Path(config.output.folder)
        folder = RunFolder.create(path, config, roles, changing=changing)

    def after(number: int) -> Callable[[str, float], None]:
        return lambda client, loss: watch("client", number, client, loss) if watch else None

    try:
        federation = build_federation(config, folder.path if folder else None)
        with Run(
            config,
            federation,
            folder,
            watch,
            federation.model_for_measuring,
            callbacks=callbacks,
            data=data_digest(clients),
        ) as run:
            for number in run.ahead():
                plan = plan_round(config, number)
                run.finish(federation.round(plan, clients, after(number)))
        return run.result(roles)
    finally:
        if folder is not None:
            folder.close()


def resume(
    folder: str | Path,
    *,
    rounds: int | None = None,
    evaluation: str | Path | None = None,
    watch: Watch | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Go on with a run from its folder alone, wherever that folder is now.

    Args:
        rounds, evaluation: as in `continued`.

    Raises:
        StateError: it is not the folder of a run. Otherwise as `simulate`.
    """
    return simulate(
        continued(folder, rounds, evaluation),
        watch=watch,
        callbacks=callbacks,
        changing=flagged(rounds, evaluation),
    )


def flagged(rounds: int | None, evaluation: str | Path | None) -> list[str]:
    """What may change in a run that is gone on with so."""
    changes = {"rounds": rounds, "evaluation": evaluation}
    return [name for name, value in changes.items() if value is not None]


def continued(
    folder: str | Path, rounds: int | None = None, evaluation: str | Path | None = None
) -> Config:
    """The configuration of a run to go on with.

    Args:
        rounds: how many it has from now on; the finished ones count. A schedule of learning rates
            spans the new number from the next round on.
        evaluation: a TOML file whose table [evaluation] says what is measured from now on.

    Raises:
        StateError: it is not the folder of a run.
        ConfigError: a value is not valid, or fewer rounds than are finished.
    """
    config = read_config(Path(folder))
    if rounds is not None:
        done = len(RunFolder(Path(folder)).load()[1])
        if not is_integer(rounds, max(1, done)):
            raise ConfigError(f"rounds: got {rounds!r}; expected at least the {done} finished ones")
    values = config.model_dump()
    if rounds is not None:
        values["rounds"] = int(rounds)
    if evaluation is not None:
        tables = read_values(evaluation)
        if "evaluation" not in tables:
            raise ConfigError(f"{evaluation} has no table [evaluation]; expected what to measure")
        values["evaluation"] = tables["evaluation"]
    return written_to(Config.of(values), folder)


def global_model(folder: str | Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The model as a run's last finished round left it, LoRA and folded residuals included, with
    its tokenizer.

    Raises:
        StateError: it is not the folder of a run, or no round of it is finished.
    """
    config = read_config(Path(folder))
    state, _ = RunFolder(Path(folder)).load()
    if state is None:
        raise StateError(f"{folder} has no finished round; expected at least one")
    federation = build_federation(config)
    federation.load_state_dict(state)
    return federation.model_for_measuring()
