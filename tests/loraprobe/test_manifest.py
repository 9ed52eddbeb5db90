"""Manifests of labelled adapters, and the deltas that are read for them.

What is refused, and that the error says where.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loraprobe import manifest
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta, weight_delta
from loraprobe.adapters.kinds import as_kind
from loraprobe.adapters.layout import Layout, pack
from loraprobe.adapters.load import load_adapter
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import (
    AdapterFormatError,
    DataError,
    KindMismatch,
    LayoutMismatch,
)
from loraprobe.features import slices
from loraprobe.manifest import Row, read_labelled, read_manifest
from tests.helpers import make


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def saved(path: Path, seed: int, **options: Any) -> Path:
    """A PEFT folder with a random adapter."""
    return make.folder(
        path, make.tensors(make.adapter(seed=seed, **options)), base_model_name_or_path="org/base"
    )


def vector(adapter: Adapter) -> torch.Tensor:
    return pack(adapter)[0]


def test_paths_are_relative_to_the_manifest_and_columns_have_defaults(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    path = written(
        tmp_path / "set" / "m.csv",
        'label,path,unused\n0,a/b,x\nmalicious,../c,\n Benign ,/d,\n1,"e,f",\n',
    )
    folder = path.parent
    assert read_manifest(path) == [
        Row(folder / "a/b", 0, "a/b", "benign"),
        Row(folder / "../c", 1, "../c", "malicious"),
        Row(Path("/d"), 0, "/d", "benign"),
        Row(folder / "e,f", 1, "e,f", "malicious"),
    ]


def test_group_and_source_are_taken_where_they_are_given(tmp_path: Path) -> None:
    path = written(
        tmp_path / "m.csv", "path,label,group,source\na,0,client 1,gsm8k\nb,1,,\nc,0,client 1,\n"
    )
    assert [(row.group, row.source) for row in read_manifest(path)] == [
        ("client 1", "gsm8k"),
        ("b", "malicious"),
        ("client 1", "benign"),
    ]


def test_a_byte_order_mark_and_carriage_returns_are_not_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbfpath,label\r\na,1\r\n")
    assert read_manifest(tmp_path / "m.csv") == [Row(tmp_path / "a", 1, "a", "malicious")]


def test_the_columns_of_leave_one_out_evaluation_are_typed_and_may_be_empty(tmp_path: Path) -> None:
    header = "path,label,role,host,share,attack,recipe,rank,lr,base,seed,initial\n"
    path = written(
        tmp_path / "m.csv",
        header + "a,1,malicious,gsm8k,0.25,scaling,long,8,5e-3,org/base,3,start\n"
        "b,0,hard_negative,,,,,,,,,fresh\nc,0\n",
    )
    full, hard, bare = read_manifest(path)
    assert full == Row(
        tmp_path / "a",
        1,
        "a",
        "malicious",
        "malicious",
        "gsm8k",
        0.25,
        "scaling",
        "long",
        8,
        0.005,
        "org/base",
        "3",
        tmp_path / "start",
    )
    assert hard == Row(tmp_path / "b", 0, "b", "benign", "hard_negative", initial="fresh")
    assert bare == Row(tmp_path / "c", 0, "c", "benign")
    assert [row.is_hard_negative for row in (full, hard, bare)] == [False, True, False]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (
            "role",
            "malicious",
            "got role 'malicious' for a benign adapter; expected benign or hard_negative",
        ),
        ("role", "Benign", "got role 'Benign'"),
        ("rank", "8.0", "got rank '8.0'; expected a whole number above 0"),
        ("rank", "0", "got rank '0'"),
        ("lr", "fast", "got lr 'fast'; expected a number above 0"),
        ("lr", "inf", "got lr 'inf'"),
        ("lr", "-1", "got lr '-1'"),
        ("share", "25", r"got share '25'; expected a number in \(0, 1\]"),
        ("share", "0", "got share '0'"),
        ("share", "nan", "got share 'nan'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line(
    tmp_path: Path, column: str, value: str, message: str
) -> None:
    path = written(tmp_path / "m.csv", f"path,label,{column}\na,0,\nb,0,{value}\n")
    with pytest.raises(DataError, match=f"line 3: {message}"):
        read_manifest(path)


def test_a_row_may_name_its_own_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [saved(tmp_path / f"a{seed}", seed) for seed in (1, 2, 3, 4)]  # kept in this order
    base, own, asked = saved(tmp_path / "base", 8), saved(tmp_path / "own", 9), []
    load = manifest.load_adapter

    def counting(source: str | Path, **options: Any) -> Adapter:
        asked.append(Path(source).name)
        return load(source, **options)

    monkeypatch.setattr(manifest, "load_adapter", counting)
    rows = [
        Row(path, 0, "", "", initial=initial)
        for path, initial in zip(paths, (own, None, own, "fresh"), strict=True)
    ]
    got = read_labelled(rows, "factor_delta", base)
    assert [name for name in asked if not name.startswith("a")] == ["base", "own"]  # each once
    for seed, start, delta in zip((1, 2, 3), (9, 8, 9), got, strict=False):
        assert torch.equal(
            vector(delta), vector(factor_delta(make.adapter(seed=seed), make.adapter(seed=start)))
        )
    with pytest.raises(KindMismatch, match="the delta of lora_A needs"):
        vector(got[3])
    with pytest.raises(AdapterFormatError, match="absent") as caught:
        read_labelled([Row(paths[0], 0, "", "", initial=tmp_path / "absent")], "factor_delta", base)
    assert str(caught.value).startswith(f"{paths[0]}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has the columns \[\]; expected path and label"),
        ("path,label\n", "names no adapter"),
        ("path,label,label\na,0,1\n", r"'label', 'label'.* each once"),
        ("path,label\na,0\nb,1\na,1\n", "line 4: a has the other label above"),
        ("path,label\n\n\n", "names no adapter"),
        ("path,class\na,0\n", r"has the columns \['class', 'path'\]"),
        ("a,0\nb,1\n", r"has the columns \['0', 'a'\]"),
        ("path;label\na;0\n", r"has the columns \['path;label'\]"),
        (
            "path,label\na,0\nb,2\n",
            "line 3: got path 'b', label '2'; expected a path and one of 0, 1, benign, malicious",
        ),
        ("path,label\na,0\n\nb,\n", "line 4: got path 'b', label ''"),
        ("path,label\nb\n", "line 2: got path 'b', label None"),
        ("path,label\n,1\n", "line 2: got path '', label '1'"),
        ("label,path\n1\n", "line 2: got path None, label '1'"),
        ("path,label\na,true\n", "label 'true'"),
        ("path,label\na,0\nb,c,1\n", "line 3"),
        ("path,label\na,0,client,more\n", "line 2: got more values than columns"),
        (
            'path,label\n"a\nb",0\nc,3\n',
            "line 4: got path 'c', label '3'",
        ),  # a quoted path may hold a line feed
    ],
)
def test_a_wrong_manifest_is_refused_with_its_path_and_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = written(tmp_path / "m.csv", text)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("path,label\nd\u00e9j\u00e0,0\n".encode("latin-1"))
    for path in (tmp_path / "latin.csv", tmp_path / "absent.csv"):
        with pytest.raises(DataError, match="cannot read the manifest") as caught:
            read_manifest(path)
        assert str(path) in str(caught.value)


def test_a_folder_is_read_by_its_manifest_or_by_the_names_of_its_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.csv nor adapters below benign/"):
        read_manifest(tmp_path)
    for place in ("benign/a", "malicious/deep/b", "other/c"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "adapter_config.json").write_text("{}")
    (tmp_path / "malicious" / "link").symlink_to(tmp_path / "other")
    assert [(row.path.name, row.label, row.group) for row in read_manifest(tmp_path)] == [
        ("a", 0, "benign/a"),
        ("b", 1, "malicious/deep/b"),
        ("c", 1, "malicious/link/c"),
    ]
    (tmp_path / "manifest.csv").write_text("path,label\nother/c,1\n")
    assert [row.path.name for row in read_manifest(tmp_path)] == ["c"]


def test_each_kind_is_the_difference_it_says(tmp_path: Path) -> None:
    after, before = saved(tmp_path / "after", 1), saved(tmp_path / "before", 2)
    a, b = make.adapter(seed=1), make.adapter(seed=2)
    for start in (before, str(before), b):  # a path or the adapter itself
        assert torch.equal(
            vector(as_kind(load_adapter(after), "factor_delta", start)), vector(factor_delta(a, b))
        )
        assert torch.equal(
            vector(as_kind(load_adapter(after), "weight_delta", start)), vector(weight_delta(a, b))
        )
        got = as_kind(load_adapter(after), "weights", start)  # nothing is subtracted of weights
        assert got.kind == "weights"
        assert torch.equal(vector(got), vector(a))
    assert torch.equal(vector(as_kind(load_adapter(after), "weights", None)), vector(a))
    assert not torch.equal(vector(factor_delta(a, b)), vector(a))


def test_fresh_means_that_b_was_zero(tmp_path: Path) -> None:
    after = saved(tmp_path / "after", 1)
    got, start = as_kind(load_adapter(after), "factor_delta", "fresh"), make.adapter(seed=1)
    zero = Adapter(
        {module: LoRAPair(pair.A, 0 * pair.B, pair.scaling) for module, pair in start.items()}
    )
    slots = Layout.of(got, factors=("B",)).slots
    assert got.kind == "factor_delta"
    assert np.array_equal(slices(got, slots), slices(factor_delta(start, zero), slots))
    with pytest.raises(
        KindMismatch, match="the delta of lora_A needs the adapter that training started from"
    ):
        vector(got)


@pytest.mark.parametrize(
    ("kind", "base", "message"),
    [
        ("factor_delta", None, "factor_delta.*pass --base .* or --base fresh"),
        ("weight_delta", None, "weight_delta.*pass --base"),
        ("weight_delta", "fresh", "pass --base with an adapter, not 'fresh'"),
        ("delta", "fresh", "got kind 'delta'; expected one of weights, factor_delta, weight_delta"),
        ("delta", None, "got kind 'delta'"),
        ("", None, "got kind ''"),
    ],
)
def test_a_delta_without_its_start_and_an_unknown_kind_are_refused(
    tmp_path: Path, kind: str, base: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        as_kind(load_adapter(saved(tmp_path / "after", 1)), kind, base)


def test_alpha_is_for_bare_files_on_both_sides(tmp_path: Path) -> None:
    for seed in (1, 2):
        save_file(make.tensors(make.adapter(seed=seed)), tmp_path / f"{seed}.safetensors")
    got = as_kind(
        load_adapter(tmp_path / "1.safetensors", alpha=8),
        "weight_delta",
        tmp_path / "2.safetensors",
        alpha=8,
    )
    assert torch.equal(
        vector(got), vector(weight_delta(make.adapter(seed=1), make.adapter(seed=2)))
    )
    with pytest.raises(AdapterFormatError, match="alpha"):
        as_kind(
            load_adapter(tmp_path / "1.safetensors", alpha=8),
            "weight_delta",
            tmp_path / "2.safetensors",
        )


def test_an_error_in_one_adapter_keeps_its_type_and_names_the_path(tmp_path: Path) -> None:
    good, other = saved(tmp_path / "good", 1), saved(tmp_path / "fewer layers", 2, layers=1)
    (tmp_path / "cut").mkdir()
    for file in good.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(
            file.read_bytes()[:200] if file.suffix == ".safetensors" else file.read_bytes()
        )
    for bad, error in (
        (tmp_path / "absent", AdapterFormatError),
        (tmp_path / "cut", AdapterFormatError),
        (other, LayoutMismatch),
    ):
        with pytest.raises(error) as caught:
            read_labelled([Row(good, 0, "", ""), Row(bad, 1, "", "")], "factor_delta", good)
        assert str(caught.value).startswith(f"{bad}: ")
    with pytest.raises(DataError, match="pass --base") as missing:
        read_labelled([Row(good, 0, "", "")], "factor_delta", None)
    assert str(missing.value).startswith(f"{good}: ")
