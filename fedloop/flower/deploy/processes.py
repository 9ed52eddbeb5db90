"""Processes that are started together and end together, whatever happens to their starter."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from ...errors import EngineError
from .. import QUIET

_MARK = "FEDLOOP_FLOWER_PROCESSES"
_GRACE = 8.0  # seconds for a process to end by itself once it is asked to
_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


class Processes:
    """A group of child processes, each with a log file.

    Leaving the block ends them and everything that they started.

    Flower's processes start others in sessions of their own. All of them carry a mark in their
    environment, by which they are found on Linux; each of them also watches its parent, so that
    none outlives a killed one for long.

    Args:
        home: Flower's own folder (FLWR_HOME): nothing of the user's is read or written.
        logs: a folder for one log a process; if None they write where this process writes.
    """

    def __init__(self, home: Path, logs: Path | None) -> None:
        self.home, self.logs = home, logs
        self._mark = secrets.token_hex(16)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        for folder in (home, logs):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)

    def start(
        self, name: str, command: Sequence[str | Path], **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a process under a name; it ends with this one, even if this one is killed."""
        bound = [
            sys.executable,
            "-m",
            "fedloop.flower.deploy.processes",
            str(os.getpid()),
            *map(str, command),
        ]
        marks = (  # a child may be the head of a group itself
            f"{os.environ.get(_MARK, '')}:{self._mark}"
        )
        marked = {**child_environment(self.home), **environment, _MARK: marks}
        with self._log(name) as log:
            child = subprocess.Popen(
                bound,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=marked,
                start_new_session=True,
            )
        self._children[name] = child
        return child

    def _log(self, name: str) -> AbstractContextManager[IO[bytes] | None]:
        return nullcontext() if self.logs is None else (self.logs / f"{name}.log").open("ab")

    def check(self) -> None:
        """Whether all of them are still running.

        Raises:
            EngineError: one has ended; with the end of its log.
        """
        for name, child in self._children.items():
            if child.poll() is not None:
                raise EngineError(f"{name} ended with code {child.returncode}{self.tail(name)}")

    def tail(self, name: str, lines: int = 12) -> str:
        """The last lines of a process's log, as the end of a message."""
        if self.logs is None:
            return ""
        with suppress(OSError):
            path = self.logs / f"{name}.log"
            last = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
            return f"; the end of {path}:\n" + "\n".join(last)
        return ""

    def stop(self) -> None:
        """End them all, gently at first.

        The one that was started first ends last, the others may still have to tell it something.
        """
        deadline = time.monotonic() + _GRACE
        children = list(self._children.values())
        for wave in (children[1:], children[:1]):
            for child in wave:
                if child.poll() is None:
                    child.terminate()
            for child in wave:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, deadline - time.monotonic()))
        while (left := self.running()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for child in children:
            child.wait()

    def running(self) -> list[int]:
        """Every process that carries the mark, also those that the children started.

        Where there is no /proc, the children.
        """
        pids = [child.pid for child in self._children.values() if child.poll() is None]
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # gone meanwhile, or somebody else's
                marks = [
                    line
                    for line in entry.read_bytes().split(b"\0")
                    if line.startswith(_MARK.encode())
                ]
                if marks and self._mark.encode() in marks[0].split(b":"):
                    pids.append(int(entry.parent.name))
        return sorted(set(pids))

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def child_environment(home: Path) -> dict[str, str]:
    """The environment of every process that fedloop starts for Flower.

    Quiet, at home in its own folder, quick to look for work.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {
        **os.environ,
        **QUIET,
        "FLWR_HOME": str(home),
        "PATH": path,
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "PYTHONUNBUFFERED": "1",
    }


def flower_command(name: str) -> Path:
    """One of Flower's own programs, of the same installation.

    Raises:
        EngineError: it is not there.
    """
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise EngineError(
            f"cannot find {name}; expected it beside {sys.executable}: pip install"
            " 'loraprobe[flower-deploy]'"
        )
    return Path(path)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM once the process that started this one is gone.

    On Linux, elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it went before we asked
            raise SystemExit(1)


def main(arguments: Sequence[str]) -> None:
    """Become a command that ends with its parent: PARENT-PID COMMAND ..."""
    parent, *command = arguments
    die_with_parent(int(parent))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
