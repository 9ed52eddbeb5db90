"""Atomic checkpoints: a tree of plain data, NumPy arrays and tensors in a folder that is either
whole or not there.

Arrays go to a safetensors file, everything else to JSON; nothing is pickled. A checkpoint is
written beside the former one under another name, forced to the disk and then renamed, so that a
kill at any moment leaves a whole one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError

from loraprobe.limits import CHECKPOINT_ARRAYS, CHECKPOINT_STATE, read_limited

from ..errors import StateError
from ..files import sync_folder, write_synced

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
_ARRAY = "__array__"
_NAME = re.compile(r"round-(\d{6,})(?:\.(\d+))?")  # a round, and how often it was written again


class Checkpoint(NamedTuple):
    """A whole state as it was read: its round, its plain data and the bytes of its arrays."""

    round: int
    tree: dict[str, Any]
    arrays: bytes


def save_checkpoint(folder: Path, round: int, tree: dict[str, Any], keep: int = 1) -> None:
    """Write the state after a round and remove older ones.

    Args:
        keep: how many rounds have a checkpoint afterwards, at most.

    Raises:
        StateError: the tree holds something that is neither plain, finite data nor an array.
        OSError: it cannot be written; the former ones are as they were.
    """
    from safetensors.torch import save

    arrays: dict[str, Tensor] = {}
    plain = _split(tree, "", arrays)
    blob = save(arrays)
    text = json.dumps(
        {
            "version": FORMAT_VERSION,
            "round": round,
            "sha256": _digest(round, plain, blob),
            "tree": plain,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    former = _whole_checkpoints(folder)
    again = [written for (number, written), _ in former if number == round]
    name = f"round-{round:06d}" + (f".{max(again) + 1}" if again else "")
    part = folder / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        for file, content in (("arrays.safetensors", blob), ("state.json", text.encode())):
            write_synced(part / file, content)
        part.rename(folder / name)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync_folder(folder)
    older = sorted({number for (number, _), _ in former if number < round})
    retained = older[max(0, len(older) - keep + 1) :]
    left = [path for path in folder.glob("*.part") if _NAME.fullmatch(path.stem)]
    for path in (*left, *(path for (number, _), path in former if number not in retained)):
        shutil.rmtree(path)


def _whole_checkpoints(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """The whole checkpoints, oldest first, by round and by how often it was written."""
    names = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("round-*")]
    return sorted(((int(name[1]), int(name[2] or 0)), path) for path, name in names if name)


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest whole state as (round, tree); None if there is none yet.

    Raises:
        StateError: the newest one is damaged or of another version.
    """
    from safetensors.torch import load

    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        return None
    try:
        return checkpoint.round, _joined(checkpoint.tree, load(checkpoint.arrays))
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _damaged(folder, error) from error


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole state, its arrays left as bytes; None if there is none yet. Without torch.

    Raises:
        StateError: the newest one is damaged or of another version.
    """
    checkpoints = _whole_checkpoints(folder) if folder.is_dir() else []
    if not checkpoints:
        return None
    path = checkpoints[-1][1]
    try:
        saved = json.loads(read_limited(path / "state.json", CHECKPOINT_STATE, StateError))
        blob = read_limited(path / "arrays.safetensors", CHECKPOINT_ARRAYS, StateError)
        if saved["version"] != FORMAT_VERSION:
            raise StateError(
                f"{path}: got a checkpoint of format version {saved['version']!r}; expected"
                f" {FORMAT_VERSION}"
            )
        if _digest(saved["round"], saved["tree"], blob) != saved["sha256"]:
            raise StateError(
                f"{path}: its files are not those that were written; put it back as it was, or run"
                " into a new folder"
            )
        return Checkpoint(int(saved["round"]), saved["tree"], blob)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, StateError):
            raise
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> StateError:
    return StateError(
        f"{path} is not a whole checkpoint: {error!r}. Put it back as it was, or run into a new"
        " folder."
    )


def _digest(round: int, plain: Any, blob: bytes) -> str:
    """Of the numbers in both files: JSON comes back from a file as it was written."""
    return hashlib.sha256(json.dumps([round, plain], allow_nan=False).encode() + blob).hexdigest()


def _split(node: Any, path: str, arrays: dict[str, Tensor]) -> Any:
    """The tree with every array replaced by a reference, {"__array__": its name}.

    A dict with such a key is put into {"__array__": None}.
    """
    import torch

    if isinstance(node, dict):
        if not all(isinstance(key, str) for key in node):
            raise StateError(f"got keys other than strings at {path or 'the top'} of a state")
        plain = {key: _split(value, f"{path}/{key}", arrays) for key, value in node.items()}
        return {_ARRAY: None, "dict": plain} if _ARRAY in node else plain
    if isinstance(node, list | tuple):
        return [_split(value, f"{path}/{index}", arrays) for index, value in enumerate(node)]
    if isinstance(node, np.ndarray | torch.Tensor):
        if isinstance(node, np.ndarray) and node.dtype.kind not in "fiub":
            raise StateError(f"got an array of {node.dtype} at {path} of a state; expected numbers")
        name = str(len(arrays))  # not the path: client ids may hold any character
        # A copy of its own: views of one tensor would share storage, which safetensors refuses.
        arrays[name] = (
            torch.from_numpy(np.array(node, order="C"))
            if isinstance(node, np.ndarray)
            else node.detach().cpu().clone().contiguous()
        )
        return {_ARRAY: name, "numpy": isinstance(node, np.ndarray)}
    if isinstance(node, float) and not math.isfinite(node):
        raise StateError(
            f"got {node} at {path} of a state; expected finite numbers, arrays hold others"
        )
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise StateError(
        f"got a {type(node).__name__} at {path} of a state; expected plain data, arrays or tensors"
    )


def _joined(node: Any, arrays: dict[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if _ARRAY in node and node[_ARRAY] is None:
            return {key: _joined(value, arrays) for key, value in node["dict"].items()}
        if _ARRAY in node:
            tensor = arrays[node[_ARRAY]]
            return tensor.numpy() if node["numpy"] else tensor
        return {key: _joined(value, arrays) for key, value in node.items()}
    return [_joined(value, arrays) for value in node] if isinstance(node, list) else node
