"""The files of one run, and how they survive a kill.

config.json     the experiment, checked
clients.json    which client plays which role: for reports only, the defence never sees it
checkpoint/     the state after the last finished round (see fedloop.run.checkpoint), with what the
                run is by content and the head of the audit log
records.jsonl   one RoundRecord a line
audit.jsonl     every decision (see fedloop.defense.audit), only ever appended to
overrulings.jsonl   what an operator said of clients (see fedloop.run.words)
initial/ adapter/ best/   the LoRA before the first, after the last and after the best round
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from loraprobe.limits import RUN_CONFIG, read_limited

from ..config import Config
from ..defense.audit import AuditLog, Head, read_audit, record_digest
from ..defense.types import RoundRecord
from ..errors import StateError
from ..files import write_synced, write_whole
from .checkpoint import load_checkpoint, save_checkpoint
from .identity import Content, changes, check_content, may_change, plain_config
from .lock import lock
from .logs import AUDIT, RECORDS, read_records, read_roles
from .spool import PREFIX


@dataclass
class RunFolder:
    """A run's folder. A round is in its checkpoint first and in the log of records second.

    Attributes:
        about: what every checkpoint holds beside the state: the run's "id", its "config" and
            "content", the "audit" log's head, "changes", and how many "words" were heard.
        keep: how many rounds have a checkpoint.
    """

    path: Path
    about: dict[str, Any] = field(default_factory=dict)
    keep: int = 1
    _lock: FileLock | None = None
    _logged: int | None = None  # records that are known to be in the log
    _written: AuditLog | None = None

    @classmethod
    def create(
        cls,
        path: Path,
        config: Config,
        roles: dict[str, dict[str, Any]],
        *,
        changing: Collection[str] = (),
    ) -> RunFolder:
        """A new folder, or one of the same experiment to go on with; this process's until `close`.

        Args:
            changing: which of "rounds" and "evaluation" may be others than in the run so far; what
                changes is recorded.

        Raises:
            StateError: another process is at work in it; or it holds another experiment, or files
                that are not a run's; or it cannot be written to.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # a path may hold no NUL
            raise StateError(
                f"cannot make the folder {path}: {error}. Expected a path that can be written to."
            ) from error
        if not (path / "config.json").exists() and any(
            entry.name not in ("config.json.part", ".lock") for entry in path.iterdir()
        ):
            raise StateError(
                f"{path} is not empty and holds no run; expected a new or empty folder, or the"
                " folder of a run"
            )
        if (path / "config.json").exists() and not (path / "checkpoint").exists():
            read_config(path)  # a model, an adapter or a probe has a file of that name too
        about = {"id": uuid4().hex, "config": plain_config(config)}
        folder = cls(path, about, config.output.keep, lock(path))
        try:
            folder._open(config, roles, changing)
        except OSError as error:
            folder.close()
            raise StateError(
                f"cannot write to {path}: {error}. Expected a folder that can be written to; what"
                " it holds is as it was."
            ) from error
        except BaseException:
            folder.close()
            raise
        return folder

    def _open(
        self, config: Config, roles: dict[str, dict[str, Any]], changing: Collection[str]
    ) -> None:
        for left in self.path.glob(f"{PREFIX}*"):  # updates of a round that was killed
            shutil.rmtree(left, ignore_errors=True)
        checkpoint = load_checkpoint(self.path / "checkpoint")
        if checkpoint is None and self._log.exists() and self._log.stat().st_size:
            raise StateError(
                f"{self.path}: got {self._log.name} with rounds and no checkpoint of them; expected"
                " checkpoint/, which is written first. Put it back, or run into a new folder."
            )
        if checkpoint is not None:
            last, saved = checkpoint
            former = saved.get("about") or {}
            # What 0.1 wrote says nothing of itself: its configuration is the one beside it.
            config_then = former.get("config") or plain_config(read_config(self.path))
            content: Content = former.get("content") or dict.fromkeys(("base", "probe", "data"))
            changed = changes(config_then, config, content)
            _check_changes(self.path, changed, changing)
            self.about = {**self.about, **former, "config": plain_config(config)}
            if any(map(may_change, changed)):
                entry = {"after": last, "fields": changed}
                self.about["changes"] = [*former.get("changes", []), entry]
                self.write_audit("change", after=last, fields=changed)
                save_checkpoint(
                    self.path / "checkpoint", last, {**saved, "about": self.about}, self.keep
                )
        write_whole(self.path / "config.json", json.dumps(config.model_dump(mode="json"), indent=1))
        write_whole(self.path / "clients.json", json.dumps(roles, indent=1))

    def check(self, content: Content) -> None:
        """Whether data, probe and base are those that the run began with; they are then kept.

        Raises:
            StateError: they are not.
        """
        self.about["content"] = check_content(self.path, self.about.get("content", {}), content)

    def load(self) -> tuple[dict[str, Any] | None, list[RoundRecord]]:
        """The state after the last finished round (None before the first), and the records up to
        it. The last one may not be in the log yet. Nothing is written.

        Raises:
            StateError: the checkpoint or the log is damaged.
        """
        checkpoint = load_checkpoint(self.path / "checkpoint")
        if checkpoint is None:
            self._logged = None
            return None, []
        last, saved = checkpoint
        self.about = {**saved.get("about", {}), **self.about}
        logged = read_records(self.path)
        decided = RoundRecord.from_json(saved["record"])
        same = [
            record
            for record in logged
            if record.round == last and record_digest(record) == record_digest(decided)
        ]
        records = [record for record in logged if record.round < last] + [*same, decided][:1]
        if [record.round for record in records] != list(range(1, last + 1)):
            raise StateError(
                f"{self._log}: got records of rounds {[record.round for record in records]};"
                f" expected 1 to {last}, one each"
            )
        text = "".join(record.to_json() + "\n" for record in records)
        whole = self._log.exists() and self._log.read_text(encoding="utf-8") == text
        self._logged = last if whole else None
        return saved["state"], records

    @property
    def is_logged(self) -> bool:
        """Whether the log holds all that `load` found: the last round was measured, too."""
        return self._logged is not None

    def save(self, record: RoundRecord, state: dict[str, Any]) -> None:
        """Finish a round, before it is measured: its decisions, then its checkpoint."""
        audit = self._audit()
        audit(record)
        self.about["audit"] = list(audit.head)
        tree = {"record": record.to_json(), "state": state, "about": self.about}
        save_checkpoint(self.path / "checkpoint", record.round, tree, self.keep)

    def log(self, records: list[RoundRecord]) -> None:
        """Make the log hold these records: all that it holds, and perhaps one more."""
        if self._logged is not None and len(records) == self._logged + 1:
            write_synced(self._log, (records[-1].to_json() + "\n").encode(), "ab")
        else:
            write_whole(self._log, "".join(record.to_json() + "\n" for record in records))
        self._logged = len(records)

    def write_audit(self, what: str, **facts: Any) -> None:
        """Write a decision that is not a round's into the audit log."""
        audit = self._audit()
        audit.write(what, **facts)
        self.about["audit"] = list(audit.head)

    def _audit(self) -> AuditLog:
        """The audit log, seen to contain all that the last checkpoint knows of it.

        What follows in it is of a round that was never finished, and a line says so.
        """
        if self._written is None:
            self._written = AuditLog(self.path / AUDIT)
            head = Head(*self.about.get("audit", Head()))
            if self._written.head != head:
                read_audit(self._written.path, head)
                self._written.write("resumed", after_line=head.count)
        return self._written

    def close(self) -> None:
        """Let other processes have it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _log(self) -> Path:
        return self.path / RECORDS


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
        return Config.of(json.loads(read_limited(path / "config.json", RUN_CONFIG, StateError)))
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path} is not the folder of a run: {error}. Expected one that `fedloop run` wrote."
        ) from error


def read_run(path: Path) -> tuple[Config, dict[str, dict[str, Any]], list[RoundRecord]]:
    """Configuration, roles by client and records of a run, finished or not; changes nothing.

    Raises:
        StateError: it is not a run's folder, or a file of it is damaged.
    """
    return read_config(path), read_roles(path), read_records(path)


def _check_changes(path: Path, changed: dict[str, list[Any]], changing: Collection[str]) -> None:
    fixed = [name for name in changed if not may_change(name, changing)]
    if fixed:
        shown = "; ".join(
            f"{name}: {changed[name][1]!r}, was {changed[name][0]!r}" for name in fixed
        )
        flags = (
            ""
            if not any(map(may_change, fixed))
            else (
                " `fedloop resume FOLDER --rounds N` and `--evaluation FILE` change these two, and"
                " record it."
            )
        )
        raise StateError(
            f"{path} holds a run of another configuration ({shown[:1000]}); expected an empty"
            f" folder, or the same configuration to resume it.{flags}"
        )
