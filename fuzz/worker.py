"""The child process: cases one after another, each announced before it runs, so that the parent
knows which one killed it.
"""

from __future__ import annotations

import gc
import importlib
import resource
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from . import targets
from .corpus import Files
from .oracle import Failure
from .targets import Target

Result = tuple[int, str, str, str]  # number, mutation, outcome ("" for a failure), what went wrong


def target_of(name: str) -> Target:
    """A target by its name, or "module:ATTRIBUTE" for one of a test."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        found: Target = getattr(importlib.import_module(module), attribute)
        return found
    return targets.TARGETS[name]


def work(connection: Connection, name: str, seed: int, numbers: Iterable[int], memory: int) -> None:
    """Run cases. Sends (number,) before each and a Result after it, and None at the end.

    Args:
        memory: bytes of address space that cases may use on top of what the process has at its
            start.
    """
    warnings.simplefilter("error")  # what a loader warns of, it should have refused
    target = target_of(name)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        _write_samples(target, Path(root))
        _limit(memory)
        for number in numbers:
            connection.send((number,))
            try:
                result: Result | RuntimeError = run_case(target, seed, number, Path(root))
            except Exception as error:  # noqa: BLE001  # sent to the parent, which raises it
                result = RuntimeError(
                    f"case {target.name}:{seed}:{number} could not be made: {error!r}"
                )
            connection.send(result)
            if number % 200 == 0:
                gc.collect()
    connection.send(None)


def run_case(target: Target, seed: int, number: int, root: Path) -> Result:
    """One case, of which the undamaged samples lie under `root` by their numbers.

    Raises:
        Exception: a mutation cannot do what it does; that is no finding but a mistake here.
    """
    sample, mutation, files = target.case(seed, number)
    folder = root / "damaged"
    shutil.rmtree(
        folder, ignore_errors=True
    )  # new files: what an earlier case has mapped stays as it was
    _write(files, folder)
    try:
        return number, mutation, target.run(folder, root / str(sample)), ""
    except Failure as failure:
        return number, mutation, "", str(failure)
    except MemoryError:
        return number, mutation, "", "MemoryError: it asked for more memory than the limit"
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever escapes is what is looked for
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return (
            number,
            mutation,
            "",
            (
                f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}:"
                f" {str(error)[:300]!a}"
            ),
        )


def _write_samples(target: Target, root: Path) -> None:
    for number, files in enumerate(target.undamaged()):
        _write(files, root / str(number))


def _write(files: Files, folder: Path) -> None:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _limit(memory: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(
        resource.RLIMIT_AS, (used + memory, resource.getrlimit(resource.RLIMIT_AS)[1])
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
