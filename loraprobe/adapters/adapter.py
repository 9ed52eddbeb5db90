"""LoRA adapters as values: all adapted modules of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from ..errors import AdapterFormatError, NonFiniteError, require
from .pair import Array, Factor, LoRAPair

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["weights", "factor_delta", "weight_delta"]
KINDS: tuple[str, ...] = get_args(Kind)
FACTORS: tuple[Factor, ...] = get_args(Factor)


class LazyPairs(Mapping[str, LoRAPair]):
    """Pairs that are made when they are asked for: a file's header can name hundreds of modules."""

    def __init__(self, modules: Collection[str], make: Callable[[str], LoRAPair]) -> None:
        self._pairs: dict[str, LoRAPair | None] = dict.fromkeys(sorted(modules))
        self._make = make

    def __getitem__(self, module: str) -> LoRAPair:
        pair = self._pairs[module]
        if pair is None:
            pair = self._pairs[module] = self._make(module)
        return pair

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, module: object) -> bool:
        return module in self._pairs


@dataclass(frozen=True)
class Origin:
    """What a factor delta was taken of, by which it is a change of the weights too.

    Attributes:
        adapter: of kind "weights".
        trained: whether it is the adapter after training, whose B was zero before; else it is the
            adapter before training.
    """

    adapter: Adapter
    trained: bool = False


class Adapter(Mapping[str, LoRAPair]):
    """Module path -> LoRAPair, in sorted order; immutable.

    Args:
        pairs: the adapted modules, named as in the base model ("model.layers.0.self_attn.q_proj").
        kind: "weights" as trained, "factor_delta" (A_t - A_0, B_t - B_0) or "weight_delta"
            (the factors of s (B_t A_t - B_0 A_0)). See `factor_delta` and `weight_delta`.
        base_model: the Hub id or path of the base model, if it is known.
        base_revision: the commit, tag or branch of it that adapter_config.json states.
        ignored: what the file held that does not change the adapter and was left out.
        commit: the Hub commit it was loaded from, if it came from there; a delta has none.
        origin: of a factor delta, what it was taken of, where that is known.
        zero_start: whether B was zero when training started, as far as that is known.
        moves_base: whether the initialisation also took part of the base's weights away (PiSSA,
            OLoRA), so that B @ A is not the change of the published base.
        selects: whether adapter_config.json selects the module of a path; None without one.

    Raises:
        AdapterFormatError: there is no pair at all, or the kind is unknown.
    """

    __slots__ = (
        *("_pairs", "base_model", "base_revision", "commit", "ignored", "kind", "origin"),
        *("moves_base", "selects", "zero_start"),
    )

    def __init__(
        self,
        pairs: Mapping[str, LoRAPair],
        *,
        kind: Kind = "weights",
        base_model: str | None = None,
        ignored: tuple[str, ...] = (),
        commit: str | None = None,
        origin: Origin | None = None,
        zero_start: bool = True,
        moves_base: bool = False,
        selects: Callable[[str], bool] | None = None,
        base_revision: str | None = None,
    ) -> None:
        if not pairs:
            raise AdapterFormatError(
                "got an adapter without a single LoRA module; expected at least one lora_A / lora_B"
                " pair"
            )
        if kind not in KINDS:
            raise AdapterFormatError(f"got kind {kind!r}; expected one of {', '.join(KINDS)}")
        self._pairs = (
            pairs
            if isinstance(pairs, LazyPairs)
            else {module: pairs[module] for module in sorted(pairs)}
        )
        self.kind: Kind = kind
        self.base_model = base_model
        self.base_revision = base_revision
        self.ignored = ignored
        self.commit = commit
        self.zero_start = zero_start
        self.moves_base = moves_base
        self.selects = selects
        self.origin = origin

    def since(self, start: Adapter) -> Adapter:
        """The same factor delta, knowing the adapter that training started from."""
        return self.with_pairs(self._pairs, origin=Origin(start))

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor | Array],
        *,
        alpha: float,
        use_rslora: bool = False,
        alpha_pattern: Mapping[str, float] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        base_model: str | None = None,
        kind: Kind = "weights",
    ) -> Adapter:
        """Read PEFT key names; `peft.get_peft_model_state_dict(model)` works as it is.

        Args:
            state_dict: names -> torch tensors or NumPy arrays.

        Raises:
            AdapterFormatError: a factor is missing, mis-shaped or not floating point, or the rank
                is not the one rank_pattern names.
            UnsupportedAdapterError: a key belongs to something other than plain LoRA.
        """
        from .config import Scalings
        from .peft import pairs_from_tensors

        scalings = Scalings(
            alpha=alpha,
            use_rslora=use_rslora,
            alpha_pattern=alpha_pattern or {},
            rank_pattern=rank_pattern or {},
        )
        pairs, ignored = pairs_from_tensors(state_dict, scalings)
        return cls(pairs, kind=kind, base_model=base_model, ignored=ignored)

    def state_dict(self) -> dict[str, Tensor]:
        """PEFT key names -> torch tensors: what `from_state_dict` and PEFT itself read."""
        require("torch", "fed", "A state dict of tensors")
        import torch

        return {name: torch.from_numpy(array) for name, array in self.arrays().items()}

    def arrays(self) -> dict[str, Array]:
        """PEFT key names -> contiguous, writeable arrays of float32 or float64."""
        return {
            f"base_model.model.{module}.lora_{factor}.weight": np.require(
                pair.factor(factor), requirements=["C", "W"]
            )
            for module, pair in self._pairs.items()
            for factor in FACTORS
        }

    def load(self) -> Adapter:
        """The same adapter with every tensor read into memory."""
        pairs = {
            module: LoRAPair(pair.A, pair.B, pair.scaling) for module, pair in self._pairs.items()
        }
        return Adapter(
            pairs,
            kind=self.kind,
            base_model=self.base_model,
            ignored=self.ignored,
            commit=self.commit,
            origin=self.origin,
            zero_start=self.zero_start,
            moves_base=self.moves_base,
            selects=self.selects,
            base_revision=self.base_revision,
        )

    def check_finite(self, but: Collection[str] = ()) -> None:
        """Read every number, one matrix at a time.

        Args:
            but: modules that are checked elsewhere.

        Raises:
            NonFiniteError: a factor holds NaN or infinity; it names the module.
        """
        for module in self:
            for factor in FACTORS if module not in but else ():
                finite(self, module, factor)

    def with_pairs(
        self,
        pairs: Mapping[str, LoRAPair],
        kind: Kind | None = None,
        origin: Origin | None = None,
    ) -> Adapter:
        """Other pairs, and of the rest what still holds for them."""
        return Adapter(
            pairs,
            kind=kind or self.kind,
            base_model=self.base_model,
            ignored=self.ignored,
            origin=origin,
            selects=self.selects,
            base_revision=self.base_revision,
        )

    def __getitem__(self, module: str) -> LoRAPair:
        return self._pairs[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, module: object) -> bool:
        return module in self._pairs

    __eq__ = object.__eq__  # a Mapping would compare tensors element by element
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        ranks = sorted({pair.rank for pair in self._pairs.values()})
        return (
            f"Adapter({len(self)} modules, kind={self.kind!r}, ranks={ranks},"
            f" base_model={self.base_model!r})"
        )


def expect_adapter(value: object) -> None:
    """Raise AdapterFormatError for what is no adapter: a path, a state dict, nothing."""
    if not isinstance(value, Adapter):
        raise AdapterFormatError(
            f"got {type(value).__name__}; expected an Adapter. load_adapter reads one from a path"
            " or the Hub, Adapter.from_state_dict makes one of a state dict"
        )


def finite(adapter: Adapter, module: str, factor: Factor) -> Array:
    """One factor, read and checked.

    Raises:
        NonFiniteError: it holds NaN or infinity, or a number that is infinite in float32.
    """
    array = adapter[module].factor(factor)
    with np.errstate(over="ignore"):
        good = np.isfinite(array.astype(np.float32, copy=False))
    if not good.all():
        raise NonFiniteError(
            f"{module}, lora_{factor}: {int((~good).sum())} of {array.size} values are NaN or"
            " infinite; expected finite float32 numbers. Training diverged or the file is damaged:"
            " do not use this adapter."
        )
    return array
