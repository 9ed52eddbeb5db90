"""The files of one run, and how they survive a kill.

config.json     the experiment, checked
clients.json    which client plays which role: for reports only, the defence never sees it
records.jsonl   one RoundRecord a line, only ever appended to
checkpoint/     the state after the last finished round (see fedloop.run.checkpoint)
initial/ adapter/   the LoRA before the first and after the last round, in PEFT's format
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..defense.types import RoundRecord
from ..errors import StateError
from .checkpoint import load_checkpoint, save_checkpoint
from .spool import PREFIX


@dataclass(frozen=True)
class RunFolder:
    """A run's folder. A round's record is in its checkpoint first and in the log second.

    Opening mends the log.
    """

    path: Path

    @classmethod
    def create(cls, path: Path, config: Config, roles: dict[str, dict[str, Any]]) -> RunFolder:
        """A new folder, or one of the same experiment to go on with.

        Raises:
            StateError: the folder holds another experiment, or files that are not a run's.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(
                f"cannot make the folder {path}: {error}. Expected a path that can be written to."
            ) from error
        if (path / "config.json").exists():
            # Before its first round is finished, nothing is lost with a run: a probe that was not
            # found may be corrected.
            started = (path / "checkpoint").exists() or (
                (path / "records.jsonl").exists() and (path / "records.jsonl").stat().st_size > 0
            )
            if started and read_config(path).digest() != config.digest():
                raise StateError(
                    f"{path} holds a run of another configuration; expected an empty folder, or the"
                    " same configuration to resume it"
                )
        elif any(found.name not in ("config.json.part",) for found in path.iterdir()):
            raise StateError(
                f"{path} is not empty and holds no run; expected a new or empty folder, or the"
                " folder of a run"
            )
        for left in path.glob(f"{PREFIX}*"):  # updates of a round that was killed
            shutil.rmtree(left, ignore_errors=True)
        _write(path / "config.json", json.dumps(config.model_dump(mode="json"), indent=1))
        _write(path / "clients.json", json.dumps(roles, indent=1))
        return cls(path)

    def load(self) -> tuple[dict[str, Any] | None, list[RoundRecord]]:
        """The state after the last finished round (None before the first), and the records up to
        it.

        Raises:
            StateError: the checkpoint or the log is damaged.
        """
        found = load_checkpoint(self.path / "checkpoint")
        if found is None:
            self._write_log([])
            return None, []
        last, saved = found
        records = [record for record in self._read_log() if record.round < last] + [
            RoundRecord.from_json(saved["record"])
        ]
        if [record.round for record in records] != list(range(1, last + 1)):
            raise StateError(
                f"{self._log}: got records of rounds {[record.round for record in records]};"
                f" expected 1 to {last}, one each"
            )
        self._write_log(records)
        return saved["state"], records

    def save(self, record: RoundRecord, state: dict[str, Any]) -> None:
        """Finish a round: checkpoint, then log."""
        save_checkpoint(
            self.path / "checkpoint", record.round, {"record": record.to_json(), "state": state}
        )
        with self._log.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def _log(self) -> Path:
        return self.path / "records.jsonl"

    def _read_log(self) -> list[RoundRecord]:
        """The whole lines; a kill can leave half a line at the end, whose round the checkpoint
        holds.
        """
        if not self._log.exists():
            return []
        try:
            lines = self._log.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise StateError(
                f"cannot read {self._log}: {error}. Expected the records that `fedloop run` wrote."
            ) from error
        return [RoundRecord.from_json(line) for line in lines[:-1]]

    def _write_log(self, records: list[RoundRecord]) -> None:
        text = "".join(record.to_json() + "\n" for record in records)
        if not self._log.exists() or self._log.read_text(encoding="utf-8") != text:
            _write(self._log, text)


def written_to(config: Config, folder: str | Path) -> Config:
    """The same experiment, written to another folder."""
    output = config.output.model_copy(update={"folder": str(folder)})
    return config.model_copy(update={"output": output})


def read_config(path: Path) -> Config:
    """The configuration of a run's folder.

    Raises:
        StateError: there is none, or it cannot be read.
    """
    try:
        return Config.of(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path} is not the folder of a run: {error}. Expected one that `fedloop run` wrote."
        ) from error


def read_run(path: Path) -> tuple[Config, dict[str, dict[str, Any]], list[RoundRecord]]:
    """Configuration, roles by client and records of a run, finished or not; changes nothing.

    Raises:
        StateError: it is not a run's folder, or a file of it is damaged.
    """
    config = read_config(path)
    folder = RunFolder(path)
    try:
        roles = json.loads((path / "clients.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(
            f"cannot read {path / 'clients.json'}: {error}. Expected the file that `fedloop run`"
            " wrote."
        ) from error
    return config, roles, folder._read_log()


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
