"""A probe folder that was tampered with is refused before anything is built from it.

Behind checksums made right again too. JSON that is read two ways is in test_strict_json.py,
flipped bytes are fuzz's (config, head-arrays, and both sealed).
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from loraprobe import Probe
from loraprobe.adapters.strict_json import MAX_NESTING
from loraprobe.errors import ProbeFormatError
from loraprobe.heads import HEADS
from loraprobe.hub.format import MAX_FEATURES
from loraprobe.limits import PROBE_CONFIG
from tests.helpers.probes import new_data, scores_of, tiny_probe

Json = Any
Damage = Callable[[Path], None]
HUGE = "@@1e400@@"  # stands for a number that JSON can write and no float can hold


def read_config(folder: Path) -> Json:
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, config: Json) -> None:
    """Write config.json, with the digest that belongs to its other fields if it has one.

    A stranger can compute it too.
    """
    if "digest" in config:
        rest = {name: value for name, value in config.items() if name != "digest"}
        config = {
            **rest,
            "digest": (
                hashlib.sha256(
                    json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
                ).hexdigest()
            ),
        }
    (folder / "config.json").write_text(json.dumps(config).replace(f'"{HUGE}"', "1e400"))


def forbid_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, building a head from a file is a failure that no caller expects."""

    def built(*args: Any) -> None:
        raise AssertionError("a head was built before the checks were over")

    for head in HEADS.values():
        monkeypatch.setattr(head, "from_arrays", built)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A linear probe with isotonic calibration and some facts."""
    probe = tiny_probe("linear", "paper", "isotonic", "fpr:0.2", 0.2)
    return (
        replace(probe, benign_below=0.01)
        .with_facts(metrics=[{"metric": "auroc", "value": 0.9}])
        .save_pretrained(tmp_path / "probe")
    )


def set_to(path: str, value: Json) -> Damage:
    """Replace, or add, one value of config.json, and sign the result."""

    def damage(folder: Path) -> None:
        config = read_config(folder)
        *parents, last = path.split(".")
        target = config
        for key in parents:
            target = target[int(key)] if isinstance(target, list) else target[key]
        target[int(last) if isinstance(target, list) else last] = value
        write_config(folder, config)

    return damage


def text(edit: Callable[[str], str]) -> Damage:
    """Rewrite the text of config.json, whose digest stays as it was."""
    return lambda folder: (
        (folder / "config.json").write_text(edit((folder / "config.json").read_text())) and None
    )


def head(edit: Callable[[bytes], bytes], signed: bool = False) -> Damage:
    """Rewrite the bytes of the head; signed: with the size and sha256 that belong to them."""

    def damage(folder: Path) -> None:
        data = edit((folder / "head.safetensors").read_bytes())
        (folder / "head.safetensors").write_bytes(data)
        if signed:
            set_to("head.bytes", len(data))(folder)
            set_to("head.sha256", hashlib.sha256(data).hexdigest())(folder)

    return damage


def arrays(**changes: Any) -> Damage:
    """Replace arrays of the head, None for dropping one, and sign the result."""

    def edit(data: bytes) -> bytes:
        values = {**safetensors.numpy.load(data), **changes}
        return safetensors.numpy.save(
            {name: value for name, value in values.items() if value is not None}
        )

    return head(edit, signed=True)


def header(**entries: Any) -> Damage:
    """A head of these safetensors entries over the old bytes, signed."""

    def edit(data: bytes) -> bytes:
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]

    return head(edit, signed=True)


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def other_head(name: str, recipe: str) -> Callable[[bytes], bytes]:
    """The head of another probe."""
    return lambda _: safetensors.numpy.save(dict(tiny_probe(name, recipe).head.arrays()))


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


WIDTH = 32  # columns of the probe that is tampered with
BEFORE: dict[str, Damage] = {
    "version 0": set_to("format_version", 0),
    "version 4": set_to("format_version", 4),
    "version 1 with a digest": set_to("format_version", 1),
    "version 1 with a digest that was not its own": text(
        lambda t: t.replace('"format_version": 3', '"format_version": 1')
    ),
    "another threshold": text(lambda t: t.replace('"benign_below": 0.01', '"benign_below": 0.02')),
    "another fact": text(lambda t: t.replace('"auroc"', '"auprc"')),
    "another digest": text(lambda t: re.sub(r'"digest": "[0-9a-f]', '"digest": "x', t)),
    "digest null": text(lambda t: re.sub(r'(?<="digest": )".*"', "null", t)),
    "digest missing": text(lambda t: re.sub(r',\s*"digest": ".*"', "", t)),
    "version float": set_to("format_version", 1.0),
    "another library": set_to("library", "skops"),
    "classes swapped": set_to("classes", ["malicious", "benign"]),
    "duplicate key": text(lambda t: t.replace("{", '{"threshold": 0.1,', 1)),
    "NaN": text(lambda t: t.replace('"benign_below": 0.01', '"benign_below": NaN')),
    "config list": text(lambda t: f"[{t}]"),
    "config truncated": text(lambda t: t[: len(t) // 2]),
    "config too large": set_to("facts.x", "x" * (PROBE_CONFIG + 1)),
    "half a surrogate pair": set_to("facts.x", "\ud800"),
    "facts nested too deeply to be saved again": set_to(
        "facts.x", json.loads("[" * MAX_NESTING + "]" * MAX_NESTING)
    ),
    "config missing": remove("config.json"),
    "threshold 2": set_to("threshold", 2),
    "benign_below above threshold": both(set_to("threshold", 0.5), set_to("benign_below", 0.6)),
    "unknown feature": set_to("recipe.features", ["weights"]),
    "pooled slices": set_to("recipe.pool", True),
    "other factor than the layout": set_to("recipe.factors", ["A"]),
    "more factors than the layout": set_to("recipe.factors", ["A", "B"]),
    "unknown kind": set_to("layout.kind", "delta"),
    "no slots": both(set_to("layout.slots", []), set_to("layout.scalings", {})),
    "slot of fractional size": set_to("layout.slots.0.2.0", 10.0),
    "slot with three sizes": set_to("layout.slots.0.2", [10, 2, 1]),
    "slot of another factor": set_to("layout.slots.0.1", "C"),
    "huge slot": both(
        set_to("layout.slots.0.2.0", 2**31 - 1), set_to("head.num_features", 2**32 + 10)
    ),
    "slot beyond any array": set_to("layout.slots.0.2.0", 10**30),
    "slot twice": set_to("layout.slots.1", ["model.layers.0.self_attn.q_proj", "B", [6, 2]]),
    "slots in another order": lambda folder: set_to(
        "layout.slots", read_config(folder)["layout"]["slots"][::-1]
    )(folder),
    "module without slot": set_to("layout.scalings.lm_head", 2.0),
    "head elsewhere": set_to("head.file", "../../x"),
    "head under an absolute path": set_to("head.file", "/etc/passwd"),
    "head in the other file": set_to("head.file", "head.json"),
    "pickled head": both(set_to("head.kind", "pickle"), set_to("head.file", "head.pkl")),
    "head name of a fitter": set_to("head.kind", "cosine"),
    "xgboost head of version 2 that is not there": both(
        set_to("format_version", 2),
        set_to("head.kind", "xgboost"),
        set_to("head.file", "head.json"),
    ),
    "other width": set_to("head.num_features", WIDTH + 1),
    "width as float": set_to("head.num_features", float(WIDTH)),
    "sha of another file": set_to("head.sha256", "0" * 64),
    "sha in capitals": lambda folder: set_to(
        "head.sha256", read_config(folder)["head"]["sha256"].upper()
    )(folder),
    "head missing": remove("head.safetensors"),
    "head flipped": head(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "head truncated": head(lambda data: data[:-1]),
    "head of another width": head(other_head("linear", "all_b")),
    "head of another width with all its numbers": both(
        head(other_head("linear", "all_b"), signed=True), set_to("head.num_features", 2 * WIDTH)
    ),
    "calibration falls": set_to("calibration.outputs.0", 1.0),
}
"""Damage that must be seen before a head is built."""

NAN = np.full(WIDTH, np.nan, np.float32)
AFTER: dict[str, Damage] = {
    "head of another width, signed": head(other_head("linear", "all_b"), signed=True),
    "head of another kind, signed": head(other_head("mlp", "paper"), signed=True),
    "linear head called an mlp": set_to("head.kind", "mlp"),
    "NaN": arrays(coef=NAN),
    "NaN intercept": arrays(intercept=np.array([np.nan], np.float32)),
    "float64": arrays(coef=np.zeros(WIDTH)),
    "integers": arrays(coef=np.zeros(WIDTH, np.int32)),
    "two dimensions": arrays(coef=np.zeros((1, WIDTH), np.float32)),
    "no dimension": arrays(intercept=np.zeros((), np.float32)),
    "no numbers": arrays(coef=np.zeros(0, np.float32)),
    "array missing": arrays(intercept=None),
    "array too many": arrays(bias=np.zeros(1, np.float32)),
    "not safetensors": head(lambda data: b"\x80\x04N.", signed=True),
    "bfloat16": header(
        coef={"dtype": "BF16", "shape": [WIDTH], "data_offsets": [0, 2 * WIDTH]},
        intercept={
            "dtype": "BF16",
            "shape": [WIDTH + 2],
            "data_offsets": [2 * WIDTH, 4 * WIDTH + 4],
        },
    ),
    "entries that are not tensors": header(coef=[1, 2]),
}
"""Damage inside a head whose sha256 is right."""


def fields_of(config: Json) -> Iterator[tuple[list[str], str | None]]:
    """(path of an object, a field of it or None) of every object with fixed fields."""
    for path in ([], ["head"], ["featurizer"], ["recipe"], ["layout"], ["calibration"]):
        target = config
        for key in path:
            target = target[key]
        for field in (*target, None):
            yield path, field


@pytest.mark.parametrize("case", BEFORE)
def test_damage_is_refused_before_a_head_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    scores_of(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    BEFORE[case](folder)
    # something was damaged
    assert before != {path.name: path.read_bytes() for path in folder.iterdir()}
    forbid_heads(monkeypatch)
    with pytest.raises(ProbeFormatError) as caught:
        Probe.from_pretrained(folder)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("case", AFTER)
def test_damage_inside_a_signed_head_is_refused(folder: Path, case: str) -> None:
    AFTER[case](folder)
    with pytest.raises(ProbeFormatError):
        Probe.from_pretrained(folder)


def test_heads_are_built_where_nothing_is_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays(coef=np.ones(WIDTH, np.float32))(folder)
    write_config(folder, read_config(folder))
    scores_of(folder)  # negative control: rewriting and signing alone is no damage
    forbid_heads(monkeypatch)
    with pytest.raises(AssertionError, match="before the checks"):
        Probe.from_pretrained(folder)


def test_every_field_is_required_and_no_other_is_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(folder)
    scores_of(folder)
    forbid_heads(monkeypatch)
    cases = list(fields_of(config))
    assert len(cases) == 15 + 6 + 4 + 7 + 4 + 7 + 1
    for path, field in cases:
        edited = copy.deepcopy(config)
        target = edited
        for key in path:
            target = target[key]
        if field is None:
            target["trust_remote_code"] = True
        else:
            del target[field]
        write_config(folder, edited)
        with pytest.raises(ProbeFormatError, match=field or "trust_remote_code"):
            Probe.from_pretrained(folder)


def values_in(config: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value of a document, leaves and containers."""
    if path:
        yield path
    for key in (
        config
        if isinstance(config, dict)
        else range(len(config))
        if isinstance(config, list)
        else ()
    ):
        yield from values_in(config[key], (*path, key))


def json_type(value: Json) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


@pytest.mark.slow
def test_no_value_of_another_type_gets_through(folder: Path) -> None:
    """Every value of config.json is replaced by one of every JSON type.

    It is refused, or it is a fact, or it is of the right type.
    """
    config, expected = read_config(folder), scores_of(folder)
    nullable = {("base_model",), ("benign_below",), ("calibration",), ("recipe", "modules")}
    loaded = 0
    for path in values_in(config):
        if path == ("digest",):
            continue  # writing signs
        for value in (None, True, -1, 10**400, HUGE, "", [], {}):
            edited = copy.deepcopy(config)
            target = edited
            for key in path[:-1]:
                target = target[key]
            old, target[path[-1]] = target[path[-1]], value
            write_config(folder, edited)
            try:
                found = Probe.from_pretrained(folder)
            except ProbeFormatError:
                assert path[0] != "facts" or value == HUGE or path == ("facts",)
                continue
            loaded += 1
            if path[0] == "facts":
                assert found(new_data().adapters).tobytes() == expected
            else:
                assert json_type(value) == json_type(old) or (value is None and path in nullable), (
                    path,
                    value,
                )
    assert loaded > 50


def test_no_layout_makes_scoring_ask_for_more_memory_than_a_head_could_fill(folder: Path) -> None:
    assert MAX_FEATURES < 2**31
    for size in (2**24, 2**31 - 1):
        set_to("layout.slots.0.2", [size, 2**10])(folder)
        set_to("head.num_features", size * 2**10 + 12)(folder)
        with pytest.raises(ProbeFormatError, match="features"):
            Probe.from_pretrained(folder)
