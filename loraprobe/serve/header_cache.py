"""Slices whose header was read before: what is left to do is arithmetic.

A slice is a header and its numbers. Whether it may be scored is a question to both: the numbers
have to be finite; names, shapes, types, byte ranges, scalings, kind and base model are in the
header, and its bytes and the length of the file decide about them. So a header that passed every
check once, in front of as many bytes, passes them again. It is recognised by its bytes, all of
them, and not parsed a second time.

What is not recognised, or not finite, is for `scoring` to read as if nothing was known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from threading import Lock

import numpy as np

from ..adapters.adapter import Kind
from ..adapters.safetensors import header_of
from ..features import unit_vector
from ..probe import Probe, Verdict
from .slices import tensor_name

MAX_KNOWN = 64
"""Headers remembered of one probe; slices for it mostly have one and the same."""
MAX_HEADER_BYTES = 1 << 14


@dataclass(frozen=True)
class _Numbers:
    """Where the numbers of a file with a known header are, and what it says of them.

    So many float32 from this byte on, to its end.
    """

    start: int
    size: int
    kind: Kind
    base_model: str | None


class HeaderCache:
    """The headers of slices that one probe has scored before.

    Safe to use from several threads.

    Args:
        probe: any; one whose feature vector is more than the slice itself, divided by its norm,
            knows none.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        recipe = probe.featurizer.recipe
        # Of a weight delta, whether it is zero cannot be told from its factors (Probe.verdicts).
        self._is_plain = (
            recipe.features == ("slices",)
            and recipe.normalize == "l2"
            and probe.featurizer.layout.kind != "weight_delta"
        )
        self._numbers: dict[bytes, _Numbers] = {}
        self._lock = Lock()

    def remember(self, data: bytes, base_model: str | None) -> None:
        """Know a slice again that was read, checked and scored just now."""
        end = 8 + int.from_bytes(data[:8], "little")
        if not self._is_plain or end > MAX_HEADER_BYTES:
            return
        header = header_of(data)
        layout = self._probe.featurizer.layout
        begin = 0
        for slot in layout.slots:  # one after the other, as the feature vector has them?
            entry = header[tensor_name(slot.module, slot.factor)]
            if entry["dtype"] != "F32" or entry["data_offsets"] != [begin, begin + 4 * slot.size]:
                return
            begin += 4 * slot.size
        with self._lock:
            while len(self._numbers) >= MAX_KNOWN:
                del self._numbers[next(iter(self._numbers))]
            self._numbers[data[:end]] = _Numbers(end, layout.size, layout.kind, base_model)

    def verdict(self, data: bytes, kind: Kind) -> tuple[Verdict, str | None] | None:
        """The probe's verdict on a slice, said to be of a kind, and the base model it names.

        None if it has to be read to know.

        Raises:
            LoraprobeError: the head cannot score these numbers.
        """
        end = 8 + int.from_bytes(data[:8], "little")
        if end > MAX_HEADER_BYTES:  # who claims a longer header has none of it copied or hashed
            return None
        numbers = self._numbers.get(data[:end])
        if numbers is None or numbers.kind != kind or len(data) != numbers.start + 4 * numbers.size:
            return None
        vector = np.frombuffer(data, np.float32, numbers.size, numbers.start)
        row, norm = unit_vector(vector if vector.flags.aligned else vector.copy())
        if not math.isfinite(norm):
            return None
        [score] = self._probe.score_features(row[None])
        return self._probe.verdict(float(score), changed=norm > 0), numbers.base_model
