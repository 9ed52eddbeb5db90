"""A round's updates on disk.

A server's memory then does not grow with the number or size of its clients' adapters.

with Spool(folder, layout) as spool:
    for client, delta in arriving:
        spool.add(client, delta)                                 # kind "factor_delta"; one update
        in memory at a time
    updates = [ClientUpdate(client, count[client], spool.adapter(client)) for client in spool]
    record = defense.assess(number, updates)
    delta = spool.mean(record.weights)                           # or
    AGGREGATORS[rule](spool.rows(record.weights), ...)
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, Slot, pack
from loraprobe.adapters.pair import LazyTensor, LoRAPair

from ..errors import AggregationError, EvidenceError
from ..rules.rows import StreamingMean

_NUMBER = np.dtype(
    "<f4"
)  # as it is on every machine that torch runs on; torch maps the file as it is


class Spool:
    """The updates of one round, one row of float32 a client, in files that are gone when it is
    closed.

    Args:
        folder: where there is room for two times clients x layout.size x 4 bytes.
        layout: what every update looks like, kind "factor_delta".
        base_model: what the adapters that are handed out say of their base.

    Raises:
        EvidenceError: the layout is one of weights: deltas are what is averaged, never parameters.
    """

    def __init__(
        self, folder: str | Path, layout: Layout, *, base_model: str | None = None
    ) -> None:
        if layout.kind != "factor_delta":
            raise EvidenceError(
                f"got a layout of kind {layout.kind!r}; expected 'factor_delta': deltas are"
                " averaged, never parameters"
            )
        self.layout, self.base_model = layout, base_model
        self._folder = tempfile.TemporaryDirectory(prefix="round-", dir=folder)
        self._path = Path(self._folder.name) / "updates.f32"
        self._rows: dict[str, int] = {}
        self._starts = dict(
            zip(
                layout.slots,
                np.cumsum([0, *(slot.size for slot in layout.slots)])[:-1].tolist(),
                strict=True,
            )
        )

    def add(self, client_id: str, delta: Adapter) -> None:
        """Write one client's update; it need not be kept in memory afterwards.

        Raises:
            EvidenceError: the client sent one already.
            KindMismatch, LayoutMismatch, NonFiniteError: it is not of this layout; nothing is
                written.
        """
        if client_id in self._rows:
            raise EvidenceError(f"got a second update of {client_id!r} in one round; expected one")
        vector, _ = pack(delta, self.layout)
        with self._path.open("ab") as file:
            file.write(vector.numpy().astype(_NUMBER, copy=False).data)
        self._rows[client_id] = len(self._rows)

    def __iter__(self) -> Iterator[str]:
        """The clients, in the order of arrival."""
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def adapter(self, client_id: str) -> Adapter:
        """A client's update; each matrix is read from the file whenever it is asked for, and not
        kept.

        Raises:
            EvidenceError: the client has sent none.
        """
        row = self._row(client_id)
        matrices = {
            (slot.module, slot.factor): LazyTensor(slot.shape, partial(self._matrix, row, slot))
            for slot in self.layout.slots
        }
        pairs = {
            module: LoRAPair(matrices[module, "A"], matrices[module, "B"], scaling)
            for module, scaling in self.layout.scalings.items()
        }
        return Adapter(pairs, kind="factor_delta", base_model=self.base_model)

    def vector(self, client_id: str) -> Tensor:
        """A client's update, packed: (layout.size,) float32."""
        return self._read(self._row(client_id), 0, self.layout.size)

    def mean(self, weights: Mapping[str, float]) -> Tensor:
        """The weighted mean (layout.size,), read row by row in the order of the client ids.

        Clients of weight 0 are not read.

        Raises:
            AggregationError: no weight above 0, or a weight that is not valid.
            EvidenceError: a client with weight has sent nothing.
        """
        total = StreamingMean()
        for client in sorted(weights):
            if weights[client] != 0:
                total.add(self.vector(client), weights[client])
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
        chosen = self._path.with_name("chosen.f32")
        with chosen.open("wb") as file:
            for client in client_ids:
                file.write(self.vector(client).numpy().astype(_NUMBER, copy=False).data)
        mapped = torch.from_file(
            str(chosen), size=len(client_ids) * self.layout.size, dtype=torch.float32
        )
        chosen.unlink()  # the mapping keeps the rows; the next call writes a file of its own
        return mapped.view(len(client_ids), self.layout.size)

    def close(self) -> None:
        """Delete the files; adapters that were handed out cannot be read any more."""
        self._folder.cleanup()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _row(self, client_id: str) -> int:
        if client_id not in self._rows:
            raise EvidenceError(
                f"got no update of {client_id!r} in this round; expected one of its {len(self)}"
                " clients"
            )
        return self._rows[client_id]

    def _read(self, row: int, start: int, count: int) -> Tensor:
        numbers = np.fromfile(
            self._path,
            dtype=_NUMBER,
            count=count,
            offset=(row * self.layout.size + start) * _NUMBER.itemsize,
        )
        return torch.from_numpy(numbers.astype(np.float32, copy=False))

    def _matrix(self, row: int, slot: Slot) -> Tensor:
        return self._read(row, self._starts[slot], slot.size).view(slot.shape)
