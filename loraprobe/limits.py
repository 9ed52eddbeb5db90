"""What a file may cost: how large each kind may be, which bounds what reading it takes.

docs/inputs.md has these as a table, with what real files need and the memory measured at the limit.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import DataError, LoraprobeError

MIB = 1 << 20
ADAPTER_CONFIG = MIB
TENSOR_HEADER = 16 * MIB
ADAPTER_WEIGHTS = 8 << 30
PROBE_CONFIG = 4 * MIB
PROBE_HEAD = 256 * MIB
PROBE_FEATURIZER = 512 * MIB
PROBE_TREES = 8 * MIB
CARD = 16 * MIB
MANIFEST = 16 * MIB
MANIFEST_ROWS = 100_000
SETTINGS = MIB
TRAINING_DATA = 512 * MIB


def read_limited(path: Path, limit: int, error: type[LoraprobeError] = DataError) -> bytes:
    """The bytes of a file of at most `limit`; of a larger one, or one without an end, not more.

    Raises:
        OSError: it cannot be read.
        LoraprobeError: it is larger; of the class `error`.
    """
    with path.open("rb") as file:
        known = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if known <= limit else b""
    if max(known, len(data)) > limit:
        raise error(f"{path} has more than {limit} bytes; expected at most that. It was not read")
    return data
