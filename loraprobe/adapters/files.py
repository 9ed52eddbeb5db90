"""What lies at a path that should hold an adapter: the file of its weights, or what is there."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import AdapterFormatError, LoraprobeError, UnsupportedAdapterError, quoted
from ..limits import ADAPTER_WEIGHTS
from .config import CONFIG_NAME
from .formats import START, WEIGHTS_NAME, what_is

PICKLE_NAME = "adapter_model.bin"

_MOST_SHOWN = 5
_DEPTH = 3


def weights_file(path: Path) -> Path:
    """The .safetensors file of a folder or path, after a look at what it is.

    Raises:
        AdapterFormatError: it is something else, or there are two; the message says what is there
            and which path to give, or what to do.
    """
    if not path.is_dir():
        _check_is_safetensors(path)
        return path
    weights, pickled = path / WEIGHTS_NAME, path / PICKLE_NAME
    if weights.is_symlink() and not weights.exists():
        raise AdapterFormatError(
            f"{weights} is a link to {quoted(str(weights.readlink()), 200)}, which is not there."
            " Copy the file that it points to, or load the Hub repository itself"
        )
    if weights.is_file() and pickled.is_file():
        raise two_files(str(weights), PICKLE_NAME)
    if not weights.is_file():
        raise AdapterFormatError(_instead(path))
    _check_is_safetensors(weights)
    return weights


def two_files(weights: str, other: str) -> UnsupportedAdapterError:
    """The refusal of a folder or repository whose second file other programs would read."""
    return UnsupportedAdapterError(
        f"got {weights} and {other} beside it: programs differ in which of the two they load, so a"
        " score of one says nothing of the other. Delete the one that is not used"
    )


def start_of(path: Path) -> bytes:
    """The first bytes of a file, as many as tell what it is."""
    with path.open("rb") as file:
        return file.read(START)


def _check_is_safetensors(path: Path) -> None:
    size = path.stat().st_size
    what = what_is(start_of(path), path.name)
    if what is not None:
        raise AdapterFormatError(f"{path} is {what}")
    if path.suffix != ".safetensors":
        raise AdapterFormatError(f"got {path.name}; expected a .safetensors file or its folder")
    if size > ADAPTER_WEIGHTS:
        raise AdapterFormatError(
            f"{path} has {size} bytes; expected at most {ADAPTER_WEIGHTS} for an adapter"
        )


def _instead(folder: Path) -> str:
    """Why a folder without weights is no adapter: what is there, and what to give."""
    names = {entry.name for entry in folder.iterdir()}
    shown = f"no {WEIGHTS_NAME} in {folder}"
    if shards := sorted(name for name in names if name.startswith("adapter_model-0000")):
        return (
            f"{shown}, but {len(shards)} shards of it. Load them with PEFT and save the adapter"
            " again with max_shard_size='100GB'"
        )
    if others := sorted(name for name in names if name.endswith(".safetensors")):
        if "config.json" in names and CONFIG_NAME not in names:
            return (
                f"{shown}, but {others[0]} and config.json: this is a whole model, not an adapter."
                " Give the adapter that was merged into it"
            )
        return f"{shown}, but {', '.join(others[:_MOST_SHOWN])}. Give the file itself"
    if nested := _nested(folder):
        bare = [inner for inner in nested if not (inner / CONFIG_NAME).is_file()]
        if CONFIG_NAME in names and bare == nested:
            return f"{shown}, but in {nested[0]}: move it up here, beside {CONFIG_NAME}"
        return (
            f"{shown}; adapters lie deeper. Give one of {', '.join(map(str, nested[:_MOST_SHOWN]))}"
        )
    if others := sorted(name for name in names if name in (PICKLE_NAME, "pytorch_model.bin")):
        other = folder / others[0]
        return f"{shown}, but {other}, which is {what_is(start_of(other), other.name)}"
    if others := sorted(name for name in names if name.endswith((".gguf", ".zip", ".npz"))):
        return (
            f"{shown}, but {', '.join(others[:_MOST_SHOWN])}: unpack an archive; of a .gguf or .npz"
            " give the PEFT adapter that it was made from"
        )
    if CONFIG_NAME in names:
        return f"{shown}, only {CONFIG_NAME}: the weights were not saved or fetched"
    return f"{shown}; it holds {', '.join(sorted(names)[:_MOST_SHOWN]) or 'nothing'}"


def _nested(folder: Path) -> list[Path]:
    """Folders at most three levels down that hold an adapter's weights."""
    folders: list[Path] = []
    level = [folder]
    for _ in range(_DEPTH):
        level = sorted(
            entry for parent in level[:200] for entry in parent.iterdir() if entry.is_dir()
        )
        folders += [entry for entry in level if (entry / WEIGHTS_NAME).is_file()]
    return folders


def adapters_in(top: Path, error: type[LoraprobeError]) -> list[str]:
    """Folders of adapters at any depth, also behind links; each folder is looked into once.

    Raises:
        LoraprobeError: (`error`) a folder cannot be looked into.
    """

    def refuse(reason: OSError) -> None:
        raise error(f"cannot look into {reason.filename}: {reason}. Leave it out, or allow it")

    adapters, visited = [], set()
    for folder, below, files in os.walk(top, followlinks=True, onerror=refuse):
        here = os.path.realpath(folder)
        if here in visited:
            below.clear()
            continue
        visited.add(here)
        if CONFIG_NAME in files or WEIGHTS_NAME in files:  # one of the two alone is unreadable
            adapters.append(folder)
    return sorted(adapters)
