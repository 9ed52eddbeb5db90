"""`loraprobe serve`. The library is imported inside: help must be quick."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..errors import ServiceError
from ..hub.names import named_revision
from .options import read_named_probe
from .terminal import app, reports_errors

if TYPE_CHECKING:
    from ..probe import Probe


@app.command()
@reports_errors
def serve(
    probe: Annotated[
        list[str],
        typer.Option(
            "--probe",
            "-p",
            help="A folder or org/name[@commit], or NAME=one; may be repeated.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            "-b",
            help="The adapter that training started from; 'fresh' if its B was zero.",
        ),
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Score adapters of a base model with another name.")
    ] = False,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    max_mib: Annotated[int, typer.Option(min=1, help="The largest body.")] = 256,
    memory_mib: Annotated[
        int | None,
        typer.Option(
            min=1, help="All bodies in memory at one time; twice the largest if left out."
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds to keep an idle connection, and to wait for a body that stands still."
        ),
    ] = 10.0,
    token_env: Annotated[
        str | None,
        typer.Option(help="The environment variable that holds the token requests must bring."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without a token.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that browsers may call this service by; may be repeated, '*' is any."
        ),
    ] = None,
    detail: Annotated[
        str,
        typer.Option(
            help="What is told of a score: scores, rounded (tenths, no threshold) or verdicts."
        ),
    ] = "scores",
    rate: Annotated[
        str | None, typer.Option(help="Scores for one address in some time, as 100/minute.")
    ] = None,
) -> None:
    """Score adapters over HTTP: POST /v1/score, a page at /, Prometheus metrics at /metrics."""
    from ..serve.settings import LOCAL_NAMES, MIB, Detail, Settings, is_loopback

    token = None if token_env is None else os.environ.get(token_env, "")
    if token_env is not None and not token:
        raise ServiceError(
            f"the environment variable {token_env} is not set or empty; expected the token that"
            " requests must bring"
        )
    if token is None and not insecure and not is_loopback(host):
        raise ServiceError(
            f"{host} can be reached from other machines: name a token with --token-env, or say"
            " --insecure to let everybody in"
        )
    from ..adapters.kinds import FRESH
    from ..adapters.load import load_adapter
    from ..serve.server import run

    probes = _probes(probe)
    start = base if base in (None, FRESH) else load_adapter(str(base)).load()
    settings = Settings(
        probes,
        start,
        any_base,
        token,
        max_body=max_mib * MIB,
        max_held=(2 * max_mib if memory_mib is None else memory_mib) * MIB,
        timeout=timeout,
        hosts=(*LOCAL_NAMES, *(allow_host or ())),
        detail=cast(Detail, detail),
        rate=rate,
    )
    run(settings, host, port)


def _probes(named: list[str]) -> dict[str, Probe]:
    """Name -> probe, from NAME=SOURCE or a source whose last part is its name."""
    probes: dict[str, Probe] = {}
    for text in named:
        name, equals, source = text.partition("=")
        if not equals:
            name = Path(named_revision(text)[0]).resolve().name
            source = text
        if name in probes:
            raise ServiceError(
                f"got two probes named {name!r}; name them with --probe NAME={source}"
            )
        probes[name] = read_named_probe(source)
    return probes
