"""Damage to files, as hypothesis strategies: of bytes, of JSON documents, of safetensors files.

What Python's json would not write (1e400, a key twice) is put in as a marked string, and the marks
are taken out of the text. A file that does not parse any more is damaged as bytes instead.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Json = Any
Draw = Callable[[st.SearchStrategy[Any]], Any]
Damage = Callable[[bytes], st.SearchStrategy[bytes]]

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


HARD_NUMBERS: tuple[Json, ...] = (
    *(0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64),
    *(10**30, 10**400, -(10**400), 0.0, -0.0, 0.1, 0.5, 1.0, 1.5, -2.5, 1e-6, 1e-40, 5e-324),
    *(1e30, 3.4e38, 1e39, -1e39, 1e300, 1.7e308),
    *map(raw, ("9" * 5000, "-0", "1e400", "-1e400", "1e-400", "NaN", "Infinity", "-Infinity")),
    *map(raw, ("01", "+1", ".5", "1.", "1_0", "0x10")),
)
HARD_TEXTS: tuple[Json, ...] = (
    *("", " ", "0", "1", "-1", "1.0", "1E400", "nan", "true", "A", "B", "linear", "mlp"),
    *("xgboost", "pickle", "head.json", "head.safetensors", "../../../etc/passwd", "/etc/passwd"),
    *("org/base", "model.layers.0.self_attn.q_proj", "all", "first", "\0", "\x1b[2J\x1b[31m"),
    *("\r\n", "\u202e", "Ärger", "\U0001f600", "x" * 10_000, "(a+)+$", "%s%n{0}"),
    *map(raw, ('"\\ud800"', '"\\udc00x"', '"\\u0000"', '"\\x"', "'a'", '"a\nb"')),
)
HARD_SHAPES: tuple[Json, ...] = (
    *(
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
    ),
    *(raw("[" * depth + "]" * depth) for depth in (40, 900, 100_000)),
    raw('{"a":' * 40 + "1" + "}" * 40),
    raw("[" + "[]," * 20_000 + "[]]"),
    raw(""),
    raw(","),
)
HARD = st.one_of(
    st.sampled_from(HARD_NUMBERS),
    st.sampled_from(HARD_TEXTS),
    st.sampled_from(HARD_SHAPES),
    st.integers(-(2**33), 2**33),
    st.floats(),
    st.text(max_size=8),
)
NAMES = st.one_of(st.sampled_from(["", "x", "digest", "__class__", "__proto__"]), st.text())
WORDS = st.sampled_from(
    [b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\0\0\xc0\x7f"]
    + [b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b'"', b"{", b"}", b","]
)


@st.composite
def damaged_bytes(draw: Draw, data: bytes) -> bytes:
    """What disks, transfers and the usual fuzzers do; knows nothing of the format."""
    if not data:
        return draw(st.binary(max_size=64))
    start = draw(st.integers(0, len(data) - 1))
    stop = draw(st.integers(start, min(len(data), start + draw(st.sampled_from((1, 16, 2**20))))))
    at = draw(st.integers(0, len(data) - 1))
    kind = draw(st.sampled_from("flip set cut extend delete repeat splice swap".split()))
    if kind == "flip":
        mask = 1 << draw(st.integers(0, 7))
        return data[:start] + bytes([data[start] ^ mask]) + data[start + 1 :]
    if kind == "set":
        word = draw(st.one_of(WORDS, st.binary(min_size=1, max_size=4)))
        return (data[:start] + word + data[start + len(word) :])[: len(data)]
    more = draw(st.one_of(st.binary(max_size=64), st.just(data), st.just(bytes(64))))
    middle = (start + stop) // 2
    return {
        "cut": data[:start],
        "extend": data + more,
        "delete": data[:start] + data[stop:],
        "repeat": data[:stop] + data[start:],
        "splice": data[:at] + data[start:stop] + data[at:],
        "swap": data[:start] + data[middle:stop] + data[start:middle] + data[stop:],
    }[kind]


def paths(document: Json) -> list[tuple[Any, ...]]:
    """Where the values of a document are, itself first."""
    if isinstance(document, dict):
        items = list(document.items())
    else:
        items = list(enumerate(document)) if isinstance(document, list) else []
    return [(), *((key, *path) for key, value in items for path in paths(value))]


def _replaced(document: Json, path: tuple[Any, ...], edit: Callable[[Json], Json]) -> Json:
    if not path:
        return edit(document)
    out = dict(document) if isinstance(document, dict) else list(document)
    out[path[0]] = _replaced(document[path[0]], path[1:], edit)
    return out


@st.composite
def edited(draw: Draw, document: Json) -> Json:
    """A document with one edit: a value, a field, an item, a key, their order."""
    path = draw(st.sampled_from(paths(document)))
    hard = draw(HARD)

    def edit(old: Json) -> Json:
        if isinstance(old, dict) and old:
            key, other = draw(st.sampled_from(list(old))), draw(NAMES)
            kind = draw(st.sampled_from("value drop twice rename swap add reverse".split()))
            names = {key: other} if kind == "rename" else {key: min(old), min(old): key}
            return {
                "value": hard,
                "drop": {name: value for name, value in old.items() if name != key},
                "twice": {_TWICE + key: hard, **old},
                "rename": {names.get(name, name): value for name, value in old.items()},
                "swap": {names.get(name, name): value for name, value in old.items()},
                "add": {**old, other: hard},
                "reverse": dict(reversed(old.items())),
            }[kind]
        if isinstance(old, list) and old:
            at = draw(st.integers(0, len(old) - 1))
            choices = (old[:at] + old[at + 1 :], old[: at + 1] + old[at:], [*old, hard], old[::-1])
            return draw(st.sampled_from((hard, *choices)))
        if isinstance(old, str):
            at = draw(st.integers(0, len(old)))
            character = draw(st.characters(codec="utf-8"))
            return draw(st.sampled_from((hard, old[:at], old[:at] + character + old[at + 1 :])))
        if isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 1e300:
            return draw(
                st.sampled_from((hard, old + 1, old - 1, -old, old * 10, old / 2, str(old)))
            )
        return hard

    return _replaced(document, path, edit)


@st.composite
def damaged_json(draw: Draw, data: bytes) -> bytes:
    """A JSON file with one or two edits of its document, or damaged as bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(data))
    document = json.loads(data)
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        document = draw(edited(document))
    return dumps(document)


DTYPES = "BOOL U8 I8 F8_E5M2 F8_E4M3 F4 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64 X32".split()
METADATA: tuple[Json, ...] = (
    *({}, {"format": "pt"}, {"a": "{[" * 50}, {"a": "\\u005b\\"}, {"a": 1}, None, [], "x"),
    *({"@twice:a": "1", "a": "2"}, {"a": "\x1b[31m"}, {"a": "x" * 100_000}),
)
LENGTHS = (0, 1, 2**16, 10**8, 10**8 + 1, 2**32, 2**53, 2**63 - 1, 2**64 - 1)


@st.composite
def damaged_safetensors(draw: Draw, data: bytes) -> bytes:
    """A file whose header is edited and its length written anew, or whose numbers are."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = draw(
        st.sampled_from("bytes tree length pad offsets shape name entry metadata numbers".split())
    )
    if kind == "bytes":
        return draw(damaged_bytes(data))
    if kind == "length":
        length = draw(st.one_of(st.sampled_from(LENGTHS), st.integers(max(0, size - 9), size + 9)))
        return struct.pack("<Q", length) + data[8:]
    if kind == "pad":
        pad = draw(st.sampled_from([b" ", b"\n", b"\0", b" " * 1000, b"\xef\xbb\xbf"]))
        text = draw(st.sampled_from([pad + data[8 : 8 + size], data[8 : 8 + size] + pad]))
        return struct.pack("<Q", len(text)) + text + body
    edit = {"offsets": _offsets, "shape": _shape, "name": _name, "entry": _entry}.get(kind)
    if kind == "tree":
        header = draw(edited(header))
    elif kind == "metadata":
        header = {"__metadata__": draw(st.sampled_from(METADATA)), **header}
    elif kind == "numbers":
        body = draw(_numbers(header, body))
    else:
        header, body = edit(draw, header, body)
    text = dumps(header)
    return struct.pack("<Q", len(text)) + text + body


def _tensors(header: Json) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _two(draw: Draw, header: Json) -> tuple[str, str]:
    names = st.sampled_from(_tensors(header))
    return draw(names), draw(names)


def _with(header: Json, name: str, **fields: Json) -> Json:
    return {**header, name: {**header[name], **fields}}


def _offsets(draw: Draw, header: Json, body: bytes) -> tuple[Json, bytes]:
    """The byte range of a tensor moved, turned round, made another's, or put outside the file."""
    name, other = _two(draw, header)
    start, stop = header[name]["data_offsets"]
    step = draw(st.sampled_from((-4, -1, 1, 2, 4, 8, 1000)))
    ranges = (
        *([start + step, stop + step], [start, stop + step], [stop, start], [0, len(body)]),
        *(header[other]["data_offsets"], [start, 2**63], [2**64 - 4, 2**64], [-4, stop], [start]),
        *([start, stop, stop], [float(start), stop], [len(body)] * 2, None),
        *([2**40, 2**40 + stop - start],),
    )
    return _with(header, name, data_offsets=draw(st.sampled_from(ranges))), body


def _shape(draw: Draw, header: Json, body: bytes) -> tuple[Json, bytes]:
    """Another shape or type, of as many bytes or of others; sizes that overflow."""
    name, _ = _two(draw, header)
    shape = list(header[name]["shape"])
    size = 1
    for extent in shape:
        size *= extent
    shapes = (
        *(shape, shape[::-1], [size], [1, size], [size, 1], [1, *shape], [*shape, 1], []),
        *([0, size], [2**32, 2**32], [2**63, 2], [2**64, 1], [-1, *shape[1:]], [size, 0]),
        *([1] * 40 + [size], [1.5, size], [str(size)], None, {}, [raw("9" * 400)]),
        *([2 * size], [max(1, size // 2)], [4 * size]),
    )
    dtype = draw(st.sampled_from((header[name]["dtype"], draw(st.sampled_from(DTYPES)))))
    return _with(header, name, shape=draw(st.sampled_from(shapes)), dtype=dtype), body


def _name(draw: Draw, header: Json, body: bytes) -> tuple[Json, bytes]:
    """A tensor called otherwise, two exchanged, or one under the name of another (a key twice)."""
    name, other = _two(draw, header)
    free = draw(NAMES)
    parts = ("lora_A", "lora_B", "q_proj", "v_proj", "layers.0", "layers.1", ".weight", "default")
    old, new = draw(st.sampled_from(parts)), draw(st.sampled_from(parts))
    mapping = draw(
        st.sampled_from(
            [{name: other, other: name}, {name: _TWICE + other}]
            + [{name: text} for text in (free, name.replace(old, new), name[1:], name.upper())]
            + [{name: text} for text in (name + ".x", name.replace("a", "\u0430"))]
        )
    )
    return {mapping.get(key, key): entry for key, entry in header.items()}, body


def _entry(draw: Draw, header: Json, body: bytes) -> tuple[Json, bytes]:
    """An entry left out with or without its bytes, added, or hidden behind its double."""
    name, other = _two(draw, header)
    entry = header[name]
    start, stop = entry["data_offsets"]
    rest = {key: value for key, value in header.items() if key != name}
    moved = {  # without its bytes: a smaller file, whole in itself
        key: {**value, "data_offsets": [at - (stop - start) for at in value["data_offsets"]]}
        if key != "__metadata__" and value["data_offsets"][0] >= stop
        else value
        for key, value in rest.items()
    }
    added = {**entry, "data_offsets": [len(body), len(body) + stop - start]}
    double = {"dtype": "F32", "shape": [2**40], "data_offsets": [7, 3]}
    escaped = raw(json.dumps(name).replace("a", "\\u0061"))
    return draw(
        st.sampled_from(
            (
                (rest, body),
                (moved, body[:start] + body[stop:]),
                ({**header, name.replace("layers.1", "layers.7"): added}, body + body[start:stop]),
                (_with(header, name, extra=0), body),
                ({**header, name: list(entry.values())}, body),
                ({_TWICE + name: double, **header}, body),
                ({escaped: header[other], **header}, body),
                (header, body[:-3]),
                (header, body + b"\0\0\0"),
            )
        )
    )


@st.composite
def _numbers(draw: Draw, header: Json, body: bytes) -> bytes:
    """NaN, infinities, zeros, large ones, small integers: one number, or all of a tensor."""
    name, _ = _two(draw, header)
    start, stop = header[name]["data_offsets"]
    small = st.integers(-2, 40).map(lambda number: number.to_bytes(4, "little", signed=True))
    word = draw(st.one_of(WORDS, small, st.binary(min_size=4, max_size=4)))
    if draw(st.integers(0, 3)) == 0:
        return body[:start] + (word * (stop - start))[: stop - start] + body[stop:]
    at = start + 4 * draw(st.integers(0, max(0, (stop - start) // 4 - 1)))
    return (body[:at] + word + body[at + len(word) :])[: len(body)]
