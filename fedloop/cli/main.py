"""The `fedloop` command."""

from __future__ import annotations

import sys

from ..errors import MissingExtra


def main() -> None:
    """Run the command line; without its extra, say how to install it."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(MissingExtra(str(error.name), "cli", "The fedloop command"), file=sys.stderr)
        raise SystemExit(2) from None
    from . import flower as commands_flower  # noqa: F401  # they join the app
    from . import operator as commands_operator  # noqa: F401
    from . import probe_kit as commands_probe_kit  # noqa: F401
    from .run import app

    app()


if __name__ == "__main__":
    main()
