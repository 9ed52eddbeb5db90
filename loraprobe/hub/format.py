"""A probe on disk: config.json and the head's weights, never pickle.

Saving writes plain data. Loading is parse, check version and schema, check size and sha256, read
arrays, check shapes and finiteness, construct: nothing is built from a file before all of it was
checked, and an unknown field or version is refused rather than guessed at.

FORMAT_VERSION goes up by one whenever a folder written by the new code would be misread, or not be
read, by the old code, or the other way round. The reader of every earlier version stays in
_READERS, with a test that loads a folder of that version.

Version 1: as below, without a digest: a changed digit of the threshold was loaded as if it were
    meant.
Version 2: "digest", the sha256 of all the other fields, is checked before any of them is believed.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError

from ..adapters.adapter import KINDS, Layout, Slot
from ..adapters.safetensors import check_header
from ..adapters.strict_json import quoted, read_json
from ..errors import LoraprobeError, ProbeFormatError
from ..featurizer import FeatureRecipe, Featurizer
from ..fit.calibration import Calibration
from ..heads import HEADS, Head, XGBoostHead
from ..probe import CLASSES, Probe, check_cuts

FORMAT_VERSION = 2
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
HEAD_FILES = {"linear": "head.safetensors", "mlp": "head.safetensors", "xgboost": "head.json"}
PROBE_FILES = (CONFIG_NAME, "head.safetensors", "head.json", CARD_NAME)
MAX_CONFIG_BYTES = 16 << 20
MAX_HEAD_BYTES = 1 << 30
MAX_FEATURES = MAX_HEAD_BYTES // 4  # more columns than that no head can have a number for

_FIELDS = {
    "format_version",
    "library",
    "library_version",
    "classes",
    "base_model",
    "head",
    "recipe",
    "layout",
    "modules",
    "threshold",
    "benign_below",
    "calibration",
    "facts",
}
_HEAD_FIELDS = {"kind", "num_features", "file", "bytes", "sha256"}
_LAYOUT_FIELDS = {"kind", "slots", "scalings"}


def save_probe(probe: Probe, folder: Path) -> Path:
    """Write a probe; files of an earlier probe in the folder are replaced.

    Raises:
        ProbeFormatError: a fact is not JSON-ready, or the path is a file.
    """
    from .card import PAGES, card_files

    if folder.exists() and not folder.is_dir():
        raise ProbeFormatError(
            f"got {folder}, which is a file; expected a folder to save the probe in"
        )
    weights = _head_bytes(probe.head)
    try:
        # What is written is what is read: {1: ..., "1": ...} becomes one object with the key "1"
        # twice, and is refused here.
        config: dict[str, Any] = read_json(
            json.dumps(_config(probe, weights), allow_nan=False).encode()
        )
        text = json.dumps({**config, "digest": config_digest(config)}, indent=2).encode() + b"\n"
        pages = card_files(probe)
    except LoraprobeError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ProbeFormatError(
            f"the probe's facts are not JSON-ready ({error}); expected plain finite numbers, text,"
            " lists and objects"
        ) from None
    if len(text) > MAX_CONFIG_BYTES:
        raise ProbeFormatError(
            f"got facts that make {CONFIG_NAME} {len(text)} bytes long; expected at most"
            f" {MAX_CONFIG_BYTES}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in {*HEAD_FILES.values(), *PAGES} - {HEAD_FILES[probe.head.name], *pages}:
        (folder / name).unlink(missing_ok=True)
    (folder / HEAD_FILES[probe.head.name]).write_bytes(weights)
    for name, page in pages.items():
        (folder / name).write_bytes(page)
    (folder / CONFIG_NAME).write_bytes(text)
    return folder


def load_probe(folder: Path) -> Probe:
    """Read a probe after checking every byte that it is made of.

    Raises:
        ProbeFormatError: see Probe.from_pretrained.
    """
    config = _read_config(folder)
    found = config.get("format_version")
    if isinstance(found, bool) or not isinstance(found, int) or found not in _READERS:
        raise ProbeFormatError(
            f"{folder / CONFIG_NAME}: got format_version {_show(found)}; this version of loraprobe"
            f" reads {sorted(_READERS)}. Upgrade loraprobe, or load an older revision of the probe."
        )
    try:
        return _READERS[found](config, folder)
    except ProbeFormatError:
        raise
    except LoraprobeError as error:
        # A recipe, layout or calibration that contradicts itself is a damaged probe to the reader.
        raise ProbeFormatError(f"{folder / CONFIG_NAME}: {error}") from error


def config_digest(fields: Mapping[str, Any]) -> str:
    """sha256 of all fields but "digest", as JSON with sorted keys and without spaces.

    64 hexadecimal digits.

    It finds damage and edits by hand. It is no signature: whoever replaces the folder can compute
        it too.
    """
    rest = {name: value for name, value in fields.items() if name != "digest"}
    return hashlib.sha256(
        json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def _config(probe: Probe, weights: bytes) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "library": "loraprobe",
        "library_version": library_version(),
        "classes": list(CLASSES),
        "base_model": probe.base_model,
        "head": {
            "kind": probe.head.name,
            "num_features": probe.head.num_features,
            "file": HEAD_FILES[probe.head.name],
            "bytes": len(weights),
            "sha256": hashlib.sha256(weights).hexdigest(),
        },
        "recipe": probe.featurizer.recipe.to_dict(),
        "layout": _layout_to_json(probe.featurizer.layout),
        "modules": sorted(probe.featurizer.modules),
        "threshold": probe.threshold,
        "benign_below": probe.benign_below,
        "calibration": asdict(probe.calibration) if probe.calibration else None,
        "facts": dict(probe.facts),
    }


def _read_version_1(config: dict[str, Any], folder: Path) -> Probe:
    where = folder / CONFIG_NAME
    _fields(config, _FIELDS, str(where))
    if config["library"] != "loraprobe":
        raise ProbeFormatError(
            f"{where}: got library {_show(config['library'])}; expected 'loraprobe'"
        )
    _text(config["library_version"], f"{where}: library_version")
    if config["classes"] != list(CLASSES):
        raise ProbeFormatError(
            f"{where}: got classes {_show(config['classes'])}; expected {list(CLASSES)}"
        )
    base_model = (
        None
        if config["base_model"] is None
        else _text(config["base_model"], f"{where}: base_model")
    )
    facts = _object(config["facts"], f"{where}: facts")
    featurizer = _featurizer(config, where)
    threshold = _number(config["threshold"], f"{where}: threshold")
    benign_below = (
        None
        if config["benign_below"] is None
        else _number(config["benign_below"], f"{where}: benign_below")
    )
    check_cuts(threshold, threshold if benign_below is None else benign_below)
    calibration = (
        None
        if config["calibration"] is None
        else _calibration(config["calibration"], f"{where}: calibration")
    )
    head = _read_head(config["head"], folder, featurizer.num_features)
    return Probe(featurizer, head, threshold, benign_below, calibration, base_model, facts)


def _read_version_2(config: dict[str, Any], folder: Path) -> Probe:
    expected = config_digest(config)
    if config.get("digest") != expected:
        raise ProbeFormatError(
            f"{folder / CONFIG_NAME}: got digest {_show(config.get('digest'))}; its other fields"
            f" have {expected}. The file was damaged, or edited by hand. Fetch the probe again; to"
            " change a value, load it, dataclasses.replace(probe, threshold=...) and"
            " save_pretrained()."
        )
    return _read_version_1(
        {name: value for name, value in config.items() if name != "digest"}, folder
    )


_READERS: dict[int, Callable[[dict[str, Any], Path], Probe]] = {
    1: _read_version_1,
    2: _read_version_2,
}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ProbeFormatError(
            f"no {CONFIG_NAME} in {folder}; expected the folder of a probe (config.json and"
            " head.safetensors or head.json)"
        )
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise ProbeFormatError(f"{path} has {size} bytes; expected at most {MAX_CONFIG_BYTES}")
    try:
        config = read_json(path.read_bytes())
    except ValueError as error:
        raise ProbeFormatError(f"{path} is not readable JSON: {error}") from None
    return _object(config, str(path))


def _featurizer(config: dict[str, Any], where: Path) -> Featurizer:
    recipe = FeatureRecipe.from_dict(
        _fields(config["recipe"], FeatureRecipe.__dataclass_fields__, f"{where}: recipe")
    )
    layout = _layout_from_json(config["layout"], where)
    if [(slot.module, slot.factor) for slot in layout.slots] != [
        (module, factor) for module in layout.scalings for factor in recipe.factors
    ]:
        raise ProbeFormatError(
            f"{where}: layout.slots must list the factors {recipe.factors} of every module of"
            " layout.scalings, in that order"
        )
    modules = config["modules"]
    if (
        not isinstance(modules, list)
        or not all(isinstance(module, str) for module in modules)
        or not set(layout.scalings) <= set(modules)
    ):
        raise ProbeFormatError(
            f"{where}: modules must list the names of all adapted modules, those of the layout"
            " among them"
        )
    featurizer = Featurizer(recipe, layout, frozenset(modules))
    if not 0 < featurizer.num_features <= MAX_FEATURES:
        raise ProbeFormatError(
            f"{where}: recipe and layout make {_show(featurizer.num_features)} features; expected"
            f" at most {MAX_FEATURES}"
        )
    return featurizer


def _read_head(value: Any, folder: Path, num_features: int) -> Head:
    where = f"{folder / CONFIG_NAME}: head"
    facts = _fields(value, _HEAD_FIELDS, where)
    kind = _text(facts["kind"], f"{where}.kind")
    if kind not in HEADS:
        raise ProbeFormatError(
            f"{where}: got kind {_show(kind)}; expected one of {', '.join(HEADS)}"
        )
    # The name is looked up, not taken from the file: a probe cannot point outside its folder.
    path = folder / HEAD_FILES[kind]
    if facts["file"] != path.name or not path.is_file():
        raise ProbeFormatError(
            f"{where}: expected the {kind} head in {path.name}; got file {_show(facts['file'])},"
            f" exists: {path.is_file()}"
        )
    if _count(facts["num_features"], f"{where}.num_features") != num_features:
        raise ProbeFormatError(
            f"{where}: the head reads {_show(facts['num_features'])} features, recipe and layout"
            f" make {num_features}"
        )
    size = path.stat().st_size
    if size > MAX_HEAD_BYTES or size != _count(facts["bytes"], f"{where}.bytes"):
        raise ProbeFormatError(
            f"{path} has {size} bytes; {CONFIG_NAME} says {_show(facts['bytes'])}. The file is"
            " incomplete or was exchanged."
        )
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != facts["sha256"]:
        raise ProbeFormatError(
            f"{path} has sha256 {digest}; {CONFIG_NAME} says {_show(facts['sha256'])}. The file is"
            " damaged or was exchanged."
        )
    head = HEADS[kind]
    if issubclass(head, XGBoostHead):
        return head.from_json(data, num_features)
    check_header(data)
    try:
        arrays = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ProbeFormatError(
            f"{path} is not a readable safetensors file: {quoted(str(error), 200)}"
        ) from None
    return head.from_arrays(arrays, num_features)


def _head_bytes(head: Head) -> bytes:
    return (
        head.to_json() if isinstance(head, XGBoostHead) else safetensors.numpy.save(head.arrays())
    )


def _layout_to_json(layout: Layout) -> dict[str, Any]:
    return {
        "kind": layout.kind,
        "slots": [[slot.module, slot.factor, list(slot.shape)] for slot in layout.slots],
        "scalings": dict(layout.scalings),
    }


def _layout_from_json(value: Any, where: Path) -> Layout:
    layout = _fields(value, _LAYOUT_FIELDS, f"{where}: layout")
    if layout["kind"] not in KINDS:
        raise ProbeFormatError(
            f"{where}: got layout.kind {_show(layout['kind'])}; expected one of {', '.join(KINDS)}"
        )
    named = _object(layout["scalings"], f"{where}: layout.scalings")
    scalings = {
        module: _number(scaling, f"{where}: layout.scalings[{_show(module)}]")
        for module, scaling in named.items()
    }
    rows = layout["slots"]
    if not isinstance(rows, list) or not rows:
        raise ProbeFormatError(f"{where}: layout.slots must be a list with at least one matrix")
    return Layout(
        tuple(_slot(row, f"{where}: layout.slots[{number}]") for number, row in enumerate(rows)),
        scalings,
        layout["kind"],
    )


def _slot(row: Any, where: str) -> Slot:
    match row:
        case [str(module), "A" | "B" as factor, [rows, columns]] if all(
            type(size) is int and 0 < size < 2**31 for size in (rows, columns)
        ):
            return Slot(module, factor, (rows, columns))
    raise ProbeFormatError(
        f"{where}: got {_show(row)}; expected [module, 'A' or 'B', [rows, columns]]"
    )


def _calibration(value: Any, where: str) -> Calibration:
    values = _fields(value, Calibration.__dataclass_fields__, where)
    knots = {}
    for name in ("inputs", "outputs"):
        if not isinstance(values[name], list):
            raise ProbeFormatError(
                f"{where}.{name}: got {_show(values[name])}; expected a list of numbers"
            )
        knots[name] = tuple(_number(number, f"{where}.{name}") for number in values[name])
    unit, rows, groups = (
        _text(values["unit"], f"{where}.unit"),
        _count(values["rows"], f"{where}.rows"),
        _count(values["groups"], f"{where}.groups"),
    )
    return Calibration(values["method"], knots["inputs"], knots["outputs"], unit, rows, groups)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProbeFormatError(f"{where}: got {_show(value)}; expected a JSON object")
    return value


def _fields(value: Any, fields: Collection[str], where: str) -> dict[str, Any]:
    """A JSON object with exactly these fields."""
    found = _object(value, where)
    if set(found) != set(fields):
        missing, unknown = sorted(set(fields) - set(found)), sorted(set(found) - set(fields))
        raise ProbeFormatError(
            f"{where}: missing fields {_show(missing)}, unknown fields {_show(unknown)}; expected"
            " those of this format version"
        )
    return found


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ProbeFormatError(f"{where}: got {_show(value)}; expected text")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:  # True is an int to isinstance
        raise ProbeFormatError(
            f"{where}: got {_show(value)}; expected a whole number, not negative"
        )
    return value


def _number(value: Any, where: str) -> float:
    # The comparison is exact also for integers that no float can hold.
    if type(value) not in (int, float) or not -sys.float_info.max <= value <= sys.float_info.max:
        raise ProbeFormatError(f"{where}: got {_show(value)}; expected a finite number")
    return float(value)


def _show(value: Any) -> str:
    """A short, escaped form.

    What a stranger's file holds may be huge, or may be terminal control codes.
    """
    return reprlib.repr(value)


def library_version() -> str:
    """This package's version."""
    try:
        return version("loraprobe")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"
