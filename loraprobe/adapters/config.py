"""adapter_config.json: what it may say of plain LoRA, and what it says of this adapter.

Whatever would change the model in another way than by B @ A (DoRA, trained biases, whole modules,
routing between adapters) is refused by name: a score of half an adapter would be a score of
something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AdapterFormatError, UnsupportedAdapterError, quoted
from ..limits import ADAPTER_CONFIG
from .selection import Expressions, Patterns, Selection
from .strict_json import is_finite_number, read_json

CONFIG_NAME = "adapter_config.json"
MAX_NAME = 500
FROM_MLX = (
    "its matrices are the other way round: save X.lora_a transposed as"
    " base_model.model.X.lora_A.weight, X.lora_b likewise, with an adapter_config.json of PEFT"
    " whose lora_alpha is mlx-lm's scale times the rank"
)

# Fields of PEFT's LoraConfig that leave B @ A and its scaling as they are, whatever they hold, or
# that are read here.
_KNOWN = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode"
    " r target_modules exclude_modules lora_alpha lora_dropout use_rslora layers_to_transform"
    " layers_pattern rank_pattern alpha_pattern megatron_core qalora_group_size runtime_config"
    " init_lora_weights bias parent_library".split()
)
# What changes nothing that is read here, and is reported: how training was set up (PEFT, ms-swift,
# Unsloth), where the initialisation that it belongs to was not used, notes.
_REPORTED = frozenset(
    "fan_in_fan_out ensure_weight_tying eva_config corda_config lora_ga_config loftq_config"
    " megatron_config lora_dtype lorap_lr_ratio lorap_emb_lr".split()
)
_WHY = {
    "use_dora": "DoRA also rescales the base weight",
    "lora_bias": "the biases of B are trained too",
    "modules_to_save": "whole modules of the base are replaced",
    "trainable_token_indices": "rows of the embedding are replaced",
    "target_parameters": "fused experts: one pair holds a product for every expert",
    "alora_invocation_tokens": "it acts on the tokens after these only",
    "arrow_config": "it is mixed from several adapters",
    "layer_replication": "layers of the base are repeated",
    "use_qalora": "QALoRA pools the inputs of A",
}
# init_lora_weights: those that start from B = 0, and those that also take part of the base away.
_ZERO_B = ("true", "none", "gaussian", "eva")
_OTHER_B = ("false", "orthogonal", "mica")
_MOVE_BASE = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga", re.ASCII)


@dataclass(frozen=True)
class Scalings:
    """What PEFT's configuration says about alpha and rank, per module."""

    alpha: float
    rank: int | None = None
    use_rslora: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in self.rank_pattern.values():
            if type(rank) is not int or rank < 1:
                raise AdapterFormatError(
                    f"got rank {_shown(rank)} in rank_pattern; expected a whole number of at"
                    " least 1"
                )
        for value in (self.alpha, *self.alpha_pattern.values()):
            if not is_finite_number(value) or value == 0:
                raise AdapterFormatError(
                    f"got alpha {_shown(value)}; expected a finite number other than 0"
                )
        expressions = Expressions()
        object.__setattr__(self, "_alphas", Patterns(self.alpha_pattern, expressions))
        object.__setattr__(self, "_ranks", Patterns(self.rank_pattern, expressions))

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732), of one module."""
        alphas: Patterns = self._alphas  # type: ignore[attr-defined]
        ranks: Patterns = self._ranks  # type: ignore[attr-defined]
        expected = ranks.value(module, self.rank)
        if expected is not None and expected != rank:
            raise AdapterFormatError(
                f"the configuration says rank {expected}, the tensors have {rank}: they do not"
                " belong together"
            )
        alpha: float = alphas.value(module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says.

    Attributes:
        selects: whether PEFT puts a LoRA on the module of this path; None for a bare file.
        zero_start: whether B was zero when training started.
        moves_base: whether the start also took part of the base's weights away.
        ignored: fields that are set and change nothing.
        base_revision: of the base model.
    """

    scalings: Scalings
    selects: Callable[[str], bool] | None = None
    base_model: str | None = None
    zero_start: bool = True
    moves_base: bool = False
    ignored: tuple[str, ...] = ()
    base_revision: str | None = None


def read_config(path: Path, ignore_fields: Collection[str] = ()) -> Settings:
    """Check adapter_config.json against what plain LoRA may say.

    Args:
        ignore_fields: unknown fields that are known to be harmless.

    Raises:
        AdapterFormatError: it is no JSON object, or a field has a value that is not valid.
        UnsupportedAdapterError: it says something other than plain LoRA.
    """
    try:
        return _settings(_json_object(path), ignore_fields)
    except AdapterFormatError as error:
        raise type(error)(f"{path}: {error}") from None


def _settings(config: Mapping[str, Any], ignore_fields: Collection[str]) -> Settings:
    if "fine_tune_type" in config or "lora_parameters" in config:
        raise UnsupportedAdapterError(f"this is the configuration of mlx-lm; {FROM_MLX}")
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapterError(
            f"got peft_type {_shown(config.get('peft_type'))}; expected 'LORA'"
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapterError(
            f"got bias {_shown(config['bias'])}: biases of the base were trained too; expected"
            " 'none'"
        )
    zero_start, moves_base = _start(config.get("init_lora_weights", True))
    harmless = _REPORTED | set(ignore_fields)
    _refuse_unknown(config, harmless)
    rank = config.get("r")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterFormatError(f"got r = {_shown(rank)}; expected a whole number of at least 1")
    rslora = config.get("use_rslora")
    if not isinstance(rslora, bool | None):
        raise AdapterFormatError(f"got use_rslora {_shown(rslora)}; expected true or false")
    patterns = {name: _pattern(config, name) for name in ("alpha_pattern", "rank_pattern")}
    alpha: Any = config.get("lora_alpha")
    notes = {name for name in config if name.startswith("_")} | harmless
    return Settings(
        Scalings(alpha, rank, bool(rslora), **patterns),
        Selection.of_config(config).selector(Expressions()),
        _name(config, "base_model_name_or_path"),
        zero_start,
        moves_base,
        tuple(name for name in sorted(notes) if config.get(name)),
        _name(config, "revision"),
    )


def _start(init: object) -> tuple[bool, bool]:
    """Of init_lora_weights: whether B was zero at the start, and whether the base was changed."""
    name = str(init).lower()
    if isinstance(init, bool | str | None):
        if name in _ZERO_B or name in _OTHER_B:
            return name in _ZERO_B, False
        if _MOVE_BASE.fullmatch(name):
            return False, True
    raise UnsupportedAdapterError(
        f"got init_lora_weights {_shown(init)}; expected true, false, 'gaussian', 'eva',"
        " 'orthogonal', 'mica', 'pissa', 'olora', 'corda', 'loftq' or 'lora_ga'"
    )


def _refuse_unknown(config: Mapping[str, Any], harmless: Collection[str]) -> None:
    unknown = [
        name
        for name, value in config.items()
        if value and name not in _KNOWN and name not in harmless and not name.startswith("_")
    ]
    if unknown:
        fields = ", ".join(
            f"{quoted(name)} = {_shown(config[name])}"
            + (f" ({_WHY[name]})" if name in _WHY else "")
            for name in unknown[:10]
        )
        raise UnsupportedAdapterError(
            f"got {fields}: not plain LoRA, or unknown here. If you know that it does not change"
            f" B @ A, take it out of a copy of {CONFIG_NAME}"
        )


def _pattern(config: Mapping[str, Any], name: str) -> Any:
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise AdapterFormatError(
            f"got {name} of type {type(value).__name__}; expected an object of module names"
        )
    return value or {}


def _name(config: Mapping[str, Any], field: str) -> str | None:
    value = config.get(field)
    if value is not None and not isinstance(value, str):
        raise AdapterFormatError(f"got {field} of type {type(value).__name__}; expected text")
    if value and (len(value) > MAX_NAME or not value.isprintable()):
        raise AdapterFormatError(
            f"got {field} {_shown(value)}; expected at most {MAX_NAME} printable characters"
        )
    return value or None


def _json_object(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(ADAPTER_CONFIG + 1)
    if len(text) > ADAPTER_CONFIG:
        raise AdapterFormatError(f"it has more bytes; expected at most {ADAPTER_CONFIG}")
    if text.startswith(b"\xef\xbb\xbf"):
        raise AdapterFormatError(
            "it starts with a byte order mark, which PEFT does not read either; save it as UTF-8"
            " without one"
        )
    try:
        # PEFT writes NaN as NaN; the numbers that count are checked where they are used.
        value = read_json(text, finite=False)
    except ValueError as error:
        comma = re.search(rb",\s*[}\]]", text)
        raise AdapterFormatError(
            f"not readable JSON: {error}"
            + (". Take out the comma before the closing bracket" if comma else "")
        ) from None
    if not isinstance(value, dict):
        raise AdapterFormatError(f"it holds a JSON {type(value).__name__}; expected an object")
    return value


def _shown(value: object) -> str:
    return quoted(repr(value))
