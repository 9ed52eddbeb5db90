"""One process, a whole federation.

Sample clients, train them, weigh their updates, average, measure, save.

    result = simulate("experiment.toml")

Everything random follows from the experiment's seed, the round and the client's number, never from
what ran before, so that a run that was killed and resumed ends bit for bit where an uninterrupted
one does (on the same machine, with the same number of threads).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import save_adapter

from ..config import Config
from ..defense.types import RoundRecord
from ..errors import StateError
from ..measure.measurement import Measurement
from .build import build_clients, build_federation, roles_of
from .folder import RunFolder, read_config, written_to
from .global_lora import GlobalLoRA
from .plan import plan_round
from .round import Played
from .tensorboard import Board

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

Watch = Callable[[str, int, str, float], None]
"""Called as watch("client", round, client id, mean loss) after every client and watch("round",
round, "", mean factor) after every round.
"""
Model = Callable[[], "tuple[PeftModel, PreTrainedTokenizerBase]"]


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        adapter: the final global LoRA.
        metrics: of the final global model.
        roles: client -> role, source and poison share; for reading the records, the defence never
            saw it.
        folder: where it was written, if anywhere.
    """

    config: Config
    records: tuple[RoundRecord, ...]
    adapter: Adapter
    metrics: Mapping[str, float]
    roles: Mapping[str, Mapping[str, Any]]
    folder: Path | None


def simulate(
    config: Config | Mapping[str, Any] | str | Path, *, watch: Watch | None = None
) -> RunResult:
    """Run an experiment in this process, or go on with it if its output folder holds a part of it.

    Args:
        config: a Config, a nested dict of its fields, or the path of a TOML file.

    Raises:
        ConfigError: a field is wrong, or two that do not fit together.
        DataError, MissingExtra, ProbeFormatError, HubError: model, data or probe cannot be loaded.
        StateError: the output folder holds another experiment or a damaged one.
    """
    if not isinstance(config, Config):
        config = Config.read(config) if isinstance(config, str | Path) else Config.of(config)
    clients = build_clients(config)
    roles = roles_of(clients)
    folder = None
    if config.output.folder:
        folder = RunFolder.create(Path(config.output.folder), config, roles)
    federation = build_federation(config, folder.path if folder else None)

    def after(number: int) -> Callable[[str, float], None]:
        return lambda client, loss: watch("client", number, client, loss) if watch else None

    with Run(config, federation, folder, watch, federation.model_for_measuring) as run:
        for number in run.ahead():
            plan = plan_round(config, number)
            run.finish(federation.round(plan, clients, after(number)))
    return run.result(roles)


class Run:
    """What a run has done so far: in memory, in its folder, and for whoever watches.

    Engines play rounds; this finishes them. Entering it reads the folder: the federation then has
    the state after the last finished round, or the folder the initial LoRA.

    Args:
        model: the model with the global LoRA on it, for measuring; None if nothing is measured.

    Attributes:
        records: of the finished rounds, once it is entered.

    Raises:
        DataError, MissingExtra: what the evaluation names cannot be had.
    """

    def __init__(
        self,
        config: Config,
        federation: GlobalLoRA,
        folder: RunFolder | None,
        watch: Watch | None = None,
        model: Model | None = None,
    ) -> None:
        self._config = config
        self._federation = federation
        self._folder = folder
        self._watch = watch
        self._model = model
        self._measure = Measurement.of(config.evaluation, config.seed, config.training.max_length)
        self._board = Board(None, 0)
        self.records: list[RoundRecord] = []

    def __enter__(self) -> Run:
        """Raises StateError: the folder is damaged."""
        if self._folder is None:
            return self
        state, self.records = self._folder.load()
        if state is None:
            save_adapter(self._federation.lora, self._folder.path / "initial")
        else:
            self._federation.load_state_dict(state)
        if self._config.output.tensorboard:
            self._board = Board(self._folder.path, len(self.records))
        return self

    def ahead(self) -> range:
        """The numbers of the rounds that are still to be played."""
        return range(len(self.records) + 1, self._config.rounds + 1)

    def finish(self, played: Played) -> None:
        """Measure the global model if it is time to, save the round, and tell who watches."""
        number = played.assessment.round
        metrics: Mapping[str, float] = {}
        if self._is_measured(number) and self._measure and self._model:
            began = time.perf_counter()
            metrics = self._measure(*self._model())
            played.seconds["evaluate"] = time.perf_counter() - began
        record = played.record(metrics)
        self.records.append(record)
        if self._folder:
            self._folder.save(record, self._federation.state_dict())
        self._board.write(record)
        if self._watch:
            self._watch("round", number, "", sum(record.factors.values()) / len(record.factors))

    def _is_measured(self, number: int) -> bool:
        every = self._config.evaluation.every
        return number == self._config.rounds or bool(every and number % every == 0)

    def result(self, roles: Mapping[str, Mapping[str, Any]]) -> RunResult:
        """What the run leaves, once every round is finished; writes the final adapter."""
        if self._folder:
            save_adapter(self._federation.lora, self._folder.path / "adapter")
        return RunResult(
            self._config,
            tuple(self.records),
            self._federation.lora,
            self.records[-1].metrics,
            roles,
            self._folder.path if self._folder else None,
        )

    def __exit__(self, *_: object) -> None:
        self._board.close()


def resume(folder: str | Path, *, watch: Watch | None = None) -> RunResult:
    """Go on with a run from its folder alone, wherever that folder is now.

    Raises:
        StateError: it is not the folder of a run. Otherwise as `simulate`.
    """
    return simulate(written_to(read_config(Path(folder)), folder), watch=watch)


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
