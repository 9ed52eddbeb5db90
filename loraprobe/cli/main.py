"""The `loraprobe` command."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from ..errors import MissingExtra

ALONE = {"score": "probes", "inspect": "probes", "scan": "scan"}
"""Commands that CI runs often -> their module: the others are not imported for them."""


def main() -> None:
    """Run the command line; without its extra, say how to install it.

    Ctrl-C is exit code 130 at any time, while libraries are imported too.
    """
    _prepare_streams()
    try:
        _run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def check_extra(command: str) -> None:
    """Without what a command line needs, say how to install it and end with exit code 2."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(MissingExtra(str(error.name), "cli", f"The {command} command"), file=sys.stderr)
        raise SystemExit(2) from None


def _run() -> None:
    check_extra("loraprobe")
    named = sys.argv[1] if len(sys.argv) > 1 else ""
    import_module(f".{ALONE.get(named, 'commands')}", __package__)
    from .terminal import app

    app()


def _prepare_streams() -> None:
    """Let output neither fail on a terminal without UTF-8 nor on a stream that is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for good
        else:
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
