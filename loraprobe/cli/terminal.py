"""What all sub-commands share.

The app they join, the console, one way to show a stranger's text, one way to report an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..errors import LoraprobeError, MissingExtra

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Featurize LoRA adapters and detect malicious ones.",
)
console = Console(
    width=None if sys.stdout.isatty() else 160
)  # rich takes 80 for a pipe, too narrow for module names
complaints = Console(stderr=True)

ProbeOption = Annotated[str, typer.Option("--probe", "-p", help="A probe's folder or Hub id.")]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        help="Hub only: a commit, tag or branch. Only a 40-digit commit stays what it is."
    ),
]
SubfolderOption = Annotated[
    str | None, typer.Option(help="The folder inside it that holds the probe.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class Exit(IntEnum):
    """Exit codes of `score`, the gravest that applies: a detection outweighs an unreadable file."""

    BENIGN = 0
    BAD_INPUT = 2
    FLAGGED = 3
    INCONCLUSIVE = 4


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the library's errors, and files that cannot be read or written, into one line on stderr
    and exit code 2.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (LoraprobeError, MissingExtra, OSError) as error:
            complaints.print(
                Text.assemble((type(error).__name__, "red"), ": ", plain(error)), soft_wrap=True
            )
            raise typer.Exit(Exit.BAD_INPUT) from None

    return run


def plain(text: object) -> Text:
    """Text as it stands: no markup is read from it, and control characters are shown instead of
    obeyed.
    """
    return Text(
        "".join(
            char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in str(text)
        )
    )
