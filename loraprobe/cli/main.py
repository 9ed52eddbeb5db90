"""The `loraprobe` command."""

from __future__ import annotations

import sys

from ..errors import MissingExtra


def main() -> None:
    """Run the command line; without its extra, say how to install it."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(MissingExtra(str(error.name), "cli", "The loraprobe command"), file=sys.stderr)
        raise SystemExit(2) from None
    from . import probes as commands  # noqa: F401  # they join the app
    from . import report as report_command  # noqa: F401  # likewise
    from . import scan as scan_command  # noqa: F401  # likewise
    from . import serve as command  # noqa: F401  # likewise
    from .terminal import app

    app()


if __name__ == "__main__":
    main()
