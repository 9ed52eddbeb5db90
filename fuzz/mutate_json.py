"""Edits of a JSON document.

Values of other types and sizes, keys twice, numbers that no float holds, nesting, text of every
kind.

An edit works on the parsed document. What Python would not write (1e400, a key twice) is put in as
a marked string, and the marks are taken out of the text. A document that does not parse any more is
damaged as bytes instead.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .mutate_bytes import Mutation, set_bytes

Json = Any
Edit = Callable[[Json, np.random.Generator], Json]

_RAW, _TWICE = "@raw:", "@twice:"


def raw(text: str) -> str:
    """A value that stands in the file as this text, without quotes."""
    return _RAW + text.encode("utf-16-le", "surrogatepass").hex() + "@"


def dumps(document: Json) -> bytes:
    """JSON text of a document with marks in it."""
    text = json.dumps(document, ensure_ascii=False).replace('"' + _TWICE, '"')
    text = re.sub(
        rf'"{_RAW}([0-9a-f]*)@"',
        lambda found: bytes.fromhex(found[1]).decode("utf-16-le", "surrogatepass"),
        text,
    )
    return text.encode("utf-8", "surrogatepass")


NUMBERS: tuple[Json, ...] = (
    0,
    1,
    -1,
    2,
    7,
    255,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    -(10**400),
    raw("9" * 5000),
    0.0,
    raw("-0"),
    -0.0,
    0.1,
    0.5,
    1.0,
    1.5,
    -2.5,
    1e-6,
    1e-40,
    5e-324,
    1e30,
    3.4e38,
    1e39,
    -1e39,
    1e300,
    1.7e308,
    raw("1e400"),
    raw("-1e400"),
    raw("1e-400"),
    raw("NaN"),
    raw("Infinity"),
    raw("-Infinity"),
    raw("01"),
    raw("+1"),
    raw(".5"),
    raw("1."),
    raw("1_0"),
    raw("0x10"),
)
TEXTS: tuple[Json, ...] = (
    "",
    " ",
    "0",
    "1",
    "-1",
    "1.0",
    "1E400",
    "nan",
    "true",
    "A",
    "B",
    "linear",
    "mlp",
    "xgboost",
    "pickle",
    "head.json",
    "head.safetensors",
    "../../../etc/passwd",
    "/etc/passwd",
    "org/base",
    "model.layers.0.self_attn.q_proj",
    "all",
    "first",
    "\0",
    "\x1b[2J\x1b[31m",
    "\r\n",
    "\u202e",
    "Ärger",
    "\U0001f600",
    "x" * 10_000,
    "(a+)+$",
    "%s%n{0}",
    raw('"\\ud800"'),
    raw('"\\udc00x"'),
    raw('"\\u0000"'),
    raw('"\\x"'),
    raw("'a'"),
    raw('"a\nb"'),
)
SHAPES: tuple[Json, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [0],
    ["q_proj"],
    {"a": 1},
    [[0, 1], [2]],
    raw("[" * 40 + "]" * 40),
    raw("[" * 900 + "]" * 900),
    raw("[" * 100_000 + "]" * 100_000),
    raw('{"a":' * 40 + "1" + "}" * 40),
    raw("[" + "[]," * 20_000 + "[]]"),
    raw(""),
    raw(","),
)


def value(document: Json, rng: np.random.Generator) -> Json:
    """Some value replaced by one of any kind."""
    return _at(document, rng, lambda _: _pick(_pick((NUMBERS, TEXTS, SHAPES), rng), rng))


def number(document: Json, rng: np.random.Generator) -> Json:
    """Some number moved a little, turned round, or replaced by a number that is hard to hold."""
    return _at(document, rng, lambda old: _number(old, rng), lambda old: type(old) in (int, float))


def text(document: Json, rng: np.random.Generator) -> Json:
    """Some text replaced, cut, lengthened, or one of its characters changed.

    Numbers in text too.
    """

    def edit(old: str) -> Json:
        at = int(rng.integers(len(old) + 1))
        other = chr(int(rng.integers(1, 0x250)))
        tail = {0: other + old[at + 1 :], 1: other + old[at:], 2: old[at + 1 :], 3: "", 4: old}[
            int(rng.integers(5))
        ]
        return _pick(TEXTS, rng) if rng.random() < 0.4 else old[:at] + tail

    return _at(document, rng, edit, lambda old: isinstance(old, str))


def drop(document: Json, rng: np.random.Generator) -> Json:
    """A field or an item left out."""

    def edit(old: Json) -> Json:
        out = type(old)(old)
        del out[_pick(list(old) if isinstance(old, dict) else range(len(old)), rng)]
        return out

    return _at(document, rng, edit, lambda old: isinstance(old, dict | list) and bool(old))


def twice(document: Json, rng: np.random.Generator) -> Json:
    """A key with two values, or an item of a list once more."""

    def edit(old: Json) -> Json:
        if isinstance(old, list):
            at = int(rng.integers(len(old)))
            return old[:at] + [old[at]] + old[at:]
        key = _pick(list(old), rng)
        new = old[key] if rng.random() < 0.3 else _pick((*NUMBERS, *TEXTS, *SHAPES), rng)
        first = rng.random() < 0.5
        return {
            **({_TWICE + key: new} if first else {}),
            **old,
            **({} if first else {_TWICE + key: new}),
        }

    return _at(document, rng, edit, lambda old: isinstance(old, dict | list) and bool(old))


def rename(document: Json, rng: np.random.Generator) -> Json:
    """A key called otherwise, or two keys exchanged."""

    def edit(old: dict[str, Json]) -> Json:
        one, other = _pick(list(old), rng), _pick(list(old), rng)
        names = (
            {one: other, other: one}
            if one != other
            else {one: _pick(("", one + "_", one.upper(), one + "\0", "__class__", "digest"), rng)}
        )
        return {names.get(key, key): item for key, item in old.items()}

    return _at(document, rng, edit, lambda old: isinstance(old, dict) and bool(old))


def add(document: Json, rng: np.random.Generator) -> Json:
    """A field or an item more."""

    def edit(old: Json) -> Json:
        new = _pick((*NUMBERS, *TEXTS, *SHAPES), rng)
        if isinstance(old, dict):
            return {**old, _pick(("x", "", "trust_remote_code", "digest", "__proto__"), rng): new}
        at = int(rng.integers(len(old) + 1))
        return old[:at] + [new] + old[at:]

    return _at(document, rng, edit, lambda old: isinstance(old, dict | list))


def reorder(document: Json, rng: np.random.Generator) -> Json:
    """The items of a list, or the fields of an object, in another order."""

    def edit(old: Json) -> Json:
        order = rng.permutation(len(old))
        keys = list(old)
        return (
            [old[at] for at in order]
            if isinstance(old, list)
            else {keys[at]: old[keys[at]] for at in order}
        )

    return _at(document, rng, edit, lambda old: isinstance(old, dict | list) and len(old) > 1)


EDITS: dict[str, Edit] = {
    "value": value,
    "number": number,
    "text": text,
    "drop": drop,
    "twice": twice,
    "rename": rename,
    "add": add,
    "reorder": reorder,
}


def on_text(edit: Edit) -> Mutation:
    """The mutation of a JSON file that this edit of its document is."""

    def mutation(data: bytes, rng: np.random.Generator) -> bytes:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return set_bytes(data, rng) if data else data
        return dumps(edit(document, rng))

    return mutation


MUTATIONS: dict[str, Mutation] = {f"JSON {name}": on_text(edit) for name, edit in EDITS.items()}


def _at(
    document: Json,
    rng: np.random.Generator,
    edit: Callable[[Any], Json],
    wanted: Callable[[Json], bool] = lambda _: True,
) -> Json:
    """The document with one value edited: walk down at random a few times until one is wanted.

    Else the document itself is replaced.
    """
    for _ in range(20):
        path: list[Any] = []
        target = document
        while isinstance(target, dict | list) and target and (not path or rng.random() < 0.8):
            path.append(
                _pick(list(target) if isinstance(target, dict) else range(len(target)), rng)
            )
            target = target[path[-1]]
        if rng.random() < 0.02:
            path, target = [], document
        if wanted(target):
            return _replaced(document, path, edit(target))
    return document


def _replaced(document: Json, path: list[Any], new: Json) -> Json:
    if not path:
        return new
    out = dict(document) if isinstance(document, dict) else list(document)
    out[path[0]] = _replaced(document[path[0]], path[1:], new)
    return out


def _number(old: float, rng: np.random.Generator) -> Json:
    if abs(old) > 1e300 or not rng.random() < 0.6:  # so large that a step overflows
        return _pick(NUMBERS, rng)
    nearby = (
        old + 1,
        old - 1,
        -old,
        old * 10,
        old / 2,
        old * (1 + 1e-7),
        float(old),
        int(old),
        str(old),
        math.nextafter(old, 9e9),
    )
    found = _pick(nearby, rng)
    return raw("1e400") if isinstance(found, float) and not math.isfinite(found) else found


def _pick(items: Any, rng: np.random.Generator) -> Any:
    return items[int(rng.integers(len(items)))]
