"""Who may do what on the Hub of the tests, what it logs, refuses, and calls its files."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

import yaml  # huggingface_hub needs it too

LARGE = (".safetensors", ".bin", ".pt", ".zip")  # kept in the storage, named by their SHA-256
LICENSES = (
    *("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0"),
    *("gpl-3.0", "llama3.1", "other", "unknown"),
)


@dataclass(frozen=True)
class User:
    """Whom a token stands for: may read, and with the role "write" write, in its own namespace."""

    name: str
    role: str = "write"


USERS = {"writes": User("org"), "reads": User("org", "read"), "stranger": User("somebody")}


@dataclass
class Entry:
    """One request; `status` stays 0 where no answer was given."""

    origin: str  # "hub" or "storage"
    method: str
    path: str
    token: str
    agent: str
    route: str = ""
    found: dict[str, str] = field(default_factory=dict)
    status: int = 0


class Refusal(Exception):
    """An answer that the client maps to an error by its headers."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        named = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.status = status
        self.headers = {name: text for name, text in named.items() if text}


def digest(name: str, data: bytes) -> str:
    """The name under which the Hub stores a file: SHA-256 of a large one, git's SHA-1 of others."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def flipped(data: bytes, place: int = -2) -> bytes:
    """The same bytes but for one bit."""
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


def card_errors(card: str) -> list[str]:
    """What the Hub does not accept in the front matter of a card: the part probes can break."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    errors = []
    if front.get("license", "other") not in LICENSES:
        errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    for name in ("base_model", "datasets"):
        values = front.get(name) or []
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", str(value)):
                errors.append(f'"{name}" with value "{value}" is not valid')
    return errors
