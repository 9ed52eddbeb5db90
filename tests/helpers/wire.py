"""What the tests over the wire share.

A loopback Hub with a client, and the tiny probes and adapters that travel between them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import make
from tests.helpers.hub import Hub, User
from tests.helpers.hub_client import Client, Raised
from tests.helpers.probes import BASE, labelled_adapter, new_data, tiny_probe

USERS = {"writes": User("org"), "reads": User("org", "read"), "stranger": User("somebody")}
"""By token: who owns the namespace `org`, the same with a token for reading only, and somebody
else.
"""


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Hub, Client]]:
    """A Hub, and a client that has the token for writing."""
    with (
        Hub(USERS) as hub,
        Client(
            hub.url,
            folder / "home",
            HF_TOKEN="writes",
            HF_HUB_DOWNLOAD_TIMEOUT="2",
            HF_HUB_ETAG_TIMEOUT="2",
        ) as client,
    ):
        yield hub, client
    assert hub.crashes == []


def repo_of(request: pytest.FixtureRequest) -> str:
    """The id of a repository that no other test uses."""
    return f"org/{hashlib.sha1(request.node.nodeid.encode()).hexdigest()[:12]}"


def saved(folder: Path, head: str = "linear", **options: Any) -> Path:
    """A tiny probe in a folder."""
    return tiny_probe(head, **options).save_pretrained(folder)


def scores(head: str = "linear", **options: Any) -> list[str]:
    """What that probe gives in this process, as exact numbers."""
    return [float(score).hex() for score in tiny_probe(head, **options)(new_data().adapters)]


def peft_folder(path: Path, seed: int = 1) -> Path:
    """A tiny adapter in PEFT's format."""
    return make.folder(
        path,
        labelled_adapter(seed, kind="weights").state_dict(),
        r=2,
        lora_alpha=4,
        base_model_name_or_path=BASE,
    )


def norms(seed: int = 1) -> dict[str, str]:
    """The norms of that adapter's modules, as exact numbers."""
    return {
        name: pair.norm().hex() for name, pair in labelled_adapter(seed, kind="weights").items()
    }


def refused(client: Client, reason: str, *operation: Any, **options: Any) -> str:
    """The message of an operation that our library has to refuse, with an error of its own and a
    message that says this.
    """
    with pytest.raises(Raised) as caught:
        client(*operation, **options)
    assert "LoraprobeError" in caught.value.names, caught.value
    assert re.search(reason, caught.value.message), caught.value
    return caught.value.message
