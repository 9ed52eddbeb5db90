"""The version of this package, read from what is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def library_version() -> str:
    """This package's version; "0+unknown" in a source tree that is not installed."""
    try:
        return version("loraprobe")
    except PackageNotFoundError:
        return "0+unknown"
