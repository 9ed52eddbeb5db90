"""What can be made to go wrong on the loopback Hub: request by request, file by file."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

KINDS = {
    "flip": (
        "change one bit of a file, on the way down or (route commit) on the way up: of its byte"
        " `value`, or of the middle one"
    ),
    "longer": "send a body of `value` more bytes than was announced",
    "die": (
        "announce the whole body, send the file's first `value` bytes at most, and close the"
        " connection"
    ),
    "stall": (
        "announce the whole body, send the file's first `value` bytes at most, and then nothing"
    ),
    "drop": "close the connection without an answer",
    "hang": "wait `value` seconds before answering; without a value never answer",
    "status": "answer with the HTTP status `value`",
    "redirect": "answer with a redirect to the URL `value`",
    "missing": "say that the file, which is in the tree, is not there",
    "commit": "name the commit `value` instead of the right one",
    "move": "let main stand for the commit `value` once this is answered",
}
BODY_KINDS = ("flip", "longer", "die", "stall")


@dataclass
class Fault:
    """One thing that goes wrong, for requests that match all of the patterns.

    Attributes:
        kind: one of KINDS.
        path: a pattern for the path of the file in the repository; of the URL where the request
            names no file.
        route: a pattern for the name of what is asked for: info, tree, resolve, storage_get,
            preupload, commit, ...
        method: a pattern for GET, HEAD, POST, PUT or DELETE.
        times: how often it happens; None for always.
        value: see KINDS.
    """

    kind: str
    path: str = "*"
    route: str = "*"
    method: str = "*"
    times: int | None = None
    value: Any = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"got fault {self.kind!r}; expected one of {', '.join(KINDS)}")

    @classmethod
    def from_json(cls, values: Any) -> Fault:
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or "kind" not in values or not set(values) <= known:
            raise ValueError(
                f"expected an object with kind and any of {', '.join(sorted(known - {'kind'}))}"
            )
        return cls(**values)

    def flipped(self, data: bytes) -> bytes:
        """A content of at least one byte under the fault "flip"."""
        place = (len(data) // 2 if self.value is None else int(self.value)) % len(data)
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


class Faults:
    """The faults that are switched on, oldest first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on: list[Fault] = []

    def add(self, kind: str, path: str = "*", **options: Any) -> Fault:
        """Switch a fault on. See Fault."""
        return self.append(Fault(kind, path, **options))

    def append(self, fault: Fault) -> Fault:
        with self._lock:
            self._on.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._on.clear()

    def to_json(self) -> list[dict[str, Any]]:
        with self._lock:
            return [asdict(fault) for fault in self._on]

    def take(self, kinds: tuple[str, ...], route: str, method: str, path: str) -> Fault | None:
        """The first fault of these kinds that the request matches.

        It happens once less from now on.
        """
        with self._lock:
            for fault in self._on:
                patterns = ((path, fault.path), (route, fault.route), (method, fault.method))
                if (
                    fault.kind in kinds
                    and fault.times != 0
                    and all(fnmatchcase(got, pattern) for got, pattern in patterns)
                ):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None
