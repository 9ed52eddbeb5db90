"""Names of tensors as PEFT writes them, and names that other tools write.

Only plain LoRA of linear layers is read. Names, shapes, types and ranks of every module are looked
at before any number is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from ..errors import AdapterFormatError, UnsupportedAdapterError, quoted
from .config import FROM_MLX, MAX_NAME, Scalings
from .pair import Array, LazyTensor, LoRAPair

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = ("float32", "float16", "bfloat16", "float64")
_ENDINGS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
# What PEFT, DistributedDataParallel and torch.compile put in front, in any order and number.
_PREFIXES = ("base_model.model.", "module.", "_orig_mod.")
_FUSED = frozenset({"experts", "base_layer"})
# Names of tensors, the tool that writes them, and how to get PEFT's.
_TOOLS = (
    (
        # networks/lora*.py: prefix + the module's path with _ for ., one dot, and any of lora_down,
        # lora_up, lora_mid, alpha, dora_scale, hada_*, lokr_*, oft_*; numbered where qkv is split.
        re.compile(r"lora_(?:unet|te\d?|flux|transformer)_[^.]+\..+"),
        "kohya-ss sd-scripts",
        "it adapts an image model; load it with diffusers and save it with save_lora_adapter",
    ),
    (
        re.compile(r"(?:unet|text_encoder(?:_2)?|transformer\.(?:\w+_)?transformer_blocks)\..*"),
        "diffusers",
        "it adapts an image model; no probe here reads it",
    ),
    (
        re.compile(r".*\.lora\.(?:down|up)\.weight|.*_lora\.(?:down|up)\.weight"),
        "diffusers",
        "it adapts an image model; no probe here reads it",
    ),
    (
        re.compile(r".*\.lora_[ab]\.weight"),
        "torchtune",
        "let torchtune's checkpointer write adapter_model.safetensors (save_adapter_weights_only)",
    ),
    (
        re.compile(r".*\.lora_[ab]"),
        "mlx-lm",
        FROM_MLX,
    ),
)


def pairs_from_tensors(
    tensors: Mapping[str, Array | Tensor | LazyTensor],
    scalings: Scalings,
    selects: Callable[[str], bool] | None = None,
) -> tuple[dict[str, LoRAPair], tuple[str, ...]]:
    """PEFT's tensor names -> pairs by module path, and the names that were safely left out.

    Args:
        selects: whether PEFT puts a LoRA on a module; it drops the tensors of others.

    Raises:
        AdapterFormatError: a factor is missing, occurs twice, or is not of the shape, type or rank
            that it should be.
        UnsupportedAdapterError: a name is not one of plain LoRA, or a module is not selected.
    """
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise AdapterFormatError(
            f"got {type(tensors).__name__}; expected a state dict, name -> tensor, as"
            " peft.get_peft_model_state_dict(model) returns it"
        )
    keys, ignored = _keys_by_module(tensors)
    if selects is not None:
        _refuse_unselected(keys, selects)
    pairs = {
        module: _pair(module, tensors[by_factor["A"]], tensors[by_factor["B"]], scalings)
        for module, by_factor in keys.items()
    }
    return pairs, ignored


def _keys_by_module(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Module path -> factor -> name of its tensor; and the names that were left out."""
    keys: dict[str, dict[str, str]] = {}
    ignored: list[str] = []
    adapter_names: set[str] = set()
    for key in names:
        if len(key) > MAX_NAME:
            raise AdapterFormatError(
                f"got a tensor named {quoted(repr(key))}; expected a name of at most {MAX_NAME}"
                " characters"
            )
        if key.endswith("rotary_emb.inv_freq"):
            ignored.append(key)  # a buffer computed from the base's configuration
            continue
        module, factor, name = _parse_key(key)
        adapter_names.add(name)
        by_factor = keys.setdefault(module, {})
        if factor in by_factor:
            raise AdapterFormatError(
                f"{module}: lora_{factor} occurs twice, with and without a prefix; expected it once"
            )
        by_factor[factor] = key
    if len(adapter_names) > 1:
        shown = ", ".join(map(repr, sorted(adapter_names)[:5]))
        raise AdapterFormatError(
            f"got {len(adapter_names)} adapters in one state dict ({shown}); expected one"
        )
    for module, by_factor in keys.items():
        if len(by_factor) == 1:
            raise AdapterFormatError(
                f"{module}: only lora_{next(iter(by_factor))} is there; expected lora_A and lora_B"
            )
    return keys, tuple(ignored)


def _refuse_unselected(modules: Iterable[str], selects: Callable[[str], bool]) -> None:
    unselected = [module for module in modules if not selects(module)]
    if unselected:
        shown = ", ".join(quoted(module, 200) for module in sorted(unselected)[:5])
        raise UnsupportedAdapterError(
            f"the file holds {len(unselected)} modules that adapter_config.json does not select"
            f" ({shown}{', ...' if len(unselected) > 5 else ''}); PEFT would leave their tensors"
            " out without a word. Take them out of the file, or select them with target_modules,"
            " exclude_modules and layers_to_transform"
        )


def _pair(
    module: str,
    a: Array | Tensor | LazyTensor,
    b: Array | Tensor | LazyTensor,
    scalings: Scalings,
) -> LoRAPair:
    for factor, tensor in (("A", a), ("B", b)):
        where = f"{module}, lora_{factor}"
        if not isinstance(tensor, LazyTensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _FLOATS:
                raise AdapterFormatError(
                    f"{where}: got dtype {dtype}; expected {', '.join(_FLOATS[:-1])} or"
                    f" {_FLOATS[-1]}"
                )
        if 0 in tensor.shape:
            raise AdapterFormatError(
                f"{where}: got the empty shape {tuple(tensor.shape)}, as DeepSpeed ZeRO-3 leaves"
                " behind. Save the adapter with its parameters gathered"
                " (stage3_gather_16bit_weights_on_model_save)"
            )
        if len(tensor.shape) > 2:
            raise UnsupportedAdapterError(
                f"{where}: got shape {tuple(tensor.shape)}: this adapts a convolution; expected"
                " matrices of linear layers"
            )
    try:
        return LoRAPair(a, b, scalings.scaling(module, LoRAPair(a, b).rank))
    except UnsupportedAdapterError:
        raise
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{module}: {error}") from None


def _parse_key(key: str) -> tuple[str, str, str]:
    """(module path, "A" or "B", adapter name) of a PEFT tensor name."""
    factor = _ENDINGS.get(key[-14:])  # how nearly every name ends; an adapter can have hundreds
    if factor and len(key) > 14:
        return _module(key, key[:-14]), factor, ""
    head, separator, tail = key.rpartition(".lora_")
    parts = tail.split(".")  # "A.weight" or "A.default.weight"
    if (
        not separator
        or parts[0] not in ("A", "B")
        or parts[-1] != "weight"
        or len(parts) > 3
        or not head
    ):
        raise UnsupportedAdapterError(
            f"{quoted(key, 200)}: {_what_is(key)}; expected nothing but lora_A.weight and"
            " lora_B.weight of linear layers"
        )
    return _module(key, head), parts[0], parts[1] if len(parts) == 3 else ""


def _module(key: str, path: str) -> str:
    """The module's path in the base model, without what wrappers put around it."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if path.startswith(prefix):
                path = path[len(prefix) :]
                stripped = True
    path = path.replace("._orig_mod.", ".")
    if not _FUSED.isdisjoint(path.split(".")[-2:]):
        raise UnsupportedAdapterError(
            f"{quoted(key, 200)}: these are fused experts (target_parameters), of which one pair"
            " holds a product for every expert; expected linear layers"
        )
    if (tool := tool_of(path + ".")) is not None:
        raise UnsupportedAdapterError(f"{quoted(key, 200)}: {tool}")
    return path


def tool_of(key: str) -> str | None:
    """Which other tool writes a tensor of that name, and how to get PEFT's; None if none does."""
    for pattern, tool, advice in _TOOLS:
        if pattern.fullmatch(key):
            return f"this is a name of {tool}; {advice}"
    return None


def _what_is(key: str) -> str:
    if (tool := tool_of(key)) is not None:
        return tool
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
