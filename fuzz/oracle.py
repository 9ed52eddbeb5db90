"""What a loader may do with a damaged file, and what it did.

Allowed: a LoraprobeError with a message fit to be printed ("refused"); a load whose content is, bit
for bit, that of the undamaged file ("identical"); for an adapter, whose format has no checksum, the
values that an independent reader finds in the damaged file ("as in the file"); for files whose
checksums were made right again, a load that is whole in itself ("valid"). Anything else is a
failure.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import LoraprobeError
from loraprobe.probe import Probe

from . import reread
from .corpus import BASE, Files, probes, tensors

OUTCOMES = ("refused", "identical", "as in the file", "valid")
MAX_MESSAGE = 4000
MAX_WIDTH = (
    1 << 18
)  # columns of the rows that a probe is asked to score; a wider probe refuses them


class Failure(Exception):  # a finding, not an error of this program
    """The loader did what it may not do; the text says what."""


Load = Callable[[Path], Any]


def outcome(load: Load, folder: Path, judge: Callable[[Any], str]) -> str:
    """Load, and judge what was loaded; a refusal is an answer too.

    Raises:
        Failure: a message that cannot be printed, or what `judge` finds.
        Exception: whatever else the loader raises.
    """
    try:
        loaded = load(folder)
    except LoraprobeError as error:
        check_message(error)
        return "refused"
    return judge(loaded)


def check_message(error: Exception) -> None:
    """Raise Failure unless an error can be shown on a terminal and written to a log."""
    message = str(error)
    if not message or len(message) > MAX_MESSAGE or not message.isprintable():
        raise Failure(
            f"a message that cannot be shown, of {len(message)} characters: {message[:300]!a}"
        )


def probe_content(probe: Probe) -> tuple[Any, ...]:
    """All that a probe is, comparable bit for bit."""
    recipe, layout = probe.featurizer.recipe, probe.featurizer.layout
    head = probe.head
    arrays = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in head.arrays().items()}
    said = {
        "recipe": recipe.to_dict(),
        "slots": [[slot.module, slot.factor, slot.shape] for slot in layout.slots],
        "scalings": layout.scalings,
        "kind": layout.kind,
        "modules": sorted(probe.featurizer.modules),
        "threshold": probe.threshold,
        "low": probe.benign_below,
        "calibration": asdict(probe.calibration) if probe.calibration else None,
        "base": probe.base_model,
        "facts": dict(probe.facts),
    }
    return (
        head.name,
        head.num_features,
        arrays,
        json.dumps(said, sort_keys=True),
        list(layout.scalings),
    )


def judge_damaged(undamaged: Probe) -> Callable[[Probe], str]:
    """Of a probe whose checksums were left as they were: it must be the undamaged one."""

    def judge(probe: Probe) -> str:
        if probe_content(probe) != probe_content(undamaged):
            raise Failure(f"a damaged probe was loaded: {probe!r:.300}")
        return "identical"

    return judge


def judge_sealed(undamaged: Probe) -> Callable[[Probe], str]:
    """Of a probe whose checksums were made right again.

    It must score, and be the same probe once it is saved and loaded again.
    """

    def judge(probe: Probe) -> str:
        scores = _scores(probe)
        with tempfile.TemporaryDirectory() as again:
            try:
                probe.save_pretrained(again)
            except LoraprobeError as error:  # facts are free, and some the card cannot show
                check_message(error)
                if "facts" not in str(error):
                    raise
                return "valid"
            reloaded = Probe.from_pretrained(again)
        if probe_content(reloaded) != probe_content(probe) or _scores(reloaded) != scores:
            raise Failure("a probe that is another one after it was saved and loaded")
        return "identical" if probe_content(probe) == probe_content(undamaged) else "valid"

    return judge


def _scores(probe: Probe) -> list[bytes | str]:
    """Scores of a few rows and of two adapters, or the refusals to give them."""
    width = probe.featurizer.num_features
    x = np.random.default_rng(7).standard_normal((5, min(width, MAX_WIDTH))).astype(np.float32)
    x[0] = 0
    found: list[bytes | str] = []
    for score in (
        partial(probe.score_features, x),
        *(partial(_verdicts, probe, seed) for seed in (0, 1)),
    ):
        try:
            scores = score()
        except LoraprobeError as error:  # an overflow, or rows and adapters of another layout
            check_message(error)
            found.append(type(error).__name__)
            continue
        if not (np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()):
            raise Failure(f"scores {scores.tolist()}")
        found.append(scores.tobytes())
    return found


def _verdicts(probe: Probe, seed: int) -> np.ndarray:
    return np.array(
        [verdict.score for verdict in probe.verdicts([an_adapter(seed)], check_base=False)]
    )


def an_adapter(seed: int) -> Adapter:
    """A delta of the layout of the corpus."""
    return delta(Adapter.from_state_dict(tensors(seed=seed), alpha=4, base_model=BASE))


def delta(adapter: Adapter) -> Adapter:
    """The change since an adapter of zeros."""
    zeros = {
        module: LoRAPair(0 * pair.A, 0 * pair.B, pair.scaling) for module, pair in adapter.items()
    }
    return factor_delta(adapter, Adapter(zeros))


def adapter_content(adapter: Adapter) -> tuple[Any, ...]:
    """All that an adapter is, comparable bit for bit; reads every tensor."""
    return (
        adapter.kind,
        adapter.base_model,
        adapter.ignored,
        [
            (
                module,
                pair.scaling,
                *((t.dtype, t.shape, t.tobytes()) for t in (pair.A, pair.B)),
            )
            for module, pair in adapter.items()
        ],
    )


def judge_adapter(folder: Path, undamaged: Adapter) -> Callable[[Adapter], str]:
    """Of an adapter from a folder without checksums: the undamaged one, or what the files say.

    Then a probe must score or refuse it.
    """

    def judge(adapter: Adapter) -> str:
        try:
            content = adapter_content(adapter)  # shapes and types are checked now
        except LoraprobeError as error:
            check_message(error)
            return "refused"
        same = content == adapter_content(undamaged)
        _compare(adapter, folder)
        _score(adapter)
        return "identical" if same else "as in the file"

    return judge


def _compare(adapter: Adapter, folder: Path) -> None:
    """Raise Failure unless an independent reader finds the same values in the files."""
    weights = folder / "adapter_model.safetensors"
    try:
        expected = reread.safetensors(weights.read_bytes())
        config = reread.unambiguous((folder / "adapter_config.json").read_bytes())
    except ValueError as error:
        raise Failure(f"loaded although {error}") from None
    got = {
        (module, factor): pair.factor(factor)
        for module, pair in adapter.items()
        for factor in ("A", "B")
    }
    if got.keys() != expected.keys():
        raise Failure(
            f"matrices {sorted(got.keys() ^ expected.keys())[:4]} are in only one of the two"
            " readings"
        )
    for key, matrix in expected.items():
        if (
            matrix.dtype != got[key].dtype
            or matrix.shape != got[key].shape
            or not _same_numbers(matrix, got[key])
        ):
            raise Failure(f"{key}: other numbers than the file holds")
    for module, pair in adapter.items():
        if pair.scaling != reread.scaling(config, module, pair.rank):
            raise Failure(
                f"{module}: scaling {pair.scaling}, the file says"
                f" {reread.scaling(config, module, pair.rank)}"
            )
    if adapter.base_model != (config.get("base_model_name_or_path") or None):
        raise Failure(f"base model {adapter.base_model!a}")


def _same_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Bit for bit, but for which NaN a NaN of half precision becomes."""
    nan = np.isnan(one)
    return bool((nan == np.isnan(other)).all()) and one[~nan].tobytes() == other[~nan].tobytes()


def _score(adapter: Adapter) -> None:
    finite = all(
        np.isfinite(pair.factor(factor)).all() for pair in adapter.values() for factor in ("A", "B")
    )
    for probe in _probes():
        try:
            scores = probe([delta(adapter)], check_base=False)
        except LoraprobeError as error:
            check_message(error)
            continue
        if not (0 <= scores[0] <= 1) or (not finite and probe.featurizer.recipe.layers == "all"):
            raise Failure(
                f"scores {scores.tolist()} of an adapter that is {'' if finite else 'not '}finite"
            )


@cache
def _probes() -> list[Probe]:
    """A probe that reads the first layer and one that reads all of them."""
    return [loaded_probe(files) for files in (probes()[0], probes()[3])]


def loaded_probe(files: Files) -> Probe:
    """The probe of an undamaged folder of the corpus."""
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        return Probe.from_pretrained(name)
