"""What PEFT writes: names of tensors and adapter_config.json.

Only plain LoRA is read. Whatever would change the model in another way (DoRA, embeddings, trained
biases, whole modules, initialisations that rewrite the base) is refused by name, because a score of
half an adapter would be a score of something else.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterFormatError, UnsupportedAdapterError
from .adapter import LazyPairs
from .pair import Array, LazyTensor, LoRAPair
from .strict_json import quoted, read_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_NAME = 500

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

_FLOATS = ("float32", "float16", "bfloat16", "float64")
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


def pairs_from_tensors(
    tensors: Mapping[str, Array | Tensor | LazyTensor], scalings: Scalings
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
    module: str, a: Array | Tensor | LazyTensor, b: Array | Tensor | LazyTensor, scalings: Scalings
) -> LoRAPair:
    for factor, tensor in (("A", a), ("B", b)):
        if not isinstance(tensor, LazyTensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _FLOATS:
                raise AdapterFormatError(
                    f"{module}, lora_{factor}: got dtype {dtype}; expected"
                    f" {', '.join(_FLOATS[:-1])} or {_FLOATS[-1]}"
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
class Settings:
    """What adapter_config.json says."""

    scalings: Scalings
    base_model: str | None
    ignored: tuple[str, ...]


def read_config(path: Path, ignore_fields: Collection[str]) -> Settings:
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
    return Settings(
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
