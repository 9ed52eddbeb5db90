"""What a repository on the Hub is called."""

from __future__ import annotations

import re

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def looks_like_repo_id(source: str) -> bool:
    """Whether a string has the form org/name.

    >>> [looks_like_repo_id(text) for text in ("org/name", "./folder/name", "name")]
    [True, False, False]
    """
    return bool(_REPO_ID.fullmatch(source)) and ".." not in source
