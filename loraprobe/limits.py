"""What a file may cost: how large each kind may be, which bounds what reading it takes.

docs/inputs.md has these as a table, with what real files need and the memory measured at the limit.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import DataError

MIB = 1 << 20
ADAPTER_CONFIG = MIB
TENSOR_HEADER = 16 * MIB  # a hundred thousand tensors: a mixture of 256 experts has as many
ADAPTER_WEIGHTS = 8 << 30  # r = 256 on all modules of a 70B model is about 6.6 GB in float32
PROBE_CONFIG = 4 * MIB
PROBE_HEAD = 256 * MIB
PROBE_FEATURIZER = 512 * MIB
PROBE_TREES = 8 * MIB
CARD = 16 * MIB
MANIFEST = 16 * MIB
MANIFEST_ROWS = 100_000
SETTINGS = MIB
TRAINING_DATA = 512 * MIB
SCAN_REFERENCE = MIB
SCAN_CACHE = 1 << 30
RUN_CONFIG = 16 * MIB
RUN_CLIENTS = 16 * MIB
RUN_WORDS = 16 * MIB
RUN_LOG = 1 << 30
CHECKPOINT_STATE = 256 * MIB
CHECKPOINT_ARRAYS = 16 << 30


def read_limited(path: Path, limit: int, error: type[ValueError] = DataError) -> bytes:
    """The bytes of a file of at most `limit`; of a larger one, or one without an end, not more.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger; of the class `error`.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if max(size, len(data)) > limit:
        raise error(f"{path} has more than {limit} bytes; expected at most that. It was not read")
    return data
