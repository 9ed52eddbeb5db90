"""What there is to scan: a file, a folder, a folder of folders, a list, a repository, a user."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..adapters.config import CONFIG_NAME
from ..adapters.files import adapters_in
from ..adapters.formats import WEIGHTS_NAME
from ..errors import LoraprobeError, PolicyError
from ..limits import MANIFEST, read_limited

EVERY_REPOSITORY = "/*"


def expand(names: str | Path | Iterable[str | Path]) -> list[str]:
    """The adapters behind what was named, each once, in order.

    Args:
        names: an adapter's folder or .safetensors file (adapter_model.safetensors beside its
            configuration stands for the folder), a folder that holds adapters at any depth,
            a .txt file with a name a line, none of another list, "-" for such lines on standard
            input, a Hub id ("org/name" or "org/name@revision"), or "org/*" for every adapter of a
            user.

    Raises:
        PolicyError: a list or folder cannot be read, a name before /* is neither folder nor user,
            or there is nothing to scan.
        HubError: a user's repositories cannot be listed.
    """
    several = [names] if isinstance(names, str | Path) else names
    targets = list(dict.fromkeys(target for name in several for target in _expanded(str(name))))
    if not targets:
        raise PolicyError("got no adapter at all; expected paths, Hub ids, a list.txt, or -")
    return targets


def _expanded(name: str, listed: bool = False) -> Iterator[str]:
    path = Path(name)
    if not name:  # not where one is: it is unreadable
        yield name
    elif name == "-":
        text = sys.stdin.read(MANIFEST + 1)
        if len(text) > MANIFEST:
            raise PolicyError(f"got more than {MANIFEST} characters of names; expected fewer")
        yield from _lines(text)
    elif name.endswith(EVERY_REPOSITORY) and not path.parent.is_dir():
        yield from _repositories(name.removesuffix(EVERY_REPOSITORY))
    elif name.endswith(EVERY_REPOSITORY):
        yield from _expanded(str(path.parent))  # here it means what a shell would have made of it
    elif path.suffix == ".txt" and path.is_file() and not listed:
        try:
            yield from _lines(read_limited(path, MANIFEST, PolicyError).decode(), listed=True)
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"cannot read the list {name!r}: {error}") from None
    elif path.is_dir() and not (path / CONFIG_NAME).exists():
        # A folder without any is reported as unreadable.
        yield from adapters_in(path, PolicyError) or [str(path)]
    elif path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).exists():
        yield str(path.parent)  # what lies beside the weights counts too
    else:
        yield name


def _lines(text: str, listed: bool = False) -> Iterator[str]:
    for line in text.splitlines():
        if line.strip():
            yield from _expanded(line.strip(), listed) if line.strip() != "-" else ()


def _repositories(user: str) -> list[str]:
    from ..hub.names import looks_like_repo_id

    if not looks_like_repo_id(f"{user}/x"):
        raise PolicyError(
            f"no folder {user!r}, and no user of the Hub has such a name. Check the path"
        )
    from huggingface_hub import get_session

    from ..hub.errors import hub_errors
    from ..hub.snapshot import hub_api

    api = hub_api(None)
    with hub_errors(f"no folder {user!r} here, and cannot list the repositories of that user"):
        get_session().head(api.endpoint, timeout=10)  # the list is asked for again and again
        return [model.id for model in api.list_models(author=user, filter="peft")]


def first_line(error: Exception) -> str:
    """An error as one line: its type and message."""
    kind = type(error).__name__ if isinstance(error, LoraprobeError) else "Error"
    return f"{kind}: {' '.join(str(error).split())}"
