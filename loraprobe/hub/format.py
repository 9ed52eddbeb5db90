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
Version 3: trees are arrays in head.safetensors; before, they were XGBoost's JSON in head.json. What
    a featurizer learnt is in featurizer.safetensors, where it learnt anything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError

from ..adapters.layout import Layout
from ..adapters.safetensors import header_of
from ..adapters.strict_json import read_json
from ..errors import LoraprobeError, OutputError, ProbeFormatError, quoted
from ..featurizer import FeatureRecipe, Featurizer
from ..heads import HEADS, Head
from ..heads.trees import trees_from_xgboost
from ..limits import PROBE_CONFIG, PROBE_FEATURIZER, PROBE_HEAD, PROBE_TREES, read_limited
from ..probe import CLASSES, Probe, check_cuts
from .card import CARD_NAME, PAGES, card_files
from .featurizer_file import featurizer_bytes, with_arrays
from .fields import calibration_of, count_of, fields_of, number_of, object_of, optional, text_of

FORMAT_VERSION = 3
CONFIG_NAME = "config.json"
HEAD_NAME = "head.safetensors"
TREES_NAME = "head.json"  # of an XGBoost head, in versions 1 and 2
FEATURIZER_NAME = "featurizer.safetensors"
SIGNATURE_NAME = "model.sig"  # see signing.py; anything that is saved anew has lost it
PROBE_FILES = (
    *(CONFIG_NAME, HEAD_NAME, TREES_NAME, FEATURIZER_NAME, CARD_NAME),
    SIGNATURE_NAME,
)
MAX_FEATURES = PROBE_HEAD // 4  # more columns than that no head can have a number for

_FIELDS = {
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
_FEATURIZER_FIELDS = {"file", "bytes", "sha256"}


def save_probe(probe: Probe, folder: Path) -> Path:
    """Write a probe; files of an earlier probe in the folder are replaced, nobody else's.

    Raises:
        ProbeFormatError: a fact is not JSON-ready, or the path is a file.
        OutputError: the folder holds files of these names and no probe.
    """
    if folder.exists() and not folder.is_dir():
        raise ProbeFormatError(
            f"got {folder}, which is a file; expected a folder to save the probe in"
        )
    check_ours(folder)
    weights = safetensors.numpy.save(probe.head.arrays())
    learnt = featurizer_bytes(probe.featurizer)
    try:
        # What is written is what is read: {1: ..., "1": ...} becomes one object with the key "1"
        # twice, and is refused here.
        config: dict[str, Any] = read_json(
            json.dumps(_config(probe, weights, learnt), allow_nan=False).encode()
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
    if len(text) > PROBE_CONFIG:
        raise ProbeFormatError(
            f"got facts that make {CONFIG_NAME} {len(text)} bytes long; expected at most"
            f" {PROBE_CONFIG}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = {HEAD_NAME: weights, **pages}
    if learnt is not None:
        files[FEATURIZER_NAME] = learnt
    for name in {TREES_NAME, FEATURIZER_NAME, SIGNATURE_NAME, *PAGES} - set(files):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / CONFIG_NAME).write_bytes(text)
    return folder


def check_ours(folder: Path) -> None:
    """Refuse a folder that holds files of a probe's names without being a probe's.

    Raises:
        OutputError: writing a probe there would replace what somebody else wrote.
    """
    theirs = [name for name in (*PROBE_FILES, *PAGES) if (folder / name).exists()]
    if not theirs:
        return
    try:
        ours = _read_config(folder).get("library") == "loraprobe"
    except ProbeFormatError:
        ours = False
    if not ours:
        raise OutputError(
            f"{folder} holds {quoted(theirs[0])} and no probe; expected a new folder, or a probe's."
            " Name another"
        )


def load_probe(folder: Path, commit: str | None = None) -> Probe:
    """Read a probe after checking every byte that it is made of.

    Args:
        commit: of the Hub, for the probe to name.

    Raises:
        ProbeFormatError: see Probe.from_pretrained.
    """
    config = _read_config(folder)
    version = config.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version not in _READERS:
        raise ProbeFormatError(
            f"{folder / CONFIG_NAME}: got format_version {quoted(version)}; this version of"
            f" loraprobe reads {sorted(_READERS)}. Upgrade loraprobe, or load an older revision of"
            " the probe."
        )
    try:
        probe = replace(_READERS[version](config, folder), commit=commit)
        object.__setattr__(probe, "digest", config_digest(config))
        return probe
    except ProbeFormatError:
        raise
    except LoraprobeError as error:
        # A recipe, layout or calibration that contradicts itself is a damaged probe to the reader.
        raise ProbeFormatError(f"{folder / CONFIG_NAME}: {error}") from error


def config_digest(fields: Mapping[str, Any]) -> str:
    """sha256 of all fields but "digest", as JSON with sorted keys and without spaces.

    It finds damage and edits by hand. It is no signature: whoever replaces the folder can compute
    it too.
    """
    rest = {name: value for name, value in fields.items() if name != "digest"}
    return hashlib.sha256(
        json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def _config(probe: Probe, weights: bytes, learnt: bytes | None) -> dict[str, Any]:
    from .._version import __version__  # looks the distribution up, which takes a while

    stored = {} if learnt is None else {"featurizer": _stated(FEATURIZER_NAME, learnt)}
    return {
        "format_version": FORMAT_VERSION,
        "library": "loraprobe",
        "library_version": __version__,
        "classes": list(CLASSES),
        "base_model": probe.base_model,
        "head": {
            "kind": probe.head.name,
            "num_features": probe.head.num_features,
            **_stated(HEAD_NAME, weights),
        },
        **stored,
        "recipe": probe.featurizer.recipe.to_dict(),
        "layout": probe.featurizer.layout.to_dict(),
        "modules": sorted(probe.featurizer.modules),
        "threshold": probe.threshold,
        "benign_below": probe.benign_below,
        "calibration": asdict(probe.calibration) if probe.calibration else None,
        "facts": dict(probe.facts),
    }


def _stated(name: str, data: bytes) -> dict[str, Any]:
    return {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def head_file(config: Any) -> str | None:
    """Which file holds the head by a config.json that nobody has checked yet; None if none."""
    try:
        kind = config["head"]["kind"]
        old = config["format_version"] in (1, 2)
        return (TREES_NAME if old and kind == "xgboost" else HEAD_NAME) if kind in HEADS else None
    except (LookupError, TypeError):
        return None


def weight_files(config: Any) -> list[str]:
    """The files beside a config.json that nobody has checked yet which make up the probe."""
    head = head_file(config)
    learnt = isinstance(config, dict) and "featurizer" in config
    return [*([head] if head else []), *([FEATURIZER_NAME] if learnt else [])]


def _read(config: dict[str, Any], folder: Path) -> Probe:
    where = folder / CONFIG_NAME
    besides = {"format_version", *({"featurizer"} if config["format_version"] > 2 else set())}
    fields_of({name: config[name] for name in config if name not in besides}, _FIELDS, where)
    if config["library"] != "loraprobe":
        raise ProbeFormatError(
            f"{where}: got library {quoted(config['library'])}; expected 'loraprobe'"
        )
    text_of(config["library_version"], f"{where}: library_version")
    if config["classes"] != list(CLASSES):
        raise ProbeFormatError(
            f"{where}: got classes {quoted(config['classes'])}; expected {list(CLASSES)}"
        )
    base_model = optional(text_of, config["base_model"], f"{where}: base_model")
    facts = object_of(config["facts"], f"{where}: facts")
    featurizer = _learnt(_featurizer(config, where), config, folder)
    threshold = number_of(config["threshold"], f"{where}: threshold")
    benign_below = optional(number_of, config["benign_below"], f"{where}: benign_below")
    check_cuts(threshold, threshold if benign_below is None else benign_below)
    calibration = optional(calibration_of, config["calibration"], f"{where}: calibration")
    head = _read_head(config, folder, featurizer.num_features)
    return Probe(featurizer, head, threshold, benign_below, calibration, base_model, facts)


def _read_with_digest(config: dict[str, Any], folder: Path) -> Probe:
    expected = config_digest(config)
    if config.get("digest") != expected:
        raise ProbeFormatError(
            f"{folder / CONFIG_NAME}: got digest {quoted(config.get('digest'))}; its other fields"
            f" have {expected}. The file was damaged, or edited by hand. Fetch the probe again; to"
            " change a value, load it, dataclasses.replace(probe, threshold=...) and"
            " save_pretrained()."
        )
    return _read({name: value for name, value in config.items() if name != "digest"}, folder)


_READERS: dict[int, Callable[[dict[str, Any], Path], Probe]] = {
    1: _read,
    2: _read_with_digest,
    3: _read_with_digest,
}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not os.path.exists(folder):
        raise ProbeFormatError(f"{folder} does not exist; expected the folder of a probe")
    if not path.is_file():
        inside = sorted(config_path.parent.name for config_path in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f". There are {', '.join(inside[:20])} inside: name one" if inside else ""
        raise ProbeFormatError(
            f"no {CONFIG_NAME} in {folder}; expected the folder of a probe (config.json and"
            f" head.safetensors or head.json){hint}"
        )
    data = read_limited(path, PROBE_CONFIG, ProbeFormatError)
    try:
        config = read_json(data)
    except ValueError as error:
        raise ProbeFormatError(f"{path} is not readable JSON: {error}") from None
    return object_of(config, str(path))


def _featurizer(config: dict[str, Any], where: Path) -> Featurizer:
    recipe = FeatureRecipe.from_dict(object_of(config["recipe"], f"{where}: recipe"))
    fields_of(config["recipe"], recipe.to_dict(), f"{where}: recipe")
    layout = Layout.from_dict(config["layout"])
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
            f"{where}: recipe and layout make {quoted(featurizer.num_features)} features; expected"
            f" at most {MAX_FEATURES}"
        )
    return featurizer


def _learnt(featurizer: Featurizer, config: dict[str, Any], folder: Path) -> Featurizer:
    """With what is in the featurizer's file, where there has to be one or is one."""
    where = f"{folder / CONFIG_NAME}: featurizer"
    if "featurizer" not in config:
        if featurizer.recipe.reads_product:
            raise ProbeFormatError(f"{where} is missing; the recipe needs its {FEATURIZER_NAME}")
        if (folder / FEATURIZER_NAME).exists():
            raise ProbeFormatError(
                f"{where} is missing; expected what it says of {FEATURIZER_NAME}, which is there."
                " Save the probe anew"
            )
        return featurizer
    facts = fields_of(config["featurizer"], _FEATURIZER_FIELDS, where)
    path = folder / FEATURIZER_NAME
    if facts["file"] != FEATURIZER_NAME or not path.is_file():
        raise ProbeFormatError(
            f"{where}: expected {FEATURIZER_NAME}; got file {quoted(facts['file'])}, exists:"
            f" {path.is_file()}"
        )
    data = _checked_bytes(path, facts, where, PROBE_FEATURIZER)
    return with_arrays(featurizer, data, str(path))


def _read_head(config: dict[str, Any], folder: Path, num_features: int) -> Head:
    where = f"{folder / CONFIG_NAME}: head"
    facts = fields_of(config["head"], _HEAD_FIELDS, where)
    kind = text_of(facts["kind"], f"{where}.kind")
    name = head_file(config)
    if name is None:
        raise ProbeFormatError(
            f"{where}: got kind {quoted(kind)}; expected one of {', '.join(HEADS)}"
        )
    # The name is looked up, not taken from the file: a probe cannot point outside its folder.
    path = folder / name
    if facts["file"] != name or not path.is_file():
        raise ProbeFormatError(
            f"{where}: expected the {kind} head in {name}; got file {quoted(facts['file'])},"
            f" exists: {path.is_file()}"
        )
    if count_of(facts["num_features"], f"{where}.num_features") != num_features:
        raise ProbeFormatError(
            f"{where}: the head reads {quoted(facts['num_features'])} features, recipe and layout"
            f" make {num_features}"
        )
    data = _checked_bytes(path, facts, where, PROBE_TREES if name == TREES_NAME else PROBE_HEAD)
    if name == TREES_NAME:
        return trees_from_xgboost(data, num_features)
    header_of(data)
    try:
        arrays = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ProbeFormatError(
            f"{path} is not a readable safetensors file: {quoted(str(error), 200)}"
        ) from None
    return HEADS[kind].from_arrays(arrays, num_features)


def _checked_bytes(path: Path, facts: Mapping[str, Any], where: str, limit: int) -> bytes:
    """The bytes of a file, after its size and sha256 were compared with what is stated."""
    size = path.stat().st_size
    if size > limit:
        raise ProbeFormatError(f"{path} has {size} bytes; expected at most {limit}")
    if size != count_of(facts["bytes"], f"{where}.bytes"):
        raise ProbeFormatError(
            f"{path} has {size} bytes; {CONFIG_NAME} says {quoted(facts['bytes'])}. The file is"
            " incomplete or was exchanged."
        )
    data = read_limited(path, limit, ProbeFormatError)
    digest = hashlib.sha256(data).hexdigest()
    if digest != facts["sha256"]:
        raise ProbeFormatError(
            f"{path} has sha256 {digest}; {CONFIG_NAME} says {quoted(facts['sha256'])}. The file is"
            " damaged or was exchanged."
        )
    return data
