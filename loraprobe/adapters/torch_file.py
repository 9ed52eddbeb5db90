"""PyTorch's .bin files, read as plain tensors and nothing else.

`torch.load(weights_only=True)` runs no code of the file. It does (seen with 2.13): return numbers
whose checksum is wrong; return uninitialised memory as weights where an old file leaves its numbers
out; allocate gigabytes for a few bytes that ask for a bytearray; keep the last of two tensors of
one name. So the little that a LoRA state dict consists of is read here. A pickle only ever
makes the inert values below: its instructions are looked through before any is followed, and
nothing is called but what `_Unpickler.find_class` names.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterFormatError
from .strict_json import quoted

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what files of PyTorch before 1.6 start with
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What torch.save writes for dictionaries of tensors. Others can ask for memory (BYTEARRAY8) or for
# other classes (INST, EXT1).
_OPCODES = frozenset(
    "PROTO EMPTY_DICT EMPTY_TUPLE EMPTY_LIST MARK TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM"
    " SETITEMS BINUNICODE BININT BININT1 BININT2 LONG1 NONE NEWTRUE NEWFALSE GLOBAL REDUCE BUILD"
    " BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET STOP".split()
)
_MAX_MEMO = 1 << 20  # a larger memo index makes the unpickler allocate a table of that length
# What reading a file that is damaged or holds more than tensors raises.
_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    AssertionError,
    Warning,
)


class _Storage(NamedTuple):
    """A run of numbers in the file: where it is named, of which type and length."""

    key: str
    dtype: torch.dtype
    numel: int


class _StateDict(OrderedDict[str, Any]):
    """The dictionary of a model's state_dict().

    What is attached to it (_metadata) is of no use here.
    """

    def __setstate__(self, state: object) -> None:
        pass


class _View(NamedTuple):
    """A tensor of the pickle: a strided view of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote of a state dict, on the CPU; both of its formats.

    Raises:
        AdapterFormatError: damaged, compressed, or anything in it is not a plain tensor with a name
            of its own.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        tensors = _read_zip(path) if is_zip else _read_legacy(path.read_bytes(), path)
        # PyTorch has to take the file too: it also looks at records that hold no numbers. By now
        # nothing in it can ask for memory.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.load(path, map_location="cpu", weights_only=True)
        return tensors
    except AdapterFormatError:
        raise
    except _ERRORS as error:
        reason = quoted(str(error).partition("\n")[0] or type(error).__name__, 200)
        raise AdapterFormatError(
            f"{path} cannot be read as plain tensors ({reason}). Save the adapter as .safetensors."
        ) from None


def _read_zip(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        size, unpacked = path.stat().st_size, sum(entry.file_size for entry in archive.infolist())
        if unpacked > size:  # PyTorch compresses nothing
            raise AdapterFormatError(
                f"{path} has {size} bytes and would unpack to {unpacked}; expected an uncompressed"
                " file. Do not use it."
            )
        if len(entries) < len(archive.infolist()):
            raise ValueError("two files of one name in it")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed files in it")
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} files named data.pkl in it")
        root = pickles[0].removesuffix("data.pkl")
        if not all(name.startswith(root) for name in entries):
            raise ValueError(f"files outside its folder {root}")
        if root + "byteorder" in entries and archive.read(root + "byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        found = _state_dict(io.BytesIO(archive.read(pickles[0])), path)
        numbers = {}
        for storage in {view.storage for view in found.values()}:
            name = f"{root}data/{storage.key}"
            if entries[name].file_size != storage.numel * storage.dtype.itemsize:
                raise ValueError(
                    f"{name} holds {entries[name].file_size} bytes, the pickle says {storage.numel}"
                    f" numbers of {storage.dtype}"
                )
            numbers[storage] = bytearray(archive.read(name))  # which checks its CRC-32
    return _tensors(found, numbers, path)


def _read_legacy(data: bytes, path: Path) -> dict[str, Tensor]:
    """Five pickles (magic number, protocol, system, state dict, keys), then each storage.

    A count (int64) and that many numbers.
    """
    file = io.BytesIO(data)
    if (_unpickled(file), _unpickled(file)) != (_MAGIC, _PROTOCOL):
        raise ValueError("neither of PyTorch's formats")
    if _unpickled(file).get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    found = _state_dict(file, path)
    keys = _unpickled(file)
    storages = {view.storage.key: view.storage for view in found.values()}
    if (
        not isinstance(keys, list)
        or len(keys) != len(set(keys))
        or set(keys) != set(storages)
        or len(storages) != len({*storages.values()})
    ):
        raise ValueError("the storages that follow are not those of its tensors")
    numbers = {}
    for key in keys:
        storage = storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != storage.numel:
            raise ValueError(f"{count} numbers where the pickle says {storage.numel}")
        numbers[storage] = bytearray(file.read(count * storage.dtype.itemsize))
        if len(numbers[storage]) != count * storage.dtype.itemsize:
            raise EOFError("the file ends within its numbers")
    if file.read(1):
        raise ValueError("bytes after the last number")
    return _tensors(found, numbers, path)


def _state_dict(file: io.BytesIO, path: Path) -> Mapping[str, _View]:
    """Names -> views, every view that the pickle makes among them."""
    made: list[_View] = []

    def view(
        storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> _View:
        made.append(_View(storage, offset, size, stride))
        return made[-1]

    found = _unpickled(file, view)
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, _View) for name, value in found.items()
    ):
        raise AdapterFormatError(
            f"{path} does not hold a dictionary of tensors; expected a PEFT state dict"
        )
    if not all(name.isprintable() for name in found):
        raise ValueError("a name that cannot be printed")
    if {id(one) for one in made} != {id(one) for one in found.values()}:
        raise ValueError("a tensor in it is in no entry of the dictionary: a name occurs twice")
    return found


def _tensors(
    found: Mapping[str, _View], numbers: Mapping[_Storage, bytearray], path: Path
) -> dict[str, Tensor]:
    flat = {
        storage: torch.frombuffer(data, dtype=storage.dtype)
        for storage, data in numbers.items()
        if data
    }
    tensors = {}
    for name, (storage, offset, size, stride) in found.items():
        integers = (offset, *size, *stride)
        if (
            len(size) != len(stride)
            or len(size) > 8
            or not all(type(number) is int and 0 <= number < 2**62 for number in integers)
        ):
            raise ValueError("a tensor without a shape")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if math.prod(size) > storage.numel or not 0 <= offset <= last < storage.numel:
            raise AdapterFormatError(
                f"{path}, {quoted(name, 200)}: got a sparse, empty or expanded tensor; expected one"
                " whose every number is in the file"
            )
        tensors[name] = flat[storage].as_strided(size, stride, offset)
    return tensors


def _unpickled(file: io.BytesIO, view: Callable[..., _View] | None = None) -> Any:
    """Follow one pickle, after looking through its instructions; leaves the file behind it."""
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name not in _OPCODES or (
            opcode.name == "LONG_BINPUT" and int(argument or 0) >= _MAX_MEMO
        ):
            raise ValueError(f"the pickle instruction {opcode.name}")
    file.seek(start)
    return _Unpickler(file, view).load()


class _Unpickler(pickle.Unpickler):
    """Knows the names of the storage types and of what rebuilds a tensor.

    Everything it makes is inert.
    """

    def __init__(self, file: io.BytesIO, view: Callable[..., _View] | None) -> None:
        super().__init__(file)
        self._view = view

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global of the pickle."""
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): self._view,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): _StateDict,
        }.get((module, name))
        if known is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage by what the pickle says of it.

        Files before PyTorch 1.6 add None, for "not a part of another storage".
        """
        if isinstance(pid, tuple) and pid[5:] in ((), (None,)):
            match pid[:5]:
                case ("storage", torch.dtype() as dtype, str(key), str(), int(numel)) if (
                    0 <= numel < 2**62
                ):
                    return _Storage(key, dtype, numel)
        raise pickle.UnpicklingError("it asks for something other than the numbers of a tensor")
