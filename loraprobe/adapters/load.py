"""From a folder, a file or a Hub repository to an Adapter, and back into a folder.

Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from ..errors import AdapterFormatError, KindMismatch
from .adapter import Adapter
from .config import CONFIG_NAME, Scalings, Settings, read_config
from .files import weights_file
from .formats import WEIGHTS_NAME
from .peft import pairs_from_tensors
from .safetensors import SafetensorsFile


def load_adapter(
    source: str | Path,
    revision: str | None = None,
    *,
    alpha: float | None = None,
    base_model: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    ignore_fields: Collection[str] = (),
) -> Adapter:
    """Read a LoRA adapter from a PEFT folder, a single .safetensors file, or the Hub.

    Names, shapes, types and ranks of all modules are checked now; numbers are read when they are
    needed, so scoring one layer of an 8B model's adapter reads one layer. `Adapter.check_finite`
    reads them all. A bare file without adapter_config.json beside it needs alpha.

    Args:
        source: a path, or "org/name" on the Hub.
        revision: Hub only: a commit, tag or branch; a name that moves is resolved to one commit.
        alpha: lora_alpha, for a bare file.
        base_model: the base model's name, where the file does not say it.
        subfolder: the folder inside source that holds the adapter.
        cache_dir: Hub only, as in Probe.from_pretrained; the next three as well.
        force_download: likewise.
        local_files_only: likewise.
        token: likewise.
        ignore_fields: unknown fields of adapter_config.json that you have found to be harmless.

    Raises:
        AdapterFormatError: missing, truncated, oversized or malformed files; or two of them; or
            ignore_fields is one text.
        UnsupportedAdapterError: not plain LoRA.
        HubError: the repository or revision cannot be fetched, a revision is asked of a path, or
            the source is a path in a folder that is here, which does not hold it.
    """
    options = {
        "cache_dir": cache_dir,
        "force_download": force_download,
        "local_files_only": local_files_only,
        "token": token,
    }
    if isinstance(ignore_fields, str):
        raise AdapterFormatError(
            f"ignore_fields: got {ignore_fields!r}; expected a list of fields, such as"
            f" [{ignore_fields!r}]"
        )
    path, commit = _resolved(source, revision, subfolder, options)
    weights = weights_file(path)
    settings = _settings(path, weights, alpha, ignore_fields)
    pairs, ignored = pairs_from_tensors(
        SafetensorsFile(weights), settings.scalings, settings.selects
    )
    return Adapter(
        pairs,
        base_model=base_model or settings.base_model,
        ignored=settings.ignored + ignored,
        commit=commit,
        zero_start=settings.zero_start,
        moves_base=settings.moves_base,
        selects=settings.selects,
        base_revision=settings.base_revision,
    )


def _resolved(
    source: str | Path, revision: str | None, subfolder: str | None, options: dict[str, Any]
) -> tuple[Path, str | None]:
    """Where the adapter lies on this machine, after a download if need be; and its commit."""
    from ..hub.names import is_on_hub, no_local_either

    if not is_on_hub(source, revision):
        path = Path(source)
        if os.path.islink(path) and not os.path.exists(path):
            raise AdapterFormatError(f"{path} is a link to something that is not there")
        if not os.path.exists(path):
            raise AdapterFormatError(
                f"no file or folder {str(source)!r}, and it is no Hub id (org/name). Check the"
                " path."
            )
        if subfolder and not os.path.exists(path / subfolder):
            raise AdapterFormatError(f"no folder {subfolder!r} in {str(source)!r}. Check the path.")
        return path / (subfolder or ""), None
    from ..hub.hub import fetch_adapter

    with no_local_either(source):
        return fetch_adapter(str(source), subfolder=subfolder, revision=revision, **options)


def _settings(
    path: Path, weights: Path, alpha: float | None, ignore_fields: Collection[str]
) -> Settings:
    """What adapter_config.json says, or alpha alone of a bare file."""
    config = weights.parent / CONFIG_NAME
    if config.is_file():
        settings = read_config(config, ignore_fields)
        if alpha not in (None, settings.scalings.alpha):
            raise AdapterFormatError(
                f"got alpha = {alpha}; {config} says {settings.scalings.alpha}. Leave alpha out: it"
                " is for files without a configuration"
            )
        return settings
    if alpha is None:  # what is no PEFT adapter at all is said before what it lacks
        pairs_from_tensors(SafetensorsFile(weights), Scalings(1.0))
    elsewhere = weights.parent.parent / CONFIG_NAME
    hint = f". Copy {elsewhere} beside the weights" if elsewhere.is_file() else ""
    if path.is_dir():
        raise AdapterFormatError(
            f"no {CONFIG_NAME} in {path}, which says how B @ A is scaled. Put it there, or give the"
            f" file {weights.name} with alpha (--alpha of score and inspect){hint}"
        )
    if alpha is None:
        raise AdapterFormatError(
            f"{weights} has no {CONFIG_NAME} beside it, which says how B @ A is scaled. Put it"
            f" there, or pass alpha (--alpha of score and inspect; PEFT's lora_alpha){hint}"
        )
    return Settings(Scalings(alpha))


def save_adapter(adapter: Adapter, folder: str | Path) -> Path:
    """Write an adapter of kind "weights" as a PEFT folder that PEFT and `load_adapter` read.

    Raises:
        KindMismatch: the adapter is a delta, which PEFT would take for weights.
    """
    if adapter.kind != "weights":
        raise KindMismatch(
            f"got an adapter of kind {adapter.kind!r}; PEFT's format holds weights: add the delta"
            " to its start first (add_delta)"
        )
    first = next(iter(adapter.values()))
    alphas = {module: pair.scaling * pair.rank for module, pair in adapter.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "revision": adapter.base_revision,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({module.rpartition(".")[2] for module in adapter}),
        "r": first.rank,
        "lora_alpha": first.scaling * first.rank,
        "rank_pattern": {
            module: pair.rank for module, pair in adapter.items() if pair.rank != first.rank
        },
        "alpha_pattern": {
            module: alpha for module, alpha in alphas.items() if alpha != first.scaling * first.rank
        },
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter.arrays(), folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder
