"""A round's updates on disk.

A server's memory then does not grow with the number or size of its clients' adapters.

    with Spool(folder, layout) as spool:
        for client, count, delta in arriving:
            spool.add(client, delta)                     # one update in memory at a time
        updates = [spool.update(client, count[client]) for client in spool]
        assessment = defense.assess(number, updates)
        delta = spool.mean(assessment.weights)           # or rule.apply(..., spool.rows(clients))
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, Slot, flattened, pack
from loraprobe.adapters.pair import Factor, LazyTensor, LoRAPair
from loraprobe.errors import KindMismatch

from ..defense.types import ClientUpdate
from ..errors import AggregationError, EvidenceError
from ..files import IS_WINDOWS, remove
from ..rules.rows import StreamingMean

PREFIX = "arriving-"  # of the folders that a killed process leaves
_NUMBER = np.dtype("<f4")  # as on every machine that torch runs on; files are mapped as they are
Place = tuple[str, Factor]


@dataclass(frozen=True)
class _Step:
    """Where a step of evidence lies, and what it looks like.

    Attributes:
        start: of its first number in the file of evidence.
        layout: the matrices that were kept.
        shapes: those of all its matrices, kept or not.
    """

    start: int
    layout: Layout
    shapes: Mapping[Place, tuple[int, int]]
    base_model: str | None


class Spool:
    """The updates of one round, one row of float32 a client, in files that are gone when it is
    closed.

    Args:
        folder: where there is room for two times clients x layout.size x 4 bytes, and the evidence;
            None for the system's folder of temporary files.
        layout: what every update looks like, kind "factor_delta".
        base_model: what the adapters that are handed out say of their base.
        factors: which matrices of evidence are kept; reading the others raises.

    Raises:
        EvidenceError: the layout is one of weights: deltas are what is averaged, never parameters.
    """

    def __init__(
        self,
        folder: str | Path | None,
        layout: Layout,
        *,
        base_model: str | None = None,
        factors: tuple[Factor, ...] = ("A", "B"),
    ) -> None:
        if layout.kind != "factor_delta":
            raise EvidenceError(
                f"got a layout of kind {layout.kind!r}; expected 'factor_delta': deltas are"
                " averaged, never parameters"
            )
        self.layout = layout
        self.base_model = base_model
        self._factors = factors
        self._folder = tempfile.TemporaryDirectory(
            prefix=PREFIX, dir=folder, ignore_cleanup_errors=IS_WINDOWS
        )
        self._path = Path(self._folder.name) / "updates.f32"
        self._evidence = Path(self._folder.name) / "evidence.f32"
        self._count = 0  # rows that were ever written
        self._row_files = 0  # files of rows that were ever written
        self._numbers = 0  # numbers of evidence that were ever written
        self._rows: dict[str, int] = {}
        self._steps: dict[str, tuple[_Step, ...]] = {}
        ends = np.cumsum([0, *(slot.size for slot in layout.slots)]).tolist()
        self._starts = dict(zip(layout.slots, ends[:-1], strict=True))

    def add(self, client_id: str, delta: Adapter, steps: Sequence[Adapter] = ()) -> None:
        """Write one client's update and evidence; they need not be kept in memory afterwards.

        Raises:
            EvidenceError: the client sent one already.
            KindMismatch, LayoutMismatch, NonFiniteError: it is not of this layout, or evidence is
                not finite; the client has then sent nothing.
        """
        if client_id in self._rows:
            raise EvidenceError(f"got a second update of {client_id!r} in one round; expected one")
        vector = np.asarray(pack(delta, self.layout)[0])
        self._steps[client_id] = tuple(self._add_step(step) for step in steps)
        with self._path.open("ab") as file:
            file.write(vector.astype(_NUMBER, copy=False).data)
        self._rows[client_id] = self._count
        self._count += 1

    def _add_step(self, step: Adapter) -> _Step:
        layout = Layout.of(step, factors=self._factors)
        numbers = np.asarray(flattened(step, layout.slots)).astype(_NUMBER, copy=False)
        with self._evidence.open("ab") as file:
            file.write(numbers.data)
        shapes: dict[Place, tuple[int, int]] = {}
        for module, pair in step.items():
            shapes[module, "A"] = pair.shape_of("A")
            shapes[module, "B"] = pair.shape_of("B")
        placed = _Step(self._numbers, layout, shapes, step.base_model)
        self._numbers += numbers.size
        return placed

    def replace(self, client_id: str, delta: Adapter, steps: Sequence[Adapter]) -> None:
        """Overwrite what a client sent.

        Raises:
            EvidenceError: the client has sent nothing. Otherwise as `add`.
        """
        row = self._row(client_id)
        vector = np.asarray(pack(delta, self.layout)[0]).astype(_NUMBER, copy=False)
        self._steps[client_id] = tuple(self._add_step(step) for step in steps)
        with self._path.open("r+b") as file:
            file.seek(row * self.layout.size * _NUMBER.itemsize)
            file.write(vector.data)

    def discard(self, client_id: str) -> None:
        """Forget a client's update, if it has sent one."""
        self._rows.pop(client_id, None)
        self._steps.pop(client_id, None)

    def __iter__(self) -> Iterator[str]:
        """The clients, in the order of arrival."""
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def update(self, client_id: str, num_examples: int) -> ClientUpdate:
        """What a client sent, as the defence takes it; numbers are read when they are asked for.

        Raises:
            EvidenceError: the client has sent none.
        """
        return ClientUpdate(client_id, num_examples, self.adapter(client_id), self.steps(client_id))

    def adapter(self, client_id: str) -> Adapter:
        """A client's update; each matrix is read from the file whenever it is asked for, and not
        kept.

        Raises:
            EvidenceError: the client has sent none.
        """
        start = self._row(client_id) * self.layout.size
        matrices = {
            (slot.module, slot.factor): self._lazy(self._path, start + self._starts[slot], slot)
            for slot in self.layout.slots
        }
        return _adapter(matrices, self.layout.scalings, self.base_model)

    def steps(self, client_id: str) -> tuple[Adapter, ...]:
        """A client's evidence, read as `adapter` is.

        Raises:
            EvidenceError: the client has sent none.
        """
        self._row(client_id)
        return tuple(self._step(step) for step in self._steps[client_id])

    def _step(self, step: _Step) -> Adapter:
        matrices = {place: LazyTensor(shape, not_kept) for place, shape in step.shapes.items()}
        start = step.start
        for slot in step.layout.slots:
            matrices[slot.module, slot.factor] = self._lazy(self._evidence, start, slot)
            start += slot.size
        return _adapter(matrices, step.layout.scalings, step.base_model)

    def _lazy(self, path: Path, start: int, slot: Slot) -> LazyTensor:
        read: Callable[[], Tensor] = partial(_matrix, path, start, slot.shape)
        return LazyTensor(slot.shape, read)

    def vector(self, client_id: str) -> Tensor:
        """A client's update, packed: (layout.size,) float32."""
        return _read(self._path, self._row(client_id) * self.layout.size, self.layout.size)

    def mean(self, weights: Mapping[str, float]) -> Tensor:
        """The weighted mean (layout.size,), read row by row in the order of the client ids.

        Clients of weight 0 are not read.

        Raises:
            AggregationError: no weight above 0, or a weight that is not valid.
            EvidenceError: a client with weight has sent nothing.
        """
        counted = [client for client in sorted(weights) if weights[client] != 0]
        shares = np.array([weights[client] for client in counted], np.float64)
        total = StreamingMean()
        for client, share in zip(counted, shares / (shares.sum() or 1.0), strict=True):
            total.add(self.vector(client), share)
        return total.result()

    def rows(self, client_ids: Collection[str]) -> Tensor:
        """The packed updates of these clients, (n, layout.size) float32 in their order, mapped from
        a file: for a rule that compares rows.

        Raises:
            AggregationError: no client at all.
            EvidenceError: one has sent none.
        """
        if not client_ids:
            raise AggregationError(
                "got no client; expected those of weight above 0. Skip the round: nobody is left to"
                " aggregate."
            )
        self._row_files += 1
        path = self._path.with_name(f"chosen-{self._row_files}.f32")
        with path.open("wb") as file:
            for client in client_ids:
                file.write(self.vector(client).numpy().astype(_NUMBER, copy=False).data)
        mapped = torch.from_file(
            str(path), size=len(client_ids) * self.layout.size, dtype=torch.float32
        )
        remove(path)  # the mapping keeps the rows; Windows keeps the file until it is closed
        return mapped.view(len(client_ids), self.layout.size)

    def close(self) -> None:
        """Delete the files; adapters that were handed out cannot be read any more."""
        self._folder.cleanup()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _row(self, client_id: str) -> int:
        if client_id not in self._rows:
            raise EvidenceError(
                f"got no update of {client_id!r} in this round; expected one of its {len(self)}"
                " clients"
            )
        return self._rows[client_id]


def _adapter(
    matrices: Mapping[Place, LazyTensor], scalings: Mapping[str, float], base_model: str | None
) -> Adapter:
    pairs = {
        module: LoRAPair(matrices[module, "A"], matrices[module, "B"], scaling)
        for module, scaling in scalings.items()
    }
    return Adapter(pairs, kind="factor_delta", base_model=base_model)


def _read(path: Path, start: int, count: int) -> Tensor:
    numbers = np.fromfile(path, dtype=_NUMBER, count=count, offset=start * _NUMBER.itemsize)
    return torch.from_numpy(numbers.astype(np.float32, copy=False))


def _matrix(path: Path, start: int, shape: tuple[int, int]) -> Tensor:
    return _read(path, start, shape[0] * shape[1]).view(shape)


def not_kept() -> Tensor:
    """What is read of a factor that the defence was said not to need."""
    raise KindMismatch("this factor is not part of the evidence: the probe was said not to read it")
