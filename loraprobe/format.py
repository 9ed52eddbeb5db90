"""A probe on disk: config.json and the head's weights, never pickle.

Saving writes plain data. Loading is parse, check version and schema, check size and sha256, read
arrays, check shapes and finiteness, construct: nothing is built from a file before all of it was
checked, and an unknown field or version is refused rather than guessed at.

FORMAT_VERSION goes up by one whenever a folder written by the new code would be misread, or not be
read, by the old code, or the other way round. The reader of every earlier version stays in
_READERS, with a test that loads a folder of that version.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError

from .adapter import KINDS, Layout, Slot
from .calibration import Calibration
from .errors import LoraprobeError, ProbeFormatError
from .featurizer import FeatureRecipe, Featurizer
from .heads import HEADS, Head, XGBoostHead
from .probe import CLASSES, Probe

FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
HEAD_FILES = {"linear": "head.safetensors", "mlp": "head.safetensors", "xgboost": "head.json"}
PROBE_FILES = (CONFIG_NAME, "head.safetensors", "head.json", CARD_NAME)
MAX_CONFIG_BYTES = 16 << 20
MAX_HEAD_BYTES = 1 << 30

_FIELDS = frozenset(
    "format_version library library_version classes base_model head recipe layout threshold benign_below calibration facts".split()
)


def save_probe(probe: Probe, folder: Path) -> Path:
    """Write a probe; files of an earlier probe in the folder are replaced.

    Raises:
        ProbeFormatError: a fact is not JSON-ready, or the path is a file.
    """
    from .card import card

    if folder.exists() and not folder.is_dir():
        raise ProbeFormatError(f"got {folder}, which is a file; expected a folder to save the probe in")
    weights = _head_bytes(probe.head)
    try:
        config = json.dumps(_config(probe, weights), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ProbeFormatError(f"the probe's facts are not JSON-ready ({error}); expected plain finite numbers, text, lists and objects") from None
    folder.mkdir(parents=True, exist_ok=True)
    for name in set(HEAD_FILES.values()) - {HEAD_FILES[probe.head.name]}:
        (folder / name).unlink(missing_ok=True)
    (folder / HEAD_FILES[probe.head.name]).write_bytes(weights)
    (folder / CARD_NAME).write_text(card(probe), encoding="utf-8")
    (folder / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")
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
            f"{folder / CONFIG_NAME}: got format_version {found!r}; this version of loraprobe reads {sorted(_READERS)}. "
            "Upgrade loraprobe, or load an older revision of the probe."
        )
    try:
        return _READERS[found](config, folder)
    except ProbeFormatError:
        raise
    except LoraprobeError as error:
        # A recipe, layout or calibration that contradicts itself is a damaged probe to the reader.
        raise ProbeFormatError(f"{folder / CONFIG_NAME}: {error}") from error


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
        "threshold": probe.threshold,
        "benign_below": probe.lower_cut,
        "calibration": asdict(probe.calibration) if probe.calibration else None,
        "facts": dict(probe.facts),
    }


def _read_version_1(config: dict[str, Any], folder: Path) -> Probe:
    where = folder / CONFIG_NAME
    if set(config) != _FIELDS:
        raise ProbeFormatError(
            f"{where}: missing fields {sorted(_FIELDS - set(config))}, unknown fields {sorted(set(config) - _FIELDS)}; expected exactly the "
            "fields of format version 1"
        )
    if config["classes"] != list(CLASSES):
        raise ProbeFormatError(f"{where}: got classes {config['classes']!r}; expected {list(CLASSES)}")
    base_model = config["base_model"]
    if base_model is not None and not isinstance(base_model, str):
        raise ProbeFormatError(f"{where}: got base_model of type {type(base_model).__name__}; expected text or null")
    facts = _object(config["facts"], f"{where}: facts")
    featurizer = Featurizer(FeatureRecipe.from_dict(_object(config["recipe"], f"{where}: recipe")), _layout_from_json(config["layout"], where))
    threshold = _number(config["threshold"], f"{where}: threshold")
    benign_below = _number(config["benign_below"], f"{where}: benign_below")
    calibration = None if config["calibration"] is None else _calibration(_object(config["calibration"], f"{where}: calibration"), where)
    head = _read_head(_object(config["head"], f"{where}: head"), folder, featurizer.num_features)
    return Probe(featurizer, head, threshold, benign_below, calibration, base_model, facts)


_READERS: dict[int, Callable[[dict[str, Any], Path], Probe]] = {1: _read_version_1}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ProbeFormatError(f"no {CONFIG_NAME} in {folder}; expected the folder of a probe (config.json and head.safetensors or head.json)")
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise ProbeFormatError(f"{path} has {size} bytes; expected at most {MAX_CONFIG_BYTES}")
    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProbeFormatError(f"{path} is not readable JSON: {error}") from None
    return _object(config, str(path))


def _read_head(facts: dict[str, Any], folder: Path, num_features: int) -> Head:
    kind = facts.get("kind")
    if not isinstance(kind, str) or kind not in HEADS:
        raise ProbeFormatError(f"{folder}: got a head of kind {kind!r}; expected one of {', '.join(HEADS)}")
    # The name is looked up, not taken from the file: a probe cannot point outside its folder.
    path = folder / HEAD_FILES[kind]
    if facts.get("file") != path.name or not path.is_file():
        raise ProbeFormatError(f"{folder}: expected the {kind} head in {path.name}; config.json says {facts.get('file')!r}, exists: {path.is_file()}")
    if facts.get("num_features") != num_features:
        raise ProbeFormatError(f"{folder}: the head reads {facts.get('num_features')!r} features, recipe and layout make {num_features}")
    size = path.stat().st_size
    if size > MAX_HEAD_BYTES or size != facts.get("bytes"):
        raise ProbeFormatError(f"{path} has {size} bytes; config.json says {facts.get('bytes')!r}. The file is incomplete or was exchanged.")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != facts.get("sha256"):
        raise ProbeFormatError(f"{path} has sha256 {digest}; config.json says {facts.get('sha256')!r}. The file is damaged or was exchanged.")
    head = HEADS[kind]
    if issubclass(head, XGBoostHead):
        return head.from_json(data, num_features)
    try:
        arrays = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ProbeFormatError(f"{path} is not a readable safetensors file: {error}") from None
    return head.from_arrays(arrays, num_features)


def _head_bytes(head: Head) -> bytes:
    return head.to_json() if isinstance(head, XGBoostHead) else safetensors.numpy.save(head.arrays())


def _layout_to_json(layout: Layout) -> dict[str, Any]:
    return {
        "kind": layout.kind,
        "slots": [[slot.module, slot.factor, list(slot.shape)] for slot in layout.slots],
        "scalings": dict(layout.scalings),
    }


def _layout_from_json(value: Any, where: Path) -> Layout:
    layout = _object(value, f"{where}: layout")
    if set(layout) != {"kind", "slots", "scalings"} or layout["kind"] not in KINDS:
        raise ProbeFormatError(f"{where}: layout needs kind (one of {', '.join(KINDS)}), slots and scalings, got {sorted(layout)}")
    scalings = {module: _number(scaling, f"{where}: scaling of {module}") for module, scaling in _object(layout["scalings"], f"{where}: scalings").items()}
    rows = layout["slots"]
    if not isinstance(rows, list) or not rows:
        raise ProbeFormatError(f"{where}: layout.slots must be a list with at least one matrix")
    slots = tuple(_slot(row, f"{where}: slot {number}") for number, row in enumerate(rows))
    if {slot.module for slot in slots} != set(scalings) or len({(slot.module, slot.factor) for slot in slots}) != len(slots):
        raise ProbeFormatError(f"{where}: slots and scalings must name the same modules, every matrix once")
    return Layout(slots, scalings, layout["kind"])


def _slot(row: Any, where: str) -> Slot:
    match row:
        case [str(module), "A" | "B" as factor, [int(rows), int(columns)]] if 0 < rows < 2**31 and 0 < columns < 2**31:
            return Slot(module, factor, (rows, columns))
    raise ProbeFormatError(f"{where}: got {str(row)[:120]}; expected [module, 'A' or 'B', [rows, columns]]")


def _calibration(values: dict[str, Any], where: Path) -> Calibration:
    if set(values) != set(Calibration.__dataclass_fields__):
        raise ProbeFormatError(f"{where}: calibration needs exactly the fields {sorted(Calibration.__dataclass_fields__)}, got {sorted(values)}")
    knots = {}
    for name in ("inputs", "outputs"):
        if not isinstance(values[name], list):
            raise ProbeFormatError(f"{where}: calibration.{name} must be a list of numbers")
        knots[name] = tuple(_number(number, f"{where}: calibration.{name}") for number in values[name])
    return Calibration(values["method"], knots["inputs"], knots["outputs"], str(values["unit"]), int(values["rows"]), int(values["groups"]))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProbeFormatError(f"{where}: got {type(value).__name__}; expected a JSON object")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ProbeFormatError(f"{where}: got {str(value)[:60]!r}; expected a finite number")
    return float(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def library_version() -> str:
    """This package's version."""
    try:
        return version("loraprobe")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"
