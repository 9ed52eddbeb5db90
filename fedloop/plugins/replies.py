"""From what an engine received to what the defence judges.

PEFT state dicts of torch tensors or NumPy arrays.

Nothing that a client sends raises here. What cannot be read stays an update, one that raises when
the defence looks at it: so it is counted with the others (a second one is a duplicate), gets factor
0, and its error is the reason in the record.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraprobe.adapters.adapter import Adapter, Kind, LazyPairs
from loraprobe.adapters.layout import Layout, pack
from loraprobe.adapters.pair import Factor, LoRAPair
from loraprobe.errors import AdapterFormatError

from ..checks import check_names
from ..defense.defense import Defense
from ..defense.screening import UNREADABLE
from ..defense.types import Assessment, ClientUpdate
from ..errors import ConfigError

Array = Tensor | np.ndarray
StateDict = Mapping[str, Array]

# What getting at a stranger's arrays can raise: lookups, truncated buffers, headers that claim more
# memory than there is.
BROKEN = (*UNREADABLE, LookupError, AttributeError, ArithmeticError, EOFError, MemoryError)
_PEFT = "base_model.model."
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight"
)


@dataclass(frozen=True)
class Reply:
    """What one client sent in one round, before any of it is believed.

    Attributes:
        client_id: who sent it, as the engine authenticated it; never a field the client filled in.
            A whole number counts as its decimal digits.
        num_examples: how many examples it says it used; of any type, what is no whole number is
            refused.
        state: PEFT key names -> arrays; or the error that getting at them raised, which becomes the
            reason.
        steps: evidence, factor deltas under PEFT key names that hold at least the modules the probe
            reads.
        kind: what `state` holds, "weights" or "factor_delta" (their change since the round's global
            ones).
    """

    client_id: str
    num_examples: Any
    state: StateDict | Exception
    steps: Sequence[StateDict] = ()
    kind: Kind = "weights"


@dataclass(frozen=True)
class LoRAOptions:
    """How PEFT state dicts are to be read; see `Adapter.from_state_dict`.

    Attributes:
        alpha: PEFT's lora_alpha.

    Raises:
        ConfigError: a value is not valid.
    """

    alpha: float
    use_rslora: bool = False
    alpha_pattern: Mapping[str, float] | None = None
    rank_pattern: Mapping[str, int] | None = None
    base_model: str | None = None

    def __post_init__(self) -> None:
        alpha = self.alpha
        if not isinstance(alpha, Real) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
            raise ConfigError(f"alpha: got {alpha!r}; expected PEFT's lora_alpha, a number above 0")
        if not isinstance(self.use_rslora, bool):
            raise ConfigError(f"use_rslora: got {self.use_rslora!r}; expected True or False")
        for name in ("alpha_pattern", "rank_pattern"):
            if not isinstance(getattr(self, name), Mapping | None):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}; expected name -> number")
        if not isinstance(self.base_model, str | None):
            raise ConfigError(f"base_model: got {self.base_model!r}; expected a name or None")

    @classmethod
    def of(cls, alpha: float, options: Mapping[str, Any]) -> LoRAOptions:
        """With some of the other fields.

        Raises:
            ConfigError: a field is unknown, or its value is not valid.
        """
        names = [field.name for field in fields(cls) if field.name != "alpha"]
        check_names("a LoRA has no option", options, names)
        return cls(alpha, **options)


class GlobalState:
    """The round's global state dict.

    What replies start from and are compared with, and how the next one is spelled.

    Args:
        state: PEFT key names, with or without "base_model.model." and whatever a framework puts
            before that, -> arrays.
        lora: how it is to be read.

    Attributes:
        state: the state dict as it was given.
        adapter: the same, kind "weights".
        layout: of a change of it, kind "factor_delta".

    Raises:
        AdapterFormatError, UnsupportedAdapterError, NonFiniteError: it is not a plain LoRA, or
            holds NaN or infinity.
    """

    def __init__(self, state: StateDict, lora: LoRAOptions) -> None:
        self._options = asdict(lora)
        self.adapter = self._read(state, "weights")
        self.state = dict(state)
        if self.adapter.ignored:
            raise AdapterFormatError(
                f"the global state holds {self.adapter.ignored[0]!r}, which is no LoRA factor;"
                " leave it out"
            )
        pack(self.adapter)  # raises for NaN and infinity
        layout = Layout.of(self.adapter)
        self.layout = Layout(layout.slots, layout.scalings, "factor_delta")
        self._keys = _keys(state)

    def update(self, reply: Reply, max_steps: int) -> ClientUpdate:
        """The reply as the defence takes it. It never raises.

        What cannot be read raises when the defence looks at it.

        Args:
            max_steps: steps that the defence allows; one more is read, for which it refuses the
                reply.
        """
        state = reply.state
        count = reply.num_examples
        steps = reply.steps
        if not isinstance(steps, Sequence):
            state = AdapterFormatError(
                f"got steps of type {type(steps).__name__}; expected a sequence of state dicts"
            )
            steps = ()
        if isinstance(state, Exception):
            count = 1  # whatever it is: the error is the reason
        evidence = tuple(self._readable(step, "factor_delta") for step in steps[: max_steps + 1])
        return ClientUpdate(reply.client_id, count, self._readable(state, reply.kind), evidence)

    def renamed(self, state: StateDict) -> dict[str, Any]:
        """The entries of an accepted reply as they are, under the keys of the global state and in
        their order.
        """
        keys = _keys(state)
        return {key: state[keys[place]] for place, key in self._keys.items()}

    def moved(self, change: Tensor) -> dict[str, Any]:
        """The global state plus a packed change (d,): its own keys, types and devices.

        Raises:
            NonFiniteError: the sum is not finite in a tensor's own type.
        """
        new = dict(self.state)
        for slot, part in zip(
            self.layout.slots,
            torch.split(change, [slot.size for slot in self.layout.slots]),
            strict=True,
        ):
            key = self._keys[slot.module, slot.factor]
            new[key] = _like(
                _tensor(key, self.state[key]).double() + part.view(slot.shape).double(),
                self.state[key],
            )
        self.check(new)
        return new

    def check(self, new: StateDict) -> None:
        """Raise unless a successor of this state is finite, and of its modules.

        Raises:
            AdapterFormatError, LayoutMismatch, NonFiniteError: it is not.
        """
        pack(self._read(new, "weights"), Layout.of(self.adapter))

    def _read(self, state: StateDict, kind: Kind) -> Adapter:
        if not isinstance(state, Mapping):
            raise AdapterFormatError(
                f"got a state dict of type {type(state).__name__}; expected PEFT key names ->"
                " arrays"
            )
        tensors: dict[str, Tensor] = {}
        for key, value in state.items():
            name = without_prefix(key)
            if name in tensors:
                raise AdapterFormatError(
                    f"{name!r} occurs twice, under different prefixes; expected it once"
                )
            tensors[name] = _tensor(key, value)
        return Adapter.from_state_dict(tensors, kind=kind, **self._options)

    def _readable(self, state: StateDict | Exception, kind: Kind) -> Adapter:
        """The adapter, or one of the same modules that raises, whichever is asked for, what
        reading it raised.
        """
        try:
            if isinstance(state, Exception):
                raise state
            return self._read(state, kind)
        except BROKEN as error:
            refusal = (
                error
                if isinstance(error, UNREADABLE)
                else AdapterFormatError(f"unreadable: {error!r}")
            )
            return Adapter(LazyPairs(self.adapter, _raiser(refusal)), kind=kind)


def assess(
    defense: Defense,
    number: int,
    replies: Iterable[Reply],
    start: GlobalState,
    expected: Iterable[str] | None = None,
) -> Assessment:
    """Read and judge a round's replies.

    Args:
        number: of the round, from 1, rising.
        expected: the clients that were asked; one that sent nothing gets the reason "missing", one
            that was not asked is refused. None: not known.

    Raises:
        EvidenceError: the round was assessed already, or a client id is neither text nor a whole
            number.
    """
    updates = [start.update(reply, defense.limits.max_steps) for reply in replies]
    return defense.assess(number, updates, start=start.adapter, expected=expected)


def _tensor(key: str, value: Array) -> Tensor:
    if isinstance(value, np.ndarray):
        contiguous = np.ascontiguousarray(value)
        value = torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())
    if not isinstance(value, Tensor):
        raise AdapterFormatError(
            f"{key}: got a value of type {type(value).__name__}; expected a torch tensor or NumPy"
            " array"
        )
    return value.detach().cpu()


def _like(values: Tensor, old: Array) -> Array:
    if isinstance(old, np.ndarray):
        with np.errstate(over="ignore"):  # beyond the type becomes infinite, which is refused
            return values.numpy().astype(old.dtype)
    return values.to(device=old.device, dtype=old.dtype)


def without_prefix(key: str) -> str:
    """A key from PEFT's own prefix on: frameworks that wrap the model put more before it."""
    if not isinstance(key, str):
        raise AdapterFormatError(f"got a key of type {type(key).__name__}; expected PEFT key names")
    return key[max(key.find(_PEFT), 0) :]


def _keys(state: StateDict) -> dict[tuple[str, Factor], str]:
    """(module, factor) -> key, of a state dict that was read before."""
    matches = {key: _NAME.fullmatch(without_prefix(key)) for key in state}
    return {
        (match["module"], "A" if match["factor"] == "A" else "B"): key
        for key, match in matches.items()
        if match
    }


def _raiser(error: Exception) -> Callable[[str], LoRAPair]:
    def refuse(module: str) -> LoRAPair:
        raise error

    return refuse
