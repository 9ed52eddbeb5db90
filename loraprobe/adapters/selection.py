"""Which modules a configuration selects, as PEFT selects them.

PEFT puts a LoRA on the modules that target_modules, exclude_modules, layers_to_transform and
layers_pattern name, and drops every other tensor of the file without a word. Patterns are regular
expressions of a stranger: they are run by a library that gives up after a time.

Source: `check_target_module_exists` and `get_pattern_key` of PEFT 0.21.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterFormatError, UnsupportedAdapterError, quoted

SECONDS = 2.0
"""For all patterns of one configuration on all modules of one file."""

_PLAIN = re.compile(r"\w+(\.\w+)*", re.ASCII)
# Of an expression, what the two libraries read alike: no fuzzy matching, no named lists, no
# options, no properties of characters.
_COMMON = re.compile(
    r"(?:[^\\{}]|\\[dDwWsSbB.\\^$|()\[\]{}*+?/_-]|\{[0-9]{1,3}(?:,[0-9]{0,3})?\})+"
)
_OTHER = re.compile(r"\(\?(?!:|=|!|<=|<!)|\[\[|--|&&|~~|\|\|")
_ALL_LINEAR = "all-linear"
_HEADS = frozenset({"lm_head", "embed_out", "output_layer", "score", "classifier"})


class Expressions:
    """Regular expressions of one configuration, with a limit on the time that they take."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._left = seconds
        self._compiled: dict[str, Any] = {}

    def match(self, pattern: str, text: str, form: str = "(?:{})$") -> Any:
        """The match of a pattern, put into a form, with a text from its start on; or None.

        Raises:
            UnsupportedAdapterError: the pattern cannot be run, or takes too long.
        """
        import regex  # only where a pattern is more than a name

        whole = form.replace("{}", pattern)
        if whole not in self._compiled:
            check_expression(pattern)
            self._compiled[whole] = regex.compile(whole)
        began = time.perf_counter()
        try:
            return self._compiled[whole].match(text, timeout=max(self._left, 1e-3))
        except TimeoutError:
            raise UnsupportedAdapterError(
                f"the pattern {quoted(repr(pattern))} takes too long to compare with the"
                " module names; write the names out in adapter_config.json"
            ) from None
        finally:
            self._left -= time.perf_counter() - began


def check_expression(pattern: str) -> None:
    """Raise UnsupportedAdapterError for a pattern that is not run."""
    try:
        readable = bool(_COMMON.fullmatch(pattern)) and not _OTHER.search(pattern)
        if readable:
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        readable = False
    if not readable or len(pattern) > 1000:
        raise UnsupportedAdapterError(
            f"got the pattern {quoted(repr(pattern))}; expected a module name or a regular"
            " expression without options, back references or named groups. Write the names out in"
            " adapter_config.json"
        )


def endings(module: str) -> Iterable[str]:
    """A module's path and its ends after each dot, from the longest on."""
    yield module
    at = module.find(".")
    while at >= 0:
        yield module[at + 1 :]
        at = module.find(".", at + 1)


class Patterns:
    """PEFT's rank_pattern or alpha_pattern: a value for the modules that the first key matches.

    A key is a regular expression that the module's path is, or ends with after a dot.

    Raises:
        UnsupportedAdapterError: a key cannot be run.
    """

    def __init__(self, values: Mapping[str, Any], expressions: Expressions) -> None:
        self._values = dict(values)
        self._expressions = expressions
        for key in self._values:
            check_expression(key)

    def value(self, module: str, default: Any) -> Any:
        """The value for a module, or the default."""
        ends = set(endings(module)) if self._values else set()
        for key, value in self._values.items():
            if key in ends or (
                not _PLAIN.fullmatch(key)
                and self._expressions.match(key, module, r"(?:.*\.)?(?:{})$")
            ):
                return value
            if "." in key and _PLAIN.fullmatch(key) and _dotted(key, module):
                return value
        return default


def _dotted(key: str, module: str) -> bool:
    """Whether a plain key matches with its dots for any character, as they are in an expression."""
    start = len(module) - len(key)
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return False
    return all(wanted in (".", got) for wanted, got in zip(key, module[start:], strict=True))


@dataclass(frozen=True)
class Selection:
    """The fields of adapter_config.json that say where the LoRA goes.

    Attributes:
        target_modules: names, or one regular expression for the whole path, or "all-linear".
        exclude_modules: likewise; they win.
        layers_to_transform: numbers of layers; None for all.
        layers_pattern: what stands before the number of a layer; empty for anything.
    """

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Selection:
        """Read the four fields.

        Raises:
            AdapterFormatError: target_modules is missing, or a field is of a type, or a
                combination, that PEFT does not take.
        """
        target = _names(config, "target_modules")
        if not target:
            raise AdapterFormatError(
                "got no target_modules: PEFT would choose by the type of the base model. Write the"
                " names of the modules into adapter_config.json, as save_pretrained does"
            )
        layers = config.get("layers_to_transform")
        if isinstance(layers, int) and not isinstance(layers, bool):
            layers = [layers]
        if layers is not None and not (
            isinstance(layers, list) and all(type(layer) is int for layer in layers)
        ):
            raise AdapterFormatError(
                f"got layers_to_transform {quoted(layers)}; expected a whole number or a list of"
                " them"
            )
        pattern = _names(config, "layers_pattern")
        if isinstance(target, str) and (layers is not None or pattern):
            raise AdapterFormatError(
                "got layers_to_transform or layers_pattern beside a target_modules that is one"
                " expression; PEFT takes them with a list of names only"
            )
        if pattern and layers is None:
            raise AdapterFormatError(
                "got layers_pattern without layers_to_transform; PEFT takes it with them only"
            )
        return cls(
            target,
            _names(config, "exclude_modules"),
            tuple(layers) if layers else None,
            (pattern,) if isinstance(pattern, str) else pattern,
        )

    def selector(self, expressions: Expressions) -> Callable[[str], bool]:
        """A function of a module's path: whether PEFT puts a LoRA there.

        Raises:
            UnsupportedAdapterError: an expression cannot be run; when called, takes too long.
        """
        excluded = _member(self.exclude_modules, expressions)
        target = self.target_modules
        if isinstance(target, str) and target.lower() == _ALL_LINEAR:
            return lambda module: module not in _HEADS and not excluded(module)
        named = _member(target, expressions)

        def selects(module: str) -> bool:
            if excluded(module) or not named(module):
                return False
            if self.layers_to_transform is None or module in target:
                return True
            return self._layer(module, expressions) in self.layers_to_transform

        return selects

    def _layer(self, module: str, expressions: Expressions) -> int | None:
        """The first number after the pattern, or after anything if there is none."""
        if not self.layers_pattern:
            match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
            return int(match["idx"]) if match else None
        for pattern in self.layers_pattern:
            match = expressions.match(pattern, module, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
            if match:
                return None if match["idx"] is None else int(match["idx"])
        return None


def _member(names: str | tuple[str, ...], expressions: Expressions) -> Callable[[str], bool]:
    if isinstance(names, str):
        if names:
            check_expression(names)
        return lambda module: bool(names) and bool(expressions.match(names, module))
    members: Collection[str] = frozenset(names)
    if not members:
        return lambda module: False
    return lambda module: any(end in members for end in endings(module))


def _names(config: Mapping[str, Any], field: str) -> str | tuple[str, ...]:
    value = config.get(field)
    if value is None:
        return ()
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise AdapterFormatError(f"got {field} {quoted(value)}; expected a name or a list of names")
