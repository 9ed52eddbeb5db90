"""Cases of a target in this process, or in a child that may die of one.

    python -m fuzz.cases TARGET CASES SEED FOLDER

What a case loads lies in FOLDER while it runs, so that after a crash, a hang or a failure the files
that did it are there. The last line printed is JSON: outcome -> cases.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from .corpus import Files
from .targets import TARGETS, Target

SECONDS, MEMORY = 30, 1 << 30  # of one case; of the cases on top of what the process has


def target_of(name: str) -> Target:
    """A target by its name, or "module:ATTRIBUTE" for one of a test."""
    if ":" not in name:
        return TARGETS[name]
    module, _, attribute = name.partition(":")
    found: Target = getattr(importlib.import_module(module), attribute)
    return found


def run(target: Target, cases: int, number: int, root: Path, shrink: bool = False) -> Counter[str]:
    """Draw so many damaged folders and load each: outcome -> cases.

    Args:
        number: of the seed: the same cases with the same version of hypothesis.
        root: an empty folder; the damaged folder is `root/damaged`.
        shrink: whether the simplest failing case is looked for, which takes a while.

    Raises:
        Exception: a case failed; the files of the case are in `root/damaged`.
    """
    samples = target.undamaged()
    for sample, files in enumerate(samples):
        write(files, root / str(sample))
    found: Counter[str] = Counter()
    chosen = st.integers(0, len(samples) - 1)

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def case(data: Any) -> None:
        sample = data.draw(chosen)
        damaged = data.draw(target.damaged(samples[sample]))
        write(damaged, root / "damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what a loader warns of, it should have refused
            found[target.run(root / "damaged", root / str(sample))] += 1

    case()
    return found


def write(files: Files, folder: Path) -> None:
    """A folder of new files: what an earlier case has mapped stays as it was."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


@dataclass(frozen=True)
class Ending:
    """How a child ended.

    Attributes:
        kind: "ok", "failure", "crash" or "hang".
        outcomes: outcome -> cases, of one that ended well.
        text: the end of what it wrote.
    """

    kind: str
    outcomes: Counter[str]
    text: str


def run_child(name: str, cases: int, number: int, root: Path, seconds: int = SECONDS) -> Ending:
    """The same in a child under limits of memory and of seconds a case."""
    command = [sys.executable, "-m", "fuzz.cases", name, cases, number, root, seconds]
    child = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    text = child.stdout + child.stderr
    try:
        if child.returncode == 0:
            return Ending("ok", Counter(json.loads(child.stdout.splitlines()[-1])), text)
    except (ValueError, IndexError):
        return Ending("crash", Counter(), "it ended without a word, with exit code 0")
    if "Timeout (" in child.stderr:
        return Ending("hang", Counter(), text)
    if child.returncode < 0:
        return Ending("crash", Counter(), signal.Signals(-child.returncode).name + text)
    return Ending("failure", Counter(), text)


def main() -> None:
    """The child."""
    name, cases, number, root, seconds = sys.argv[1:]
    target = target_of(name)
    target.undamaged()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, -1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    load = target.load

    def watched(folder: Path) -> Any:
        faulthandler.dump_traceback_later(int(seconds), exit=True)
        try:
            return load(folder)
        finally:
            faulthandler.cancel_dump_traceback_later()

    object.__setattr__(target, "load", watched)
    print(json.dumps(run(target, int(cases), int(number), Path(root), shrink=":" not in name)))


if __name__ == "__main__":
    main()
