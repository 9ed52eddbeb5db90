"""Loaders with planted bugs, as targets that the fuzz harness has to see through.

Named by tests as "tests.helpers.planted:NAME".
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.targets import TARGETS, Target, seal
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import load_adapter
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import LoraprobeError, ProbeFormatError
from loraprobe.heads import LinearHead
from loraprobe.probe import Probe


def _where_refused(bug: Callable[[], Any]) -> Callable[[Path], Any]:
    """Does what the loader does, and this instead of refusing."""

    def load(folder: Path) -> Any:
        try:
            return Probe.from_pretrained(folder)
        except LoraprobeError:
            return bug()

    return load


def _forgetful(folder: Path) -> Probe:
    """Believes every file: checksums are made right before they are looked at."""
    for name, data in seal({path.name: path.read_bytes() for path in folder.iterdir()}).items():
        (folder / name).write_bytes(data)
    return Probe.from_pretrained(folder)


def _raise(error: BaseException) -> Any:
    raise error


def _endless() -> None:
    while True:
        time.sleep(0.1)


class _BeyondOne(LinearHead):
    def __call__(self, x: np.ndarray) -> np.ndarray:
        return super().__call__(x) + 1


def _too_certain(folder: Path) -> Probe:
    probe = Probe.from_pretrained(folder)
    width = probe.featurizer.num_features
    return replace(probe, head=_BeyondOne(np.ones(width, np.float32), 0.0), calibration=None)


class _Forgetful(LinearHead):
    def arrays(self) -> dict[str, np.ndarray]:
        return {**super().arrays(), "intercept": np.zeros(1, np.float32)}


def _saved_otherwise(folder: Path) -> Probe:
    probe = Probe.from_pretrained(folder)
    return replace(probe, head=_Forgetful(np.ones(probe.featurizer.num_features, np.float32), 0.5))


def _rounding(folder: Path) -> Adapter:
    adapter = load_adapter(folder)
    return Adapter(
        {
            module: LoRAPair(pair.A * (1 + 1e-6), pair.B, pair.scaling)
            for module, pair in adapter.items()
        },
        base_model=adapter.base_model,
    )


def _other_scaling(folder: Path) -> Adapter:
    adapter = load_adapter(folder)
    pairs = {module: LoRAPair(pair.A, pair.B, 2 * pair.scaling) for module, pair in adapter.items()}
    return Adapter(pairs, base_model=adapter.base_model, ignored=adapter.ignored)


def _planted(of: str, load: Callable[[Path], Any]) -> Target:
    return replace(TARGETS[of], load=load)


NO_DIGEST = _planted("config", _forgetful)
NO_SHA = _planted("head-arrays", _forgetful)
KEY_ERROR = _planted("config", _where_refused(lambda: {}["threshold"]))
EXIT = _planted("config", _where_refused(lambda: sys.exit(0)))
HARD_EXIT = _planted("config", _where_refused(lambda: os._exit(0)))
SEGFAULT = _planted("config", _where_refused(lambda: ctypes.string_at(0)))
HANG = _planted("config", _where_refused(_endless))
FLOOD = _planted("config", _where_refused(lambda: bytearray(8 << 30)))
WARNS = _planted(
    "config",
    _where_refused(lambda: warnings.warn("something is odd", RuntimeWarning, stacklevel=1)),
)
COLOURS = _planted("config", _where_refused(lambda: _raise(ProbeFormatError("\x1b[2J"))))
ESSAY = _planted("config", _where_refused(lambda: _raise(ProbeFormatError("x" * 5000))))
TOO_CERTAIN = _planted("config-sealed", _too_certain)
SAVED_OTHERWISE = _planted("config-sealed", _saved_otherwise)
ROUNDING = _planted("adapter-tensors", _rounding)
OTHER_SCALING = _planted("adapter-config", _other_scaling)
