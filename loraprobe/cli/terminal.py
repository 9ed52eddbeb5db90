"""What all sub-commands share: the app, the console, one way to show text, one for errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from ..errors import LoraprobeError, missing_extra, quoted

T = TypeVar("T")
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Featurize LoRA adapters and detect malicious ones.",
)
# rich takes 80 for a pipe, too narrow for module names
console = Console(width=None if sys.stdout.isatty() else 160)
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
    INTERRUPTED = 130  # 128 + SIGINT, as shells have it
    NO_READER = 141  # 128 + SIGPIPE


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if version:
        from .._version import __version__

        print(f"loraprobe {__version__}")
        raise typer.Exit


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that are about the input into one line on stderr and exit code 2.

    They are the library's own and those of files that cannot be read or written. Ctrl-C is exit
    code 130, a reader that closed the pipe 141.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            try:
                command(*args, **kwargs)
            finally:
                sys.stdout.flush()  # a reader that has gone is noticed here, not at exit
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for good
            raise typer.Exit(Exit.NO_READER) from None
        except KeyboardInterrupt:
            complaints.print("interrupted")
            raise typer.Exit(Exit.INTERRUPTED) from None
        except (LoraprobeError, OSError, ImportError) as error:
            shown = missing_extra(error) if isinstance(error, ImportError) else error
            line = Text.assemble((type(shown).__name__, "red"), ": ", plain(shown))
            complaints.print(line, soft_wrap=True)
            raise typer.Exit(Exit.BAD_INPUT) from None

    return run


@contextmanager
def counting(label: str, total: int, least: int = 0) -> Iterator[Callable[[], None]]:
    """A function to call when one more is done; a bar on stderr where there are that many."""
    if total < least:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(console=complaints, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


def tracked(items: Iterable[T], label: str, total: int, least: int = 0) -> Iterator[T]:
    """The items, with a bar as `counting` has it."""
    with counting(label, total, least) as advance:
        for item in items:
            yield item
            advance()


def plain(text: object) -> Text:
    """Text as it stands: no markup is read from it, control characters are shown, not obeyed."""
    return Text(quoted(str(text), sys.maxsize, keep="\n"))
