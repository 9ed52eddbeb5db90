"""Edits inside PyTorch's .bin files, with checksums that are right again.

The records of the zip, and the pickle that names them.
"""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from .mutate_bytes import MUTATIONS as ON_BYTES
from .mutate_bytes import Mutation, set_bytes

Records = list[tuple[str, bytes]]

_GLOBALS = (
    b"ctorch\nFloatStorage\n",
    b"ctorch\nHalfStorage\n",
    b"ctorch\nDoubleStorage\n",
    b"ctorch\nCharStorage\n",
    b"ctorch\nUntypedStorage\n",
    b"ctorch\nComplexFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_tensor\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n",
    b"ctorch._utils\n_rebuild_nested_tensor\n",
    b"ctorch._utils\n_rebuild_wrapper_subclass\n",
    b"ctorch\nTensor\n",
    b"ccollections\nOrderedDict\n",
    b"ccollections\nCounter\n",
    b"c__builtin__\nbytearray\n",
    b"c__builtin__\neval\n",
    b"cos\nsystem\n",
    b"c_codecs\nencode\n",
)
# What a stranger could call before the dictionary is made: 2 GiB of zeros, a large tensor, a shell.
_CALLS = (
    b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R0",
    b"ctorch\nTensor\n\x8a\x06\x00\x10\xa5\xd4\xe8\x00\x85R0",
    b"cos\nsystem\nX\x04\x00\x00\x00true\x85R0",
    b"r\xff\xff\xff\xff",
    b"\x96\x00\x00\x00\x00\x10\x00\x00\x00",
    b"(" * 5000,
    b"]" + b"\x85" * 50_000 + b"0",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb0",
)


def bytes_of_a_record(records: Records, rng: np.random.Generator) -> Records:
    """The content of one record damaged as bytes."""
    at = int(rng.integers(len(records)))
    name, data = records[at]
    mutations = list(ON_BYTES.values())
    return [
        *records[:at],
        (name, mutations[rng.integers(len(mutations))](data, rng) if data else b"x"),
        *records[at + 1 :],
    ]


def names(records: Records, rng: np.random.Generator) -> Records:
    """A record called otherwise, exchanged with another, left out, or there twice."""
    at, other = (int(number) for number in rng.integers(0, len(records), 2))
    name, data = records[at]
    choices: tuple[Records, ...] = (
        records[:at] + records[at + 1 :],
        [*records, (name, records[other][1])],
        [*records, (records[other][0], data)],
        [*records[:at], (records[other][0], data), *records[at + 1 :]],
        [*records[:at], (name + "x", data), *records[at + 1 :]],
        [*records, ("../" + name, data)],
        [*records, ("other/data.pkl", records[other][1])],
        records[::-1],
        [("constants.pkl", b""), *records],
        [*records[:at], (name, records[other][1]), *records[at + 1 :]],
    )
    return choices[rng.integers(len(choices))]


def instructions(records: Records, rng: np.random.Generator) -> Records:
    """The pickle: other classes, calls of its own, other numbers, names or sizes."""
    return [
        (name, pickle(data, rng) if name.endswith("data.pkl") else data) for name, data in records
    ]


def pickle(data: bytes, rng: np.random.Generator) -> bytes:
    """One edit of a pickle that torch.save wrote."""
    choice = int(rng.integers(5))
    if choice == 0:
        old = [one for one in _GLOBALS if one in data]
        new = _GLOBALS[rng.integers(len(_GLOBALS))]
        return (
            data.replace(old[rng.integers(len(old))], new, int(rng.choice((1, -1))))
            if old
            else data
        )
    if choice == 1:
        return data[:2] + _CALLS[rng.integers(len(_CALLS))] + data[2:]
    if choice == 2:  # BININT1: the sizes, strides and lengths here
        places = [at for at, byte in enumerate(data[:-1]) if byte == ord("K")]
        number = int(rng.choice((0, 1, 2, 3, 5, 6, 10, 12, 255, -1, 2**31 - 1)))
        new = struct.pack("<Bi", ord("J"), number)
        at = places[rng.integers(len(places))] if places else 0
        return data[:at] + new + data[at + 2 :]
    if choice == 3:  # one name for two tensors, or a storage for another
        return (
            data.replace(b"layers.1", b"layers.0", int(rng.integers(1, 5)))
            if rng.random() < 0.5
            else data.replace(b"X\x01\0\0\x001", b"X\x01\0\0\x000")
        )
    return set_bytes(data, rng)


Edit = Callable[[Records, np.random.Generator], Records]
EDITS: dict[str, Edit] = {
    "record: bytes": bytes_of_a_record,
    "record: names": names,
    "record: pickle": instructions,
}


def _rewritten(edit: Edit) -> Mutation:
    def mutation(data: bytes, rng: np.random.Generator) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
        except (
            zipfile.BadZipFile,
            ValueError,
            OSError,
            NotImplementedError,
            RuntimeError,
            LookupError,
            zlib.error,
            EOFError,
        ):
            return (
                pickle(data, rng) if data else data
            )  # the old format is pickles and numbers without a frame
        out = io.BytesIO()
        compression = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
        with zipfile.ZipFile(out, "w", compression) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two records of one name
            for name, content in edit(records, rng):
                archive.writestr(zipfile.ZipInfo(name), content, compression)
        return out.getvalue()

    return mutation


MUTATIONS: dict[str, Mutation] = {name: _rewritten(edit) for name, edit in EDITS.items()}
