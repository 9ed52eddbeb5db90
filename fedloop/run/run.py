"""A run: what engines play, round by round, is measured, saved and told here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from safetensors import SafetensorError

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import save_adapter

from ..callbacks import Callback, close_all, configured
from ..config import Config
from ..defense.memory import probe_digest
from ..defense.types import RoundRecord
from ..errors import EvidenceError, RunError
from ..measure.measurement import Measurement
from .best import Best
from .folder import RunFolder
from .global_lora import GlobalLoRA
from .round import Played
from .words import read_words

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

    @property
    def problem(self) -> str:
        """Why nothing was trained: every round was skipped; "" if one was not."""
        if not all(record.skipped for record in self.records):
            return ""
        last = self.records[-1]
        reasons = "; ".join(dict.fromkeys(last.reasons.values()))
        return (
            f"nothing was trained: all {len(self.records)} rounds were skipped, and the adapter is"
            f" the initial one. Round {last.round}: {last.note or 'skipped'}"
            + (f" ({reasons[:500]})" if reasons else "")
        )


class Run:
    """What a run has done so far: in memory, in its folder, and for whoever watches.

    Engines play rounds; this finishes them. Entering it reads the folder: the federation then has
    the state after the last finished round, or the folder the initial LoRA.

    Args:
        folder: this process's, until the run is left.
        model: the model with the global LoRA on it, for measuring; None if nothing is measured.
        callbacks: called with every round's record once the round is saved, and closed in the end.
            What they raise ends the run.
        data: the digest of the clients' data, where this process knows them.

    Attributes:
        records: of the finished rounds, once it is entered.

    Raises:
        DataError, MissingExtra: what the evaluation names cannot be had.
        RunError: on the way out, for want of room on the disk, of memory or of a writable folder;
            the message says what is saved.
    """

    def __init__(
        self,
        config: Config,
        federation: GlobalLoRA,
        folder: RunFolder | None,
        watch: Watch | None = None,
        model: Model | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        data: str | None = None,
    ) -> None:
        self._config = config
        self._federation = federation
        self._folder = folder
        self._watch = watch
        self._model = model
        self._callbacks = list(callbacks)
        self._data = data
        self._measure = Measurement.of(config.evaluation, config.seed, config.training.max_length)
        self._best = Best(config.evaluation, self._measure.names)
        self.records: list[RoundRecord] = []
        self._saved = 0  # the last round that has a checkpoint

    def __enter__(self) -> Run:
        """Raises StateError: the folder is damaged, or data, probe or base are others now."""
        with self._named_state():
            return self._entered()

    def _entered(self) -> Run:
        folder, pending = self._folder, None
        if folder is not None:
            state, self.records = folder.load()
            self._saved = len(self.records)
            probe = probe_digest(self._federation.defense.probe)
            content = {"base": self._federation.base_digest, "probe": probe, "data": self._data}
            folder.check(content)
            if state is None:
                folder.write_audit("began", rounds=self._config.rounds, **folder.about["content"])
                save_adapter(self._federation.lora, folder.path / "initial")
            else:
                self._federation.load_state_dict(state)
                if not folder.is_logged or self._is_due(self.records[-1]):
                    pending = self.records.pop()
        path, name = (folder.path, folder.about["id"]) if folder else (None, uuid4().hex)
        self._callbacks += configured(self._config, path, name, len(self.records))
        if pending is not None:
            self._settle(pending)
        return self

    def _is_due(self, record: RoundRecord) -> bool:
        """Whether a finished round has to be measured and was not."""
        return not record.metrics and bool(self._measured(record.round))

    def ahead(self) -> Iterator[int]:
        """The numbers of the rounds that are still to be played, until the run has to stop."""
        while len(self.records) < self._config.rounds and not self._best.is_stalled(self.records):
            self._listen()
            yield len(self.records) + 1

    def _listen(self) -> None:
        """Apply what an operator said since the last round."""
        folder, defense = self._folder, self._federation.defense
        if folder is None:
            return
        words = read_words(folder.path)
        for word in words[folder.about.get("words", 0) :]:
            say = defense.allow if word.allowed else defense.deny
            ignored = ""
            try:
                say(word.client, word.until, word.why)
            except EvidenceError as error:  # it is over by now
                ignored = str(error)
            what = "allow" if word.allowed else "deny"
            facts = {"client": word.client, "until": word.until, "why": word.why}
            folder.write_audit(what, from_round=len(self.records) + 1, **facts, ignored=ignored)
        folder.about["words"] = len(words)

    def finish(self, played: Played) -> None:
        """Save the round, then measure the global model if it is time to, and tell who watches."""
        if self._folder:
            played.notes += [
                f"{name} is now {new!r}, was {old!r}"
                for change in self._folder.about.get("changes", [])
                if change["after"] == played.assessment.round - 1
                for name, (old, new) in change["fields"].items()
            ]
            self._folder.save(played.record(), self._federation.state_dict())
            self._saved = played.assessment.round
        self._settle(played.record())
        record = self.records[-1]
        if self._watch:
            mean = sum(record.factors.values()) / len(record.factors) if record.factors else 0.0
            self._watch("round", record.round, "", mean)

    def _settle(self, record: RoundRecord) -> None:
        """What comes after a round is saved: it can be done again, and loses no training."""
        folder, lora = self._folder, self._federation.lora
        if folder and record.round == self._config.rounds:
            save_adapter(lora, folder.path / "adapter")
        measure = self._measured(record.round)
        if measure and self._model:
            began = time.perf_counter()
            metrics = measure(*self._model())
            seconds = {**record.seconds, "evaluate": time.perf_counter() - began}
            record = replace(record, metrics=metrics, seconds=seconds)
        self.records.append(record)
        if folder:
            if self._best.is_new(self.records):
                save_adapter(lora, folder.path / "best")
            folder.log(self.records)
        for callback in self._callbacks:
            callback(record)

    def _measured(self, number: int) -> Measurement | None:
        """What is measured after a round."""
        every = self._config.evaluation.every
        due = number == self._config.rounds or (every and number % every == 0)
        return self._measure if due and self._measure and self._model else None

    def result(self, roles: Mapping[str, Mapping[str, Any]]) -> RunResult:
        """What the run leaves, once every round is finished; writes the final adapter."""
        if self._folder:
            with self._named_state():
                save_adapter(self._federation.lora, self._folder.path / "adapter")
        return RunResult(
            self._config,
            tuple(self.records),
            self._federation.lora,
            self.records[-1].metrics,
            roles,
            self._folder.path if self._folder else None,
        )

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        close_all(self._callbacks)
        if error is not None and is_of_the_machine(error):
            raise self._stopped(error) from error

    @contextmanager
    def _named_state(self) -> Iterator[None]:
        try:
            yield
        except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
            if not is_of_the_machine(error):
                raise
            raise self._stopped(error) from error

    def _stopped(self, error: BaseException) -> RunError:
        return RunError(f"the run cannot go on: {type(error).__name__}: {error}. {self.saved}")

    @property
    def saved(self) -> str:
        """What is safe, in words."""
        if self._folder is None:
            return "nothing is saved: the run has no folder"
        done = self._saved
        path = self._folder.path
        what = f"rounds 1 to {done} are" if done else "no round is"
        return f"{what} saved in {path}; `fedloop resume {path}` goes on from there"


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error says that disk or memory are full, or that a file cannot be written."""
    if isinstance(error, ValueError):  # ours
        return False
    if isinstance(error, OSError | MemoryError | SafetensorError):
        return True
    return isinstance(error, RuntimeError) and (
        "out of memory" in str(error) or "can't allocate memory" in str(error)
    )
