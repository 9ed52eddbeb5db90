"""The parent: starts children, watches the clock, and says which case of which child went wrong
and how.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from .worker import Result, work

BATCH = 500  # cases of one child


@dataclass(frozen=True)
class Limits:
    """What one case may take.

    Seconds of wall time, and bytes of memory above those of an idle child.
    """

    seconds: float = 30.0
    memory: int = 1 << 30


@dataclass
class Tally:
    """What came of a run of cases.

    Attributes:
        outcomes: (mutation, outcome) -> cases; failures are counted under "failed".
        failures: (number, kind: exception | silent | memory | crash | hang, mutation, what
            happened).
    """

    first: int
    cases: int = 0
    seconds: float = 0.0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[tuple[int, str, str, str]] = field(default_factory=list)


def run(
    target: str, seed: int, first: int, cases: int, limits: Limits = Limits()
) -> Tally:  # frozen
    """Run cases first, first + 1, ... of a target, in as many children as it takes."""
    tally, begun, number = Tally(first), time.monotonic(), first
    while number < first + cases:
        number = _child(
            tally, target, seed, range(number, min(number + BATCH, first + cases)), limits
        )
    tally.cases, tally.seconds = number - first, time.monotonic() - begun
    return tally


def _child(tally: Tally, target: str, seed: int, numbers: range, limits: Limits) -> int:
    """One child; the number of the case to go on with."""
    context = multiprocessing.get_context(
        "forkserver"
    )  # children that are forked from a process which has imported everything and run nothing
    context.set_forkserver_preload(["fuzz.worker", "xgboost", "fastapi"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=work, args=(sender, target, seed, numbers, limits.memory), daemon=True
    )
    process.start()
    sender.close()
    try:
        current, fault = _listen(receiver, tally, limits)
    finally:
        if process.is_alive():
            process.kill() if current is not None else process.join(limits.seconds)
        process.join()
        receiver.close()
    if current is None and not fault:
        return numbers.stop
    if current is None:
        raise RuntimeError(f"the child of {target} did not start: {_ending(process)}")
    kind, what = ("hang", fault) if fault else ("crash", _ending(process))
    _note(tally, current, kind, "?", what)
    return current + 1


def _listen(receiver: Connection, tally: Tally, limits: Limits) -> tuple[int | None, str]:
    """Take down what a child reports.

    (the case that it did not come back from, why), or (None, "") when it is done.
    """
    current: int | None = None
    while True:
        # The first message may take longer: the fork server has to import torch.
        if not receiver.poll(limits.seconds if current is not None else 300.0):
            return current, f"no answer within {limits.seconds:g} s"
        try:
            message: Result | tuple[int] | Exception | None = receiver.recv()
        except EOFError:
            return (current, "") if current is not None else (None, "ended")
        if message is None:
            return None, ""
        if isinstance(message, Exception):
            raise message
        if len(message) == 1:
            current = message[0]
            continue
        number, mutation, outcome, what = message
        if outcome:
            tally.outcomes[mutation, outcome] += 1
        else:
            _note(
                tally,
                number,
                "memory" if what.startswith("MemoryError") else "failure",
                mutation,
                what,
            )


def _note(tally: Tally, number: int, kind: str, mutation: str, what: str) -> None:
    tally.failures.append((number, kind, mutation, what))
    tally.outcomes[mutation, "failed"] += 1


def _ending(process: ForkServerProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"
