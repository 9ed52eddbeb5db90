"""The `fedloop` command."""

from __future__ import annotations

from loraprobe.cli.main import check_extra


def main() -> None:
    """Run the command line; without its extra, say how to install it."""
    check_extra("fedloop")
    from . import flower as commands_flower  # noqa: F401  # they join the app
    from . import operator as commands_operator  # noqa: F401
    from . import probe_kit as commands_probe_kit  # noqa: F401
    from .run import app

    app()


if __name__ == "__main__":
    main()
