"""From a folder, a file or a Hub repository to an Adapter, and back into a folder.

Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.numpy import save_file

from ..errors import AdapterFormatError, KindMismatch
from .adapter import Adapter
from .pair import LazyTensor
from .peft import CONFIG_NAME, Scalings, Settings, pairs_from_tensors, read_config
from .safetensors import SafetensorsFile

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MAX_WEIGHT_BYTES = 8 << 30
"""An adapter of r = 256 on every module of a 70B model has about 6.6 GB in float32."""


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
    """Read a LoRA adapter from a PEFT folder, a single .safetensors or .bin file, or the Hub.

    Tensors of .safetensors files are read when they are needed, so scoring one layer of an 8B
    model's adapter reads one layer. A bare file without adapter_config.json beside it needs alpha.

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
        AdapterFormatError: missing, truncated, oversized or malformed files. Of .safetensors files
            names are checked at once, a module's shapes and types when it is first asked for.
        UnsupportedAdapterError: not plain LoRA.
        HubError: the repository or revision cannot be fetched, or a revision is asked of a path.
    """
    from ..hub.names import is_on_hub, no_local_either

    path = Path(source)
    commit = None
    if is_on_hub(source, revision):
        from ..hub.hub import fetch_adapter

        with no_local_either(source):
            path, commit = fetch_adapter(
                str(source),
                subfolder=subfolder,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
    elif not path.exists():
        raise AdapterFormatError(
            f"no file or folder {str(source)!r}, and it is no Hub id (org/name). Check the path."
        )
    elif subfolder:
        path = path / subfolder
        if not path.exists():
            raise AdapterFormatError(f"no folder {subfolder!r} in {str(source)!r}. Check the path.")
    is_folder = path.is_dir()
    weights = _weights_file(path) if is_folder else path
    config = weights.parent / CONFIG_NAME
    if config.is_file():
        settings = read_config(config, ignore_fields)
        if alpha not in (None, settings.scalings.alpha):
            raise AdapterFormatError(
                f"got alpha = {alpha}; {config} says {settings.scalings.alpha}. Leave alpha out: it"
                " is for files without a configuration"
            )
    elif is_folder:
        raise AdapterFormatError(f"no {CONFIG_NAME} in {path}; expected a PEFT adapter folder")
    elif alpha is None:
        raise AdapterFormatError(
            f"{weights} has no {CONFIG_NAME} beside it; pass alpha= (PEFT's lora_alpha) to say how"
            " B @ A is scaled"
        )
    else:
        settings = Settings(Scalings(alpha), None, ())
    pairs, ignored = pairs_from_tensors(_open_weights(weights), settings.scalings)
    return Adapter(
        pairs,
        base_model=base_model or settings.base_model,
        ignored=settings.ignored + ignored,
        commit=commit,
    )


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


def _weights_file(folder: Path) -> Path:
    for name in (WEIGHTS_NAME, PICKLE_NAME):
        if (folder / name).is_file():
            return folder / name
    raise AdapterFormatError(f"no adapter weights in {folder}; expected {WEIGHTS_NAME}")


def _open_weights(path: Path) -> Mapping[str, LazyTensor]:
    size = path.stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise AdapterFormatError(
            f"{path} has {size} bytes; expected at most {MAX_WEIGHT_BYTES} for an adapter"
        )
    if path.suffix in (".bin", ".pt", ".pth"):
        raise AdapterFormatError(
            f"{path} is a pickle, which can run code when it is read. Where you trust it, convert"
            " it in Python: import torch, safetensors.torch;"
            f" safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True),"
            f" {WEIGHTS_NAME!r})"
        )
    if path.suffix != ".safetensors":
        raise AdapterFormatError(f"got {path.name}; expected a .safetensors file")
    return SafetensorsFile(path)
