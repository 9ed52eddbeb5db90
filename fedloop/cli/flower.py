"""The `fedloop flower` sub-commands: a federation of hosts. Heavy libraries are imported inside.

Help must be quick.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .run import app, errors_shown, say

flower = typer.Typer(
    no_args_is_help=True,
    help="A federation of hosts on Flower: one server, and a node at every site (docs/flower.md).",
)
app.add_typer(flower, name="flower")

Folder = Annotated[Path, typer.Argument(help="The folder that `fedloop flower init` wrote.")]
Address = Annotated[
    str, typer.Option("--superlink", help="host:port of the server, as in its certificate.")
]
Authority = Annotated[
    Path, typer.Option("--ca", help="The certificate of the authority that signed the server's.")
]
_HERE = "127.0.0.1:8000"


@flower.command()
def init(folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Write a Flower app that is ready but for its config.toml."""
    with errors_shown():
        from ..flower.deploy.app import write_app

        for path in write_app(folder):
            say(f"wrote {path}")


@flower.command()
def superlink(
    certificates: Annotated[
        Path, typer.Option(help="A folder with ca.crt, server.pem and server.key.")
    ],
    database: Annotated[
        Path, typer.Option(help="A file that keeps the registered nodes; made if it is not there.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "0.0.0.0",
    port: Annotated[
        int, typer.Option(help="The only port that nodes need.", min=1, max=65535)
    ] = 8000,
) -> None:
    """Run the server's SuperLink.

    TLS, registered node keys only, commands from this machine only.
    """
    with errors_shown():
        from ..flower.deploy.superlink import run_superlink

        run_superlink(host, port, certificates, database)


@flower.command()
def register(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="What records call the client.")],
    key: Annotated[
        Path, typer.Argument(help="Its public key: the .pub file of `ssh-keygen -t ecdsa -b 384`.")
    ],
    authority: Authority,
    address: Address = _HERE,
    examples: Annotated[
        int | None,
        typer.Option(min=1, help="How many examples count for it, instead of what it claims."),
    ] = None,
) -> None:
    """Let a node take part, and write down in nodes.json which client it is.

    On the server's machine.
    """
    with errors_shown():
        from ..flower.deploy.enrol import enrol

        node = enrol(folder / "nodes.json", name, key, examples, address, authority)
    say(f"{name} is node {node}")


@flower.command()
def unregister(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="The client's name.")],
    authority: Authority,
    address: Address = _HERE,
) -> None:
    """Shut a node out, and strike it from nodes.json. On the server's machine."""
    with errors_shown():
        from ..flower.deploy.enrol import strike

        strike(folder / "nodes.json", name, address, authority)
    say(f"{name} is out")


@flower.command()
def node(
    address: Address,
    authority: Authority,
    key: Annotated[Path, typer.Option(help="This node's private key.")],
    data: Annotated[
        str,
        typer.Option(help="What to train on: a source as `fedloop client` reads it."),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The base model on this machine, instead of what the server calls it."),
    ] = None,
) -> None:
    """Take part with this machine's data, until stopped."""
    with errors_shown():
        from ..flower.deploy.node import run_node

        config: dict[str, str | int] = {
            "data": str(Path(data).resolve()) if os.path.exists(data) else data
        }
        if base is not None:
            config["base"] = str(Path(base).resolve()) if os.path.exists(base) else base
        run_node(address, authority, key, config)


@flower.command()
def start(
    folder: Folder,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for records, checkpoints and adapters; of an interrupted run to go on.",
        ),
    ],
    authority: Authority,
    address: Address = _HERE,
) -> None:
    """Run the federation of FOLDER/config.toml, or go on with it. On the server's machine.

    Ctrl-C stops it, a next start goes on.
    """
    with errors_shown():
        from ..flower.deploy.enrol import start_and_follow

        start_and_follow(
            folder,
            out,
            address,
            authority,
            say,
        )
    say(f"written to {out}; `fedloop report {out}` draws it")
