"""Whose probes are loaded: a list in the user's configuration, and one in a scan's policy.

Without a list every probe is loaded. With one, a probe has to be on it, whichever way in is used.
An entry is one of

    "org"                   everything that this user or organisation publishes on the Hub
    "org/name"              this repository; "org/name@<40 digits>": this commit of it
    "sha256:<64 digits>"    the probe whose config.json has this digest, wherever it comes from
    "/srv/probes"           every folder below this one; "~/probes" likewise

The user's file is $LORAPROBE_CONFIG, or loraprobe/config.toml in $XDG_CONFIG_HOME (~/.config).
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from .errors import TrustError, quoted
from .limits import SETTINGS, read_limited

CONFIG_VARIABLE = "LORAPROBE_CONFIG"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*(@[0-9a-f]{40})?)?", re.ASCII)


def user_config() -> Path:
    """Where the user's configuration is, if there is one."""
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "loraprobe" / "config.toml"


def users_list() -> tuple[str, ...] | None:
    """The list in the user's configuration; None where there is none.

    Raises:
        TrustError: the file cannot be read, or holds anything but such a list.
    """
    path = user_config()
    if CONFIG_VARIABLE not in os.environ and not path.exists():
        return None
    try:
        values = tomllib.loads(read_limited(path, SETTINGS, TrustError).decode())
    except TrustError:
        raise
    except (OSError, ValueError) as error:
        raise TrustError(f"cannot read {path}: {error}. Mend or remove it") from None
    if unknown := values.keys() - {"trusted"}:
        raise TrustError(f"{path}: got {quoted(sorted(unknown))}; expected trusted = [...]")
    return checked_list(values["trusted"], str(path)) if "trusted" in values else None


def checked_list(value: object, where: str) -> tuple[str, ...]:
    """The entries of a list, each of a form that is known.

    Raises:
        TrustError: another form; a misspelt entry would trust nobody, or somebody else.
    """
    if not isinstance(value, list | tuple):
        raise TrustError(f"{where}: trusted: got {quoted(value)}; expected a list of texts")
    for entry in value:
        valid = isinstance(entry, str) and (
            _DIGEST.fullmatch(entry) or _REPOSITORY.fullmatch(entry) or entry.startswith(("/", "~"))
        )
        if not valid:
            raise TrustError(
                f"{where}: trusted: got {quoted(entry)}; expected 'org', 'org/name',"
                " 'org/name@<commit>', 'sha256:<64 digits>' or a folder from / or ~"
            )
    return tuple(value)


def check_trusted(
    trusted: Sequence[str] | None, source: str | Path, commit: str | None, digest: str | None
) -> None:
    """Refuse a probe that is not on a list.

    Args:
        trusted: the list; None for no list.
        source: the repository or folder it was loaded from.
        commit: its commit on the Hub; None for a folder.
        digest: of its config.json, 64 hexadecimal digits.

    Raises:
        TrustError: nothing on the list stands for it.
    """
    if trusted is None or any(_stands_for(entry, source, commit, digest) for entry in trusted):
        return
    where = f"{source}@{commit}" if commit else str(Path(source).resolve())
    raise TrustError(
        f"{where} is on none of the {len(trusted)} entries of the list of trusted probes. Add"
        f' "sha256:{digest}" or "{where}" to trusted = [...] if you trust it'
    )


def _stands_for(entry: str, source: str | Path, commit: str | None, digest: str | None) -> bool:
    if entry.startswith("sha256:"):
        return entry.removeprefix("sha256:") == digest
    if entry.startswith(("/", "~")):
        return commit is None and Path(source).resolve().is_relative_to(
            Path(entry).expanduser().resolve()
        )
    repository = str(source)
    return commit is not None and entry in (
        *(repository.partition("/")[0], repository, f"{repository}@{commit}"),
    )
