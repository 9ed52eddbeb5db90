"""Many adapters: in parallel, remembered by digest, never stopped by one of them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PolicyError
from ..limits import SCAN_CACHE, read_limited
from .findings import Finding, gravest
from .policy import Policy
from .scan import Scanner, ScanResult, _digest, renamed

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

    from ..probe import Probe

Pinned = tuple[Policy, str | None, dict[str, str]]  # for `Scanner`

_scanner: Scanner | None = None  # of a worker process


def scan_many(
    targets: Sequence[str],
    policy: Policy,
    *,
    base: str | None = None,
    workers: int = 1,
    cache: Path | None = None,
    done: Callable[[ScanResult], None] = lambda result: None,
    loaded: Callable[[Mapping[str, Probe]], None] = lambda probes: None,
) -> list[ScanResult]:
    """Scan adapters: results in the order of the targets.

    Args:
        base: see `Scanner`.
        workers: processes; 1 is this one.
        cache: a file of JSON lines that results are looked up in and appended to, by the digest of
            the adapter's files and of the policy: an interrupted batch goes on where it was.
        done: called with every result as it comes.
        loaded: called with the policy's probes by name, before anything is scanned.

    Raises:
        PolicyError: the policy or the cache cannot be used. An adapter never raises.
    """
    scanner = Scanner(policy, base)  # fails here, once, and not in every worker
    loaded(scanner.probes)
    memory = _Memory(cache, scanner, base) if cache else None
    results: dict[str, ScanResult] = {}
    for target in targets:
        if memory and (former := memory.find(target)):
            results[target] = former
            done(former)
    ahead = [target for target in targets if target not in results]
    serial = workers == 1 or len(ahead) < 2
    for result in (
        map(scanner, ahead)
        if serial
        else _parallel(ahead, (policy, base, scanner.commits), workers)
    ):
        results[result.target] = result
        if memory:
            memory.add(result)
        done(result)
    return [results[target] for target in targets]


def _parallel(targets: Sequence[str], pinned: Pinned, workers: int) -> Iterator[ScanResult]:
    """Results as they come; an adapter that takes its process down is tried once more alone."""
    from concurrent.futures import as_completed
    from concurrent.futures.process import BrokenProcessPool

    finished: set[str] = set()
    try:
        with _pool(pinned, min(workers, len(targets))) as pool:
            try:
                with _uninterrupted():  # the workers start here, and inherit it
                    futures = [pool.submit(_scan, target) for target in targets]
                for future in as_completed(futures):
                    result = future.result()
                    finished.add(result.target)
                    yield result
            except (KeyboardInterrupt, GeneratorExit):  # do not scan the rest first
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool:
        for target in targets:
            if target not in finished:
                yield _alone(target, pinned)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end of the block, where the system can do that."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _alone(target: str, pinned: Pinned) -> ScanResult:
    from concurrent.futures.process import BrokenProcessPool

    try:
        with _pool(pinned, 1) as pool:
            return pool.submit(_scan, target).result()
    except BrokenProcessPool:
        message = "the process that read it was killed: out of memory, or a file made to crash it"
        finding = Finding("unreadable", pinned[0].level("unreadable"), message)
        return ScanResult(target, gravest([finding]), (finding,))


def _pool(pinned: Pinned, workers: int) -> ProcessPoolExecutor:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    context = get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_start, initargs=pinned)


def _start(*pinned: Any) -> None:
    global _scanner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _scanner = Scanner(*pinned)


def _scan(target: str) -> ScanResult:
    if _scanner is None:
        raise RuntimeError("a worker scans only after it was started")
    return _scanner(target)


class _Memory:
    """Results of former scans, by digest of adapter and policy."""

    def __init__(self, path: Path, scanner: Scanner, base: str | None) -> None:
        self._path = path
        files = [_digest(Path(name)) for name in _files(scanner.policy, base)]
        policy = asdict(scanner.policy)
        facts = {"policy": policy, "commits": scanner.commits, "base": base, "files": files}
        self._policy = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self._results: dict[str, ScanResult] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            for line in read_limited(self._path, SCAN_CACHE, PolicyError).splitlines():
                entry = json.loads(line)
                if entry["policy"] == self._policy:
                    self._results[entry["digest"]] = ScanResult.from_dict(entry["result"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PolicyError(
                f"cannot read the cache {str(self._path)!r}: {error!r}; expected what a former"
                " scan wrote. Name another file, or delete this one."
            ) from None

    def find(self, target: str) -> ScanResult | None:
        digest = self._key(target)
        result = self._results.get(digest) if digest else None
        return renamed(result, target) if result else None

    def add(self, result: ScanResult) -> None:
        digest = self._key(result.target)
        if digest is None or result.unreadable:
            return
        entry = {"policy": self._policy, "digest": digest, "result": result.to_dict()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _key(target: str) -> str | None:
        """The digest of files and of the names beside them; None where nothing is on this disk."""
        path = Path(target)
        digest = _digest(path)
        if digest is None or not path.is_dir():
            return digest
        return hashlib.sha256("\n".join([digest, *sorted(os.listdir(path))]).encode()).hexdigest()


def _files(policy: Policy, base: str | None) -> list[str]:
    named = [*policy.probes, policy.reference, base]
    return [name for name in named if name and os.path.exists(name)]
