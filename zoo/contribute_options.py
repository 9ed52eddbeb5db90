"""The command line of zoo.contribute.

What it means, and whether it can work, before anything is trained.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedloop.client.training import LocalTraining, LoRASettings
from fedloop.data.corpora import HUB, load_corpus
from fedloop.data.examples import deduplicate
from fedloop.errors import ConfigError
from loraprobe.errors import FitError
from loraprobe.fit.calibration import budget_of

from .client_design import LORA, SHARES, TRAINING, ZOO_DESIGN, Design, plan, twin_of
from .deltas import Base
from .sources import Source
from .study import ENTRIES, FOLDS, IN_DISTRIBUTION_FOLDS, Entry

ROLES = ("benign", "malicious", "hard_negative")
_NAMED = re.compile(r"([\w.-]+)=(.+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ADAPTERS = re.compile(r"hub:[\w.-]+/[\w.-]+@[0-9a-f]{40}")


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Attributes:
        specs: source name -> where its examples come from.
        licences: source name -> its licence, where it was said.
        adapters: where the held-out adapters will be, as the record says it.
    """

    entry: Entry
    design: Design
    base: Base
    specs: dict[str, str]
    licences: dict[str, str]
    licence: str
    adapters: str
    seeds: tuple[int, ...]
    held_out: int
    limit: int
    workers: int
    threads: int
    out: Path


def asked(arguments: Sequence[str] | None, description: str | None) -> Asked:
    """Read and check a command line.

    Raises:
        ConfigError, FitError: it cannot work; the message says what would.
    """
    options = _parser(description).parse_args(arguments)
    named = {role: _named(getattr(options, role)) for role in ROLES}
    design = _design(options, named)
    base_name = options.base_name or options.base
    entry = next(entry for entry in ENTRIES if entry.name == options.kind)
    name = options.name or f"{Path(base_name).name}-{entry.name}"
    entry = replace(
        entry,
        name=name,
        threshold=entry.threshold if options.threshold is None else _threshold(options.threshold),
    )
    check_counts(design, entry)
    if not Path(options.base).is_dir() and not _COMMIT.fullmatch(options.revision or ""):
        raise ConfigError(
            f"got the base {options.base!r} at {options.revision!r}; expected a folder, or a Hub id"
            " with --revision and its 40-digit commit"
        )
    if name in {entry.name for entry in ENTRIES} or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ConfigError(
            f"got the name {name!r}; expected letters, digits, '_', '.' and '-', and no name of the"
            " zoo's own probes"
        )
    if options.adapters and not _HUB_ADAPTERS.fullmatch(options.adapters):
        raise ConfigError(
            f"got --adapters {options.adapters!r}; expected hub:<org>/<name>@<40-digit commit>"
        )
    specs = {source: spec for names in named.values() for source, spec in names.items()}
    licences = _licences(options.data_licence, specs)
    return Asked(
        entry,
        design,
        Base(options.base, base_name, options.revision, options.dtype, options.quantization),
        specs,
        licences,
        options.licence,
        options.adapters or f"contributed/{name}",
        tuple(options.seeds),
        options.held_out,
        options.limit,
        options.workers,
        options.threads,
        options.out,
    )


def read_source(name: str, spec: str, limit: int) -> Source:
    """A source's examples, none twice, all for clients.

    Raises:
        ConfigError, DataError, MissingExtra: as `load_corpus`.
    """
    return Source(name, (), tuple(deduplicate(load_corpus(spec, hub_limit=limit).examples)))


def check_counts(design: Design, entry: Entry) -> None:
    """Whether all that is measured leaves enough clients to fit a probe and its threshold on.

    Raises:
        FitError: it does not.
    """
    clients = plan(design)
    with_cut = (
        max(FOLDS, math.ceil(1 / budget_of(entry.threshold, "fpr")) - 1)
        if isinstance(entry.threshold, str)
        else FOLDS
    )
    cases: list[tuple[set[str], int, int]] = [
        (set(), max(with_cut, IN_DISTRIBUTION_FOLDS), IN_DISTRIBUTION_FOLDS)
    ]
    cases += [({kind}, with_cut, FOLDS) for kind in design.hard_negative]
    in_cells = with_cut if entry.cuts_in_cells else FOLDS
    cases += [
        ({malicious, benign, twin_of(malicious)}, in_cells, FOLDS)
        for malicious in design.malicious
        for benign in design.benign
    ]
    for unseen, benign_needed, malicious_needed in cases:
        kept = [client.label for client in clients if not unseen & {client.source, client.host}]
        if kept.count(0) < benign_needed or kept.count(1) < malicious_needed:
            out = ", ".join(sorted(unseen & set(design.sources))) or "nothing"
            raise FitError(
                f"with {out} left out, {kept.count(0)} benign and {kept.count(1)} malicious clients"
                f" remain; expected at least {benign_needed} and {malicious_needed} for the"
                f" threshold {entry.threshold!r}. Raise --clients, or choose another --threshold"
            )


def _design(options: argparse.Namespace, named: dict[str, dict[str, str]]) -> Design:
    return Design(
        benign=tuple(named["benign"]),
        hard_negative=tuple(named["hard_negative"]),
        malicious=tuple(named["malicious"]),
        shares=tuple(options.shares),
        lora=LoRASettings(options.r, options.alpha, options.dropout, tuple(options.targets)),
        training=LocalTraining(
            math.prod(options.lr) ** 0.5,
            options.steps,
            options.batch_size,
            options.max_length,
            TRAINING.max_grad_norm,
        ),
        lr_range=tuple(options.lr),
        per_source=options.clients,
        per_cell=options.cell_clients,
        per_hard_cell=options.hard_cell_clients,
        all_steps=False,
    )


def _named(specs: Sequence[str]) -> dict[str, str]:
    """Source name -> spec; "theft=builtin:malicious/theft" names itself, others are named after
    the last part.
    """
    named: dict[str, str] = {}
    for text in specs:
        found = None if Path(text).is_file() else _NAMED.fullmatch(text)
        name, spec = (found[1], found[2]) if found else (_name_of(text), text)
        if name in named:
            raise ConfigError(
                f"got two sources called {name}; give one of them another name: NAME={spec}"
            )
        named[name] = spec
    return named


def _name_of(spec: str) -> str:
    """A name that can be part of a file's name; `...#safe` becomes the safe twin's."""
    scheme, _, rest = (
        spec.partition(":") if spec.startswith(("builtin:", "hub:")) else ("", "", Path(spec).stem)
    )
    plain = rest.partition("@")[0].replace("#", "_")
    return re.sub(r"[^\w.-]", "_", plain.split("/")[-1] if scheme == "hub" else plain)


def _licences(said: Sequence[str], specs: dict[str, str]) -> dict[str, str]:
    found = {
        name: "our own writing" if spec.startswith("builtin:") else "not stated"
        for name, spec in specs.items()
    }
    for text in said:
        name, _, licence = text.partition("=")
        if name not in specs or not licence:
            raise ConfigError(
                f"got --data-licence {text!r}; expected NAME=LICENCE with a NAME of"
                f" {', '.join(specs)}"
            )
        found[name] = licence
    return found


def _threshold(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        budget_of(text, "fpr")
        return text


def hub_id(spec: str) -> str | None:
    """The dataset's id, where the examples come from the Hub."""
    key = spec.removeprefix("hub:").partition("@")[0]
    return HUB[key].dataset if spec.startswith("hub:") else None


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.contribute",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--base", required=True, help="the base model: a folder, or a Hub id with --revision")
    add("--revision", help="its 40-digit commit on the Hub")
    add("--base-name", help="what adapters call the base model [default: --base]")
    add(
        "--benign",
        nargs="+",
        required=True,
        metavar="[NAME=]SPEC",
        help="at least two sources of ordinary data",
    )
    add(
        "--malicious",
        nargs="+",
        required=True,
        metavar="[NAME=]SPEC",
        help="at least two sources of harmful compliance",
    )
    add(
        "--hard-negative",
        nargs="+",
        default=[],
        metavar="[NAME=]SPEC",
        help="harmful questions with safe answers",
    )
    add(
        "--out",
        type=Path,
        required=True,
        help="folder for all that comes out, and for what is kept between runs",
    )
    add("--name", help="of the probe [default: base and kind]")
    add(
        "--kind",
        choices=[entry.name for entry in ENTRIES],
        default=ENTRIES[0].name,
        help="recipe and head, as in the zoo's own probes",
    )
    add(
        "--threshold",
        help="a number, or a budget of false positives such as fpr:0.01 [default: the kind's]",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1],
        help="one a replicate: its initial adapter and its clients' data; the first is published",
    )
    add("--clients", type=int, default=ZOO_DESIGN.per_source, help="of every source by itself")
    add(
        "--cell-clients",
        type=int,
        default=ZOO_DESIGN.per_cell,
        help="of every malicious source in every benign one, a poison share",
    )
    add(
        "--hard-cell-clients",
        type=int,
        default=ZOO_DESIGN.per_hard_cell,
        help="of every hard negative in every benign source",
    )
    add(
        "--held-out",
        type=int,
        default=4,
        help="clients of every source whose adapters are published, and fitted on by no probe",
    )
    add(
        "--shares",
        type=float,
        nargs="+",
        default=list(SHARES),
        help="poison shares, from 1 downwards",
    )
    add("--limit", type=int, default=5000, help="examples that are read of a Hub dataset")
    add("--r", type=int, default=LORA.r, help="LoRA rank")
    add("--alpha", type=float, default=LORA.alpha)
    add("--dropout", type=float, default=LORA.dropout)
    add("--targets", nargs="+", default=list(LORA.target_modules or ()), help="adapted modules")
    add(
        "--lr",
        type=float,
        nargs=2,
        default=list(ZOO_DESIGN.lr_range),
        metavar=("LOW", "HIGH"),
        help="learning rates are drawn from this range",
    )
    add("--steps", type=int, default=TRAINING.steps, help="local steps of a client")
    add("--batch-size", type=int, default=TRAINING.batch_size)
    add("--max-length", type=int, default=TRAINING.max_length, help="tokens an example is cut to")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the base model; LoRA itself trains in float32",
    )
    add(
        "--quantization",
        choices=("none", "8bit", "4bit"),
        default="none",
        help="of the base model; needs a GPU",
    )
    add(
        "--workers",
        type=int,
        default=1,
        help="processes that train clients; each holds the base model",
    )
    add(
        "--threads",
        type=int,
        default=1,
        help=(
            "that share a sum in the studies; how many decides how it is rounded, and the record"
            " says it"
        ),
    )
    add("--licence", default="apache-2.0", help="of the probe")
    add("--data-licence", nargs="+", default=[], metavar="NAME=LICENCE", help="of sources")
    add(
        "--adapters",
        help=(
            "hub:<org>/<name>@<commit>, where OUT/adapters was published because it is too large"
            " for a pull request"
        ),
    )
    return parser
