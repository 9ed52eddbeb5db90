"""The real huggingface_hub, and our library on top of it, in a process of its own, told what to do
one line at a time.

huggingface_hub reads its environment when it is imported, and pytest keeps sockets from the test
process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from select import select
from typing import IO, Any, cast

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds for one operation, the first of which imports torch on a busy machine


class Raised(Exception):
    """What an operation raised in the other process.

    Its message, and the names of its class and of their bases.
    """

    def __init__(self, names: list[str], message: str) -> None:
        super().__init__(f"{names[0]}: {message}")
        self.names, self.message = names, message


class Client:
    """A process that has no settings but these.

    `client("push", folder, "org/name")` runs an operation of this file there.

    Args:
        endpoint: the Hub.
        home: its HF_HOME.
        settings: more environment variables.
    """

    def __init__(self, endpoint: str, home: Path, **settings: str) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("HF_") and not name.lower().endswith("_proxy")
        }
        own = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_VERBOSITY": "error",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.environment = {**kept, **own, **settings}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._orders, self._answers = (
            cast("IO[str]", self._process.stdin),
            cast("IO[str]", self._process.stdout),
        )

    def __call__(self, operation: str, *arguments: Any, **options: Any) -> Any:
        """The JSON-ready result of an operation.

        Raises:
            Raised: the operation did.
        """
        self._orders.write(json.dumps([operation, arguments, options], default=str) + "\n")
        self._orders.flush()
        if not select([self._answers], [], [], PATIENCE)[0]:
            self._process.kill()
            raise TimeoutError(f"{operation} took more than {PATIENCE} seconds")
        line = self._answers.readline()
        if not line:
            raise RuntimeError(
                f"the client process ended with {self._process.wait()} in {operation}"
            )
        answer = json.loads(line)
        if "names" in answer:
            raise Raised(answer["names"], answer["message"])
        return answer["value"]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        """End the process, also one that waits for a Hub that never answers."""
        with suppress(BrokenPipeError):  # it has ended already
            self._orders.close()
        self._answers.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def api(method: str, *arguments: Any, token: str | bool | None = None, **options: Any) -> Any:
    """A method of HfApi; what it returns as plain values."""
    from huggingface_hub import HfApi

    return _plain(getattr(HfApi(token=token), method)(*arguments, **options))


def commit(
    repo: str, files: dict[str, str | None], *, token: str | None = None, **options: Any
) -> Any:
    """One commit by HfApi: path -> text, or None to delete (a folder's path ends in /).

    Its CommitInfo.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    operations = [
        (
            CommitOperationDelete(path)
            if text is None
            else CommitOperationAdd(path_in_repo=path, path_or_fileobj=text.encode())
        )
        for path, text in files.items()
    ]
    return _plain(
        HfApi(token=token).create_commit(repo, operations, commit_message="commit", **options)
    )


def download(repo: str, name: str, **options: Any) -> str:
    """hf_hub_download; the file."""
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(repo, name, **options))


def load(
    source: str, subfolder: str | None = None, revision: str | None = None, **options: Any
) -> dict[str, Any]:
    """Probe.from_pretrained; the commit, and the scores as exact numbers."""
    from loraprobe import Probe
    from tests.helpers.probes import new_data

    probe = Probe.from_pretrained(source, subfolder, revision, **options)
    return {
        "commit": probe.commit,
        "head": probe.head.name,
        "scores": [float(score).hex() for score in probe(new_data().adapters)],
    }


def push(folder: str, repo: str, **options: Any) -> str:
    """Probe.push_to_hub of the probe in a folder; the commit."""
    from loraprobe import Probe

    return Probe.from_pretrained(folder).push_to_hub(repo, **options)


def adapter(source: str, revision: str | None = None, **options: Any) -> dict[str, Any]:
    """load_adapter with every tensor read.

    The commit, and the sums of its modules' norms as exact numbers.
    """
    from loraprobe import load_adapter

    loaded = load_adapter(source, revision, **options)
    return {
        "commit": loaded.commit,
        "norms": {name: pair.norm().hex() for name, pair in loaded.items()},
    }


def cli(*arguments: str) -> dict[str, Any]:
    """The loraprobe command, as from a shell: exit code and what it prints."""
    from typer.testing import CliRunner

    from loraprobe.cli.commands import app

    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return {"code": result.exit_code, "out": result.stdout, "err": result.stderr}


OPERATIONS = {
    operation.__name__: operation for operation in (api, commit, download, load, push, adapter, cli)
}


def _plain(value: Any) -> Any:
    """The Hub's records (some are a str with attributes) as JSON-ready values."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) or hasattr(value, "__next__"):
        return [_plain(item) for item in value]
    if hasattr(value, "__dict__"):
        return {
            name: _plain(item) for name, item in vars(value).items() if not name.startswith("_")
        }
    return value if isinstance(value, str | int | float | None) else str(value)


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that is printed gets between the answers
    sleep = time.sleep
    # what the library waits between its tries: 1 to 8 seconds
    time.sleep = lambda seconds: sleep(min(seconds, 0.02))
    for line in sys.stdin:
        name, arguments, options = json.loads(line)
        try:
            answer = {"value": OPERATIONS[name](*arguments, **options)}
        except Exception as error:  # noqa: BLE001  # told to the other process
            answer = {
                "names": [kind.__name__ for kind in type(error).__mro__],
                "message": str(error),
            }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
