"""PyTorch's .bin files.

Plain tensors are read as PyTorch reads them, and everything else is refused without being executed.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from loraprobe.adapters.peft_io import load_adapter
from loraprobe.adapters.torch_file import read_torch_file
from loraprobe.errors import AdapterFormatError
from tests.helpers.one_module import A_KEY, Q, read, tiny


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_is_refused_without_being_executed(tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "a.bin"
    plain = pickle.dumps({**tiny(), "x": Payload(marker)}, protocol=2)
    torch.save({**tiny(), "x": Payload(marker)}, zipped := io.BytesIO())
    torch.save(
        {**tiny(), "x": Payload(marker)},
        legacy := io.BytesIO(),
        _use_new_zipfile_serialization=False,
    )
    for content in (plain, zipped.getvalue(), legacy.getvalue()):
        path.write_bytes(content)
        with pytest.raises(AdapterFormatError, match="cannot be read as plain tensors"):
            load_adapter(path, alpha=8)
        assert not marker.exists()
    pickle.loads(plain)
    assert marker.exists()  # the control: it would have run


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_bin_is_refused_at_any_length(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save(tiny(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    assert list(load_adapter(path, alpha=8)) == [Q]
    for length in {*range(20), *range(20, len(whole) - 1, 71)}:
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterFormatError, match=r"a\.bin"):
            load_adapter(path, alpha=8)


def test_a_bin_whose_parts_name_each_other_wrongly_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save(tiny(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    key = re.findall(rb"\d{9,}", whole)[-1]  # of a tensor's numbers, which follow
    path.write_bytes(whole.replace(key, key[:-1] + b"x", 1))
    with pytest.raises(AdapterFormatError, match=r"a\.bin cannot be read as plain tensors"):
        load_adapter(path, alpha=8)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.zeros(2)], "does not hold a dictionary of tensors"),
        ({A_KEY: 3}, "does not hold a dictionary of tensors"),
        ({3: torch.zeros(2)}, "does not hold a dictionary of tensors"),
        (
            {**tiny(), A_KEY: torch.zeros(4, 12).to_sparse()},
            r"it asks for torch\._utils\._rebuild_sparse_tensor",
        ),
        (
            {**tiny(), A_KEY: torch.empty(4, 12, device="meta")},
            r"it asks for torch\._utils\._rebuild_meta_tensor_no_storage",
        ),
        (
            {**tiny(), A_KEY: torch.zeros(0, 12)},
            "lora_A.weight: got a sparse, empty or expanded tensor",
        ),
        ({**tiny(), A_KEY: tiny()}, "does not hold a dictionary of tensors"),
        ({**tiny(), A_KEY + "\x1b[2J": torch.zeros(4)}, "a name that cannot be printed"),
        (
            {**tiny(), A_KEY: torch.zeros(1).expand(4, 10**12)},
            "lora_A.weight: got a sparse, empty or expanded tensor",
        ),
        ({**tiny(), A_KEY: torch.zeros(4, 12, dtype=torch.int8)}, "got dtype torch.int8"),
    ],
)
def test_a_bin_with_anything_but_whole_tensors_is_refused(
    content: Any, says: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(AdapterFormatError, match=says):
        read(tmp_path / "a.bin", alpha=8)


def test_a_bin_that_inflates_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({**tiny(), A_KEY: torch.zeros(4, 100_000)}, tmp_path / "a.bin")
    with (
        zipfile.ZipFile(tmp_path / "a.bin") as honest,
        zipfile.ZipFile(tmp_path / "b.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in honest.namelist():
            bomb.writestr(name, honest.read(name))
    assert (tmp_path / "b.bin").stat().st_size < 10_000
    assert torch.load(tmp_path / "b.bin", weights_only=True)[A_KEY].shape == (
        4,
        100_000,
    )  # the control: PyTorch unpacks it
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(AdapterFormatError, match="would unpack to"):
        load_adapter(tmp_path / "b.bin", alpha=8)


# --- agreement with PyTorch, and where it must not be had
# ---------------------------------------------------------------


def of_a_module() -> Any:
    """A state dict as a module gives it: an OrderedDict with something attached to it."""
    return torch.nn.Linear(3, 2).state_dict()


WHOLE: dict[str, Any] = {
    "plain": tiny,
    "half precision": lambda: {
        "a": torch.randn(3, 4).half(),
        "b": torch.randn(3).bfloat16(),
        "c": torch.randn(2, 2).double(),
    },
    "integers": lambda: {
        "a": torch.arange(6).reshape(2, 3),
        "b": torch.tensor([True, False]),
        "c": torch.tensor([1, 2], dtype=torch.uint8),
    },
    "views": lambda: {
        "a": torch.randn(3, 4).T,
        "b": torch.randn(9)[2:8:2],
        "c": torch.randn(5, 5)[1:3, 2:],
    },
    "shared numbers": lambda: (lambda whole: {"a": whole, "b": whole[:2], "c": whole})(
        torch.randn(4, 2)
    ),
    "parameters": lambda: {"a": torch.nn.Parameter(torch.randn(2, 2))},
    "of a module": of_a_module,
    "a scalar": lambda: {"a": torch.tensor(3.5)},
    "many": lambda: {
        f"layer.{number}": torch.full((1, 2), number) for number in range(300)
    },  # memo indices above 255
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_plain_tensors_are_what_pytorch_makes_of_them(
    name: str, legacy: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.bin"
    torch.save(WHOLE[name](), path, _use_new_zipfile_serialization=not legacy)
    expected = torch.load(path, weights_only=True)
    found = read_torch_file(path)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_flipped_bit_is_refused_or_changes_nothing_but_numbers_without_a_checksum(
    legacy: bool, tmp_path: Path
) -> None:
    path, silent = tmp_path / "a.bin", 0
    torch.save(tiny(), path, _use_new_zipfile_serialization=not legacy)
    whole, expected = path.read_bytes(), read_torch_file(path)
    for position in range(0, len(whole), 5):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            found = read_torch_file(path)
        except AdapterFormatError:
            continue
        if not legacy:
            assert all(
                torch.equal(found[name], expected[name]) for name in expected
            )  # PyTorch itself does not look at the checksums
            assert list(found) == list(expected)
        elif position < len(whole) - 400:  # before the numbers: what is named and how it is shaped
            assert {tuple(tensor.shape) for tensor in found.values()} == {
                tuple(tensor.shape) for tensor in expected.values()
            }
        silent += 1
    assert (
        0 < silent < 0.8 * len(whole) / 5
    )  # dates, attributes and padding of the zip; the numbers of the old format


def test_a_wrong_checksum_is_seen_that_pytorch_does_not_see(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.arange(12.0)}, path)
    data = path.read_bytes()
    path.write_bytes(
        data.replace(
            torch.arange(12.0).numpy().tobytes(), torch.arange(1.0, 13.0).numpy().tobytes()
        )
    )
    assert torch.load(path, weights_only=True)["a"].tolist() == list(range(1, 13))
    with pytest.raises(AdapterFormatError, match="CRC"):
        read_torch_file(path)


def test_numbers_that_an_old_file_leaves_out_are_not_taken_from_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.arange(12.0)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    keys = data.rindex(b"\x80\x02]")  # the last of the five pickles: the storages that follow
    path.write_bytes(data[:keys] + pickle.dumps([], 2))
    assert torch.load(path, weights_only=True)["a"].shape == (12,)  # of whatever was in memory
    with pytest.raises(AdapterFormatError, match="the storages that follow are not those"):
        read_torch_file(path)


def rezipped(source: Path, edit: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """The file with its records edited: a list of (name, content), checksums right."""
    with zipfile.ZipFile(source) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(source, "w", compression) as archive:
        for name, content in edit(records):
            archive.writestr(name, content)


def with_pickle(edit: Any) -> Any:
    return lambda records: [
        (name, edit(content) if name.endswith("data.pkl") else content) for name, content in records
    ]


def called(instructions: bytes) -> Any:
    """A pickle of a dictionary with what these instructions make in it."""
    return with_pickle(lambda _: b"\x80\x02}X\x01\x00\x00\x00a" + instructions + b"s.")


HOSTILE: dict[str, tuple[Any, str]] = {
    "a bytearray of 2 GiB": (
        called(b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R"),
        "__builtin__.bytearray",
    ),
    "a tensor of 4 TB": (
        called(b"ctorch\nTensor\n\x8a\x06\x00\x10\xa5\xd4\xe8\x00\x85R"),
        "torch.Tensor",
    ),
    "a table of 64 GB": (
        with_pickle(lambda data: data[:3] + b"r\xff\xff\xff\xff" + data[3:]),
        "LONG_BINPUT",
    ),
    "a byte string of 16 GB": (called(b"\x96\x00\x00\x00\x00\x04\x00\x00\x00"), "cannot be read"),
    "a shell": (called(b"cos\nsystem\nX\x04\x00\x00\x00true\x85R"), "os.system|posix.system"),
    "a class by its number": (called(b"\x82\x01"), "EXT1"),
    "an attribute of a class": (
        called(b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb"),
        "cannot be read",
    ),
    "no pickle": (
        lambda records: [record for record in records if not record[0].endswith("data.pkl")],
        "0 files named data.pkl",
    ),
    "two pickles": (
        lambda records: [*records, ("b/data.pkl", records[0][1])],
        "2 files named data.pkl",
    ),
    "a file beside the folder": (
        lambda records: [*records, ("../x", b"")],
        "files outside its folder",
    ),
    "numbers missing": (
        lambda records: [record for record in records if not record[0].endswith("data/0")],
        "data/0",
    ),
    "fewer numbers": (
        lambda records: [
            (name, content[:-4] if name.endswith("data/0") else content)
            for name, content in records
        ],
        "data/0 holds",
    ),
    "more numbers": (
        lambda records: [
            (name, content + bytes(4) * name.endswith("data/0")) for name, content in records
        ],
        "data/0 holds",
    ),
    "big-endian": (
        lambda records: [
            (name, b"big" if name.endswith("byteorder") else content) for name, content in records
        ],
        "little-endian",
    ),
    "one name twice": (
        with_pickle(lambda data: data.replace(b"lora_B", b"lora_A")),
        "a name occurs twice",
    ),
    "a shape beyond its numbers": (
        with_pickle(lambda data: data.replace(b"K\x04K\x0c\x86", b"K\x04K\x0d\x86", 1)),
        "expanded",
    ),
    "an offset beyond its numbers": (
        with_pickle(lambda data: data.replace(b"QK\x00K\x04K\x0c", b"QK\x01K\x04K\x0c", 1)),
        "expanded",
    ),
    "a negative size": (
        with_pickle(lambda data: data.replace(b"K\x04K\x0c\x86", b"J\xff\xff\xff\xffK\x0c\x86", 1)),
        "without a shape",
    ),
    "more dimensions than strides": (
        with_pickle(lambda data: data.replace(b"K\x04K\x0c\x86", b"K\x04\x85", 1)),
        "without a shape",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_whole_and_means_harm_is_refused_by_name(case: str, tmp_path: Path) -> None:
    edit, says = HOSTILE[case]
    path = tmp_path / "a.bin"
    torch.save(tiny(), path)
    rezipped(path, lambda records: records)
    assert list(read_torch_file(path)) == list(tiny())  # the control: zipping it anew is no harm
    rezipped(path, edit)
    with pytest.raises(AdapterFormatError, match=says):
        read_torch_file(path)


def test_two_records_of_one_name_and_compressed_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save(tiny(), path)
    rezipped(path, lambda records: records, zipfile.ZIP_DEFLATED)
    with pytest.raises(AdapterFormatError, match="compressed"):
        read_torch_file(path)
    torch.save(tiny(), path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a/data/0", archive.read("a/data/0"))
    with pytest.raises(AdapterFormatError, match="two files of one name"):
        read_torch_file(path)
