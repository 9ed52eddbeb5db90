"""From what PEFT writes (a folder, a file, a state dict, a Hub repository) to an Adapter.

Only plain LoRA is read. Whatever would change the model in another way (DoRA, embeddings, trained
biases, whole modules, initialisations that rewrite the base) is refused by name, because a score of
half an adapter would be a score of something else. Nothing is ever unpickled into objects.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterFormatError, HubError, KindMismatch, UnsupportedAdapterError
from .adapter import Adapter, LazyPairs
from .pair import LazyTensor, LoRAPair
from .safetensors import check_file_header
from .strict_json import quoted, read_json
from .torch_file import read_torch_file

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
MAX_CONFIG_BYTES = 1 << 20
MAX_NAME = 500
MAX_WEIGHT_BYTES = (
    8 << 30
)  # an adapter of r = 256 on every module of a 70B model has about 6.6 GB in fp32

# Fields of PEFT's LoraConfig that leave B @ A and its scaling as they are, whatever they hold.
_HARMLESS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode"
    " r target_modules exclude_modules lora_alpha lora_dropout use_rslora layers_to_transform"
    " layers_pattern rank_pattern alpha_pattern megatron_core qalora_group_size runtime_config"
    " eva_config init_lora_weights bias parent_library".split()
)
# Fields that may be true but change nothing that is read here; they are reported in
# Adapter.ignored.
_REPORTED = frozenset({"fan_in_fan_out", "ensure_weight_tying"})
# Initialisations that leave the base model alone. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) move
# part of the base into the adapter, so that B @ A is not the change of the published base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ENDINGS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_PREFIX = "base_model.model."
_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]+")


@dataclass(frozen=True)
class Scalings:
    """What PEFT's configuration says about alpha and rank, per module."""

    alpha: float
    rank: int | None = None
    use_rslora: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("alpha_pattern", "rank_pattern"):
            for pattern in getattr(self, name):
                # PEFT runs these as regular expressions; from a stranger's file that is a way to
                # hang the reader, and in practice they are module names.
                if not _PATTERN.fullmatch(pattern):
                    raise UnsupportedAdapterError(
                        f"got {name} key {_shown(pattern)}; expected a module name (regular"
                        " expressions are not run)"
                    )
        for rank in self.rank_pattern.values():
            if type(rank) is not int or rank < 1:
                raise AdapterFormatError(
                    f"got rank {_shown(rank)} in rank_pattern; expected a whole number of at"
                    " least 1"
                )
        for value in (self.alpha, *self.alpha_pattern.values()):
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 < abs(value) <= sys.float_info.max
            ):
                raise AdapterFormatError(
                    f"got alpha {quoted(str(value))}; expected a finite number other than 0"
                )

    def of(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732), of one module."""
        expected = _by_pattern(self.rank_pattern, module, self.rank)
        if expected is not None and expected != rank:
            raise AdapterFormatError(
                f"the configuration says rank {expected}, the tensors have {rank}: they do not"
                " belong together"
            )
        alpha: float = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


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
        cache_dir, force_download, local_files_only, token: Hub only, as in Probe.from_pretrained.
        ignore_fields: unknown fields of adapter_config.json that you have found to be harmless.

    Raises:
        AdapterFormatError: missing, truncated, oversized or malformed files. Of .safetensors files
            names are checked at once, a module's shapes and types when it is first asked for.
        UnsupportedAdapterError: not plain LoRA.
        HubError: the repository or revision cannot be fetched.
    """
    path, commit = Path(source), None
    is_folder = path.is_dir()
    if not is_folder and not path.exists():
        from ..hub.hub import fetch_adapter, looks_like_repo_id

        if not looks_like_repo_id(str(source)):
            raise AdapterFormatError(
                f"no file or folder {str(source)!r}, and it is no Hub id (org/name). Check the"
                " path."
            )
        options = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        try:
            path, commit = fetch_adapter(
                str(source), subfolder=subfolder, revision=revision, **options
            )
        except HubError as error:
            raise HubError(
                f"{error} (There is no local file or folder {str(source)!r} either.)"
            ) from error
        is_folder = True
    elif revision is not None:
        raise AdapterFormatError(
            f"got revision {revision!r} for the local path {path}; revisions belong to Hub ids"
        )
    elif subfolder:
        path = path / subfolder
        if not path.exists():
            raise AdapterFormatError(f"no folder {subfolder!r} in {str(source)!r}. Check the path.")
        is_folder = path.is_dir()
    weights = _weights_file(path) if is_folder else path
    config = weights.parent / CONFIG_NAME
    if config.is_file():
        settings = _read_config(config, ignore_fields)
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
        settings = _Settings(Scalings(alpha), None, ())
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
    # Copies: safetensors refuses to write tensors that share memory, and modules of an adapter may.
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in adapter.state_dict().items()
    }
    save_file(tensors, folder / WEIGHT_NAMES[0])
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def pairs_from_tensors(
    tensors: Mapping[str, Tensor | LazyTensor], scalings: Scalings
) -> tuple[LazyPairs, tuple[str, ...]]:
    """PEFT's tensor names -> pairs by module path, and the names that were safely left out.

    Names are checked now; the shapes and types of a module when its pair is first asked for.
    """
    keys: dict[str, dict[str, str]] = {}
    ignored, adapter_names = [], set()
    for key in tensors:
        if len(key) > MAX_NAME:
            raise AdapterFormatError(
                f"got a tensor named {_shown(key)}; expected a name of at most {MAX_NAME}"
                " characters"
            )
        if key.endswith("rotary_emb.inv_freq"):
            ignored.append(key)  # a buffer computed from the base's configuration
            continue
        module, factor, name = _parse_key(key)
        adapter_names.add(name)
        found = keys.setdefault(module, {})
        if factor in found:
            raise AdapterFormatError(
                f"{module}: lora_{factor} occurs twice, with and without a prefix; expected it once"
            )
        found[factor] = key
    if len(adapter_names) > 1:
        names = ", ".join(map(repr, sorted(adapter_names)[:5]))
        raise AdapterFormatError(
            f"got {len(adapter_names)} adapters in one state dict ({names}); expected one"
        )
    for module, found in keys.items():
        if len(found) == 1:
            raise AdapterFormatError(
                f"{module}: only lora_{next(iter(found))} is there; expected lora_A and lora_B"
            )
    return LazyPairs(
        keys,
        lambda module: _pair(
            module, tensors[keys[module]["A"]], tensors[keys[module]["B"]], scalings
        ),
    ), tuple(ignored)


def _pair(
    module: str, a: Tensor | LazyTensor, b: Tensor | LazyTensor, scalings: Scalings
) -> LoRAPair:
    for factor, tensor in (("A", a), ("B", b)):
        if isinstance(tensor, Tensor) and tensor.dtype not in _FLOATS:
            raise AdapterFormatError(
                f"{module}, lora_{factor}: got dtype {tensor.dtype}; expected float32, float16,"
                " bfloat16 or float64"
            )
        if len(tensor.shape) > 2:
            raise UnsupportedAdapterError(
                f"{module}, lora_{factor}: got shape {tuple(tensor.shape)}: this adapts a"
                " convolution; expected matrices of linear layers"
            )
    try:
        return LoRAPair(a, b, scalings.of(module, LoRAPair(a, b).rank))
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{module}: {error}") from None


def _parse_key(key: str) -> tuple[str, str, str]:
    """(module path, "A" or "B", adapter name) of a PEFT tensor name."""
    factor = _ENDINGS.get(key[-14:])  # how nearly every name ends; an adapter can have hundreds
    if factor and len(key) > 14:
        return key[:-14].removeprefix(_PREFIX), factor, ""
    head, found, tail = key.rpartition(".lora_")
    parts = tail.split(".")  # "A.weight" or "A.default.weight"
    if (
        not found
        or parts[0] not in ("A", "B")
        or parts[-1] != "weight"
        or len(parts) > 3
        or not head
    ):
        raise UnsupportedAdapterError(
            f"{key}: {_what_is(key)}; expected nothing but lora_A.weight and lora_B.weight of"
            " linear layers"
        )
    return head.removeprefix(_PREFIX), parts[0], parts[1] if len(parts) == 3 else ""


def _what_is(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return "this is DoRA, which also rescales the base weight"
    if "lora_embedding_" in key:
        return "this adapts an embedding"
    if ".lora_" in key and key.endswith(".bias"):
        return "this is a LoRA bias (lora_bias=True)"
    if ".lora_" not in key:
        return (
            "this is a whole trained tensor (modules_to_save, a bias or a base weight), not a LoRA"
            " factor"
        )
    return "this is no tensor of plain LoRA"


@dataclass(frozen=True)
class _Settings:
    scalings: Scalings
    base_model: str | None
    ignored: tuple[str, ...]


def _read_config(path: Path, ignore_fields: Collection[str]) -> _Settings:
    """Check adapter_config.json against what plain LoRA may say, and read alpha and ranks."""
    config = _json_object(path)
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapterError(
            f"{path}: got peft_type {_shown(config.get('peft_type'))}; expected 'LORA'"
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapterError(
            f"{path}: got bias {_shown(config['bias'])}: biases of the base were trained too;"
            " expected 'none'"
        )
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise UnsupportedAdapterError(
            f"{path}: got init_lora_weights {_shown(config['init_lora_weights'])}, which moves part"
            " of the base into the adapter; convert it to plain LoRA first (PEFT:"
            " path_initial_model_for_weight_conversion)"
        )
    unknown = [
        name
        for name, value in config.items()
        if value and name not in _HARMLESS | _REPORTED | set(ignore_fields)
    ]
    if unknown:
        fields = ", ".join(f"{quoted(name)} = {quoted(str(config[name]))}" for name in unknown[:10])
        raise UnsupportedAdapterError(
            f"{path}: {fields}: not plain LoRA, or unknown here. If you know that it does not"
            " change B @ A, pass ignore_fields."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterFormatError(
            f"{path}: got r = {_shown(rank)}; expected a whole number of at least 1"
        )
    rslora = config.get("use_rslora")
    if not isinstance(rslora, bool | None):
        raise AdapterFormatError(f"{path}: got use_rslora {_shown(rslora)}; expected true or false")
    patterns = {
        name: {} if config.get(name) is None else config[name]
        for name in ("alpha_pattern", "rank_pattern")
    }
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise AdapterFormatError(
                f"{path}: got {name} of type {type(pattern).__name__}; expected an object of module"
                " names"
            )
    base_model = config.get("base_model_name_or_path")
    if base_model is not None and not isinstance(base_model, str):
        raise AdapterFormatError(
            f"{path}: got base_model_name_or_path of type {type(base_model).__name__}; expected"
            " text"
        )
    if base_model and (len(base_model) > MAX_NAME or not base_model.isprintable()):
        raise AdapterFormatError(
            f"{path}: got base_model_name_or_path {_shown(base_model)}; expected at most {MAX_NAME}"
            " printable characters"
        )
    scalings = Scalings(alpha, rank, bool(rslora), **patterns)  # type: ignore[arg-type]  # checked there
    return _Settings(
        scalings,
        base_model or None,
        tuple(name for name in sorted(_REPORTED | set(ignore_fields)) if config.get(name)),
    )


def _json_object(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        raise AdapterFormatError(f"{path} has more bytes; expected at most {MAX_CONFIG_BYTES}")
    try:
        value = read_json(
            text, finite=False
        )  # PEFT writes NaN as NaN; the numbers that count are checked where they are used
    except ValueError as error:
        raise AdapterFormatError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def _weights_file(folder: Path) -> Path:
    for path in map(folder.joinpath, WEIGHT_NAMES):
        if path.is_file():
            return path
    raise AdapterFormatError(
        f"no adapter weights in {folder}; expected {' or '.join(WEIGHT_NAMES)}"
    )


def _open_weights(path: Path) -> Mapping[str, Tensor | LazyTensor]:
    size = path.stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise AdapterFormatError(
            f"{path} has {size} bytes; expected at most {MAX_WEIGHT_BYTES} for an adapter"
        )
    if path.suffix == ".safetensors":
        return _SafetensorsFile(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return read_torch_file(path)
    raise AdapterFormatError(
        f"got {path.name}; expected a .safetensors file, or PyTorch's .bin with nothing but tensors"
    )


class _SafetensorsFile(Mapping[str, LazyTensor]):
    """The tensors of one .safetensors file: names now, shapes and contents when asked for.

    The file is opened once and stays mapped, so that everything comes from the same bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            file: Any = safe_open(path, framework="pt")
            self._file, self._names = file, dict.fromkeys(file.keys())
            check_file_header(path, len(self._names), file.metadata())
        except (SafetensorError, OSError) as error:
            reason = quoted(str(error), 200)
            raise AdapterFormatError(
                f"{path} is not a readable safetensors file ({reason}). It is damaged or"
                " incomplete: fetch it again."
            ) from None
        except AdapterFormatError as error:
            raise AdapterFormatError(f"{path}: {error}") from None

    def __getitem__(self, name: str) -> LazyTensor:
        view = self._file.get_slice(name)
        if view.get_dtype() not in ("F32", "F16", "BF16", "F64"):
            raise AdapterFormatError(
                f"{self._path}, {name}: got dtype {view.get_dtype()}; expected F32, F16, BF16"
                " or F64"
            )
        return LazyTensor(tuple(view.get_shape()), partial(self._file.get_tensor, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _shown(value: object) -> str:
    return quoted(repr(value))


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the module's path is, or ends with after a dot.

    "." stands for any character.

    The same as re.match(rf"(.*\\.)?({pattern})$", module) for the patterns that `_PATTERN` lets
    through.
    """
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        start = len(module) - len(name)
        if start < 0 or (start > 0 and (pattern.startswith("^") or module[start - 1] != ".")):
            continue
        if all(wanted in (".", got) for wanted, got in zip(name, module[start:], strict=True)):
            return value
    return default
