"""What a repository on the Hub is called, and whether a source is one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import HubError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def looks_like_repo_id(source: str) -> bool:
    """Whether a string has the form org/name.

    >>> [looks_like_repo_id(text) for text in ("org/name", "./folder/name", "name")]
    [True, False, False]
    """
    return bool(_REPO_ID.fullmatch(source)) and ".." not in source


def named_revision(name: str | Path) -> tuple[str, str | None]:
    """A source and its revision, from "org/name@revision"; a local path has none.

    >>> named_revision("org/name@v1")
    ('org/name', 'v1')
    """
    name = str(name)
    if os.path.exists(name):
        return name, None
    source, _, revision = name.partition("@")
    return source, revision or None


def is_on_hub(source: str | Path, revision: str | None) -> bool:
    """Whether a source is a repository on the Hub; a local path of that name is not.

    Raises:
        HubError: a revision is asked of a local path, or the source looks like a mistyped one, or
            is empty or no text.
    """
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise HubError(f"got the source {source!r}; expected a path, or org/name on the Hub")
    path = Path(source)
    if not os.path.exists(source) and looks_like_repo_id(str(source)):
        if revision is None and path.parent.is_dir():
            raise HubError(
                f"no file or folder {str(source)!r}; there is a folder {str(path.parent)!r} here."
                " Check the path; for the Hub repository of that name give its revision"
            )
        return True
    if revision is not None:
        raise HubError(
            f"got revision {revision!r} for the local path {source}; revisions belong to Hub ids"
        )
    return False


@contextmanager
def no_local_either(source: str | Path) -> Iterator[None]:
    """Say in an error of the Hub that there is no local path of that name either."""
    try:
        yield
    except HubError as error:
        raise HubError(
            f"{error} (There is no local file or folder {str(source)!r} either.)"
        ) from error
