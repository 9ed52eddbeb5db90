"""Run the federations of the table, a line of JSON a run: results/federation.jsonl.

    python -m paper_repro.federation.prepare out/clients/safe zoo/adapters/smollm2-135m-safe
    python -m paper_repro.federation.run --worker 0 --workers 2     # and 1 beside it; resumable
    python -m paper_repro.federation.run --cell ours/5/0.5/maliciousgen/0    # one, compared

Hours on two cores; --dry-run says how many. In bfloat16, one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from fedloop.config import Config
from fedloop.data.corpora import load_corpus
from fedloop.run.build import build_clients
from fedloop.run.plan import plan_round
from loraprobe import Adapter
from loraprobe.adapters.layout import pack
from zoo.program import documented

from ..common.paths import RESULTS
from ..grid.lines import append_line
from .cells import ATTACKS, BASE, LR, WORK, Cell, table
from .engine import Federation, Trainer, reference_of
from .measure import measured
from .screens import Screen, rival

LINES = RESULTS / "federation.jsonl"
REFERENCE_STEPS = 20
Line = dict[str, Any]


def main() -> None:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--row", help="only this one")
    made.add_argument("--cell", help="run one again and compare it with its line")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--worker", type=int, default=0)
    made.add_argument("--workers", type=int, default=1)
    made.add_argument("--dry-run", action="store_true")
    options = made.parse_args()
    if options.cell:
        _again(Cell.named(options.cell), options)
        return
    cells = [cell for cell in table(tuple(options.seeds)) if options.row in (None, cell.row)]
    todo = missing(cells, read_lines(), options.work, options.base)
    print(
        f"{len(cells) - len(todo)} of {len(cells)} runs are there, {outlook(len(todo))}", flush=True
    )
    if options.dry_run:
        return
    trainer = None
    for cell in todo:
        if ATTACKS.index((cell.malicious, cell.share)) % options.workers != options.worker:
            continue  # rows of one attack share their first round, and more
        trainer = trainer or Trainer(cell.config(options.work, options.base), options.work / "kept")
        line = run(cell, trainer, options.work, options.base)
        append_line(line, LINES)
        print(time.strftime("%H:%M:%S"), cell, line["refused"], line["factors"], flush=True)


def parser(about: str | None, *options: str) -> argparse.ArgumentParser:
    """The options that every program with federations has."""
    made = documented(about, *options)
    made.add_argument("--work", type=Path, default=WORK, help="of paper_repro.federation.prepare")
    made.add_argument("--base", type=Path, default=BASE, help="of zoo.bases")
    return made


def missing(cells: list[Cell], lines: list[Line], work: Path, base: Path) -> list[Cell]:
    """The cells without a line of their configuration."""
    done = {line["cell"]: line["config"] for line in lines}
    return [cell for cell in cells if done.get(str(cell)) != cell.digest(work, base)]


def outlook(count: int) -> str:
    """How long so many runs take, by the processor time of those that are written down."""
    spent = [line["seconds"] for line in read_lines()]
    if not spent or not count:
        return f"{count} to do"
    hours = count * sum(spent) / len(spent) / 3600
    return f"{count} to do: about {hours:.1f} hours of one core"


def run(cell: Cell, trainer: Trainer, work: Path, base: Path) -> Line:
    """One federation, as the line that is kept of it."""
    config = cell.config(work, base)
    began = time.process_time()
    federation = Federation(trainer, config, screen_of(cell, trainer, work))
    told = play(federation)
    found = measured_once(federation, work)
    return {
        "cell": str(cell),
        "row": cell.row,
        "malicious": cell.malicious,
        "share": cell.share,
        "source": cell.source,
        "seed": cell.seed,
        "config": cell.digest(work, base),
        **found,
        **told,
        "seconds": round(time.process_time() - began, 1),
    }


def play(federation: Federation) -> Line:
    """All rounds of a federation: who counted, what was scored and what it cost."""
    clients = build_clients(federation.config)
    rounds = []
    for number in range(1, federation.config.rounds + 1):
        played = federation.round(plan_round(federation.config, number), clients)
        record = played.record()
        kept = federation.kept[-1]
        factors = {c: f * kept.get(c, True) for c, f in record.factors.items()}
        rounds.append((record, factors))
    roles = {client.client_id: client.role for client in clients}
    return {
        "factors": {
            role: [
                round(_mean([f for c, f in factors.items() if roles[c] == role]), 4)
                for _, factors in rounds
            ]
            for role in ("benign", "malicious")
            if role in roles.values()
        },
        "clients": {
            client: round(_mean([factors[client] for _, factors in rounds]), 4) for client in roles
        },
        "malicious_clients": sorted(c for c, role in roles.items() if role == "malicious"),
        "scores": {
            client: [round(r.scores[client][-1], 4) for r, _ in rounds if client in r.scores]
            for client in roles
        },
        "skipped": sum(record.skipped for record, _ in rounds),
        "bytes": sum(record.bytes["update"] for record, _ in rounds),
        "seconds_training": round(federation.cpu, 1),
        "seconds_defense": round(sum(r.seconds.get("assess", 0) for r, _ in rounds), 3),
    }


def measured_once(federation: Federation, work: Path) -> Line:
    """What `measured` says; runs that end with the same LoRA are measured once."""
    vector = pack(federation.lora)[0].numpy().tobytes()
    path = work / "measured" / f"{hashlib.sha256(vector).hexdigest()[:32]}.json"
    if not path.is_file():
        found = measured(*federation.model_for_measuring(), work / "data")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    line: Line = json.loads(path.read_text(encoding="utf-8"))
    return line


def screen_of(cell: Cell, trainer: Trainer, work: Path) -> Screen | None:
    """What tells clients apart beside the defence."""
    return rival(cell.screen, harmful_reference(cell, trainer, work)) if cell.screen else None


def harmful_reference(cell: Cell, trainer: Trainer, work: Path) -> Adapter:
    """The rival's one harmful fine-tune, of the source that this cell's attacker does not use."""
    examples = load_corpus(str(work / "data" / f"{cell.other_source}.jsonl")).examples
    return reference_of(trainer, examples, REFERENCE_STEPS, LR)


def read_lines(path: Path = LINES) -> list[Line]:
    """The latest line of every cell; a last one that was cut off is left out."""
    if not path.is_file():
        return []
    *whole, _cut_off = path.read_text(encoding="utf-8").split("\n")
    found = map(json.loads, whole)
    return list({line["cell"]: line for line in found}.values())


def _again(cell: Cell, options: argparse.Namespace) -> None:
    """Run a cell once more and say whether it comes out as it is written down."""
    config: Config = cell.config(options.work, options.base)
    line = run(cell, Trainer(config, options.work / "again"), options.work, options.base)
    kept = {one["cell"]: one for one in read_lines()}.get(str(cell))
    same = ("refused", "factors", "clients", "loss", "rouge_l", "right")
    if kept is None:
        raise SystemExit(f"{cell} has no line yet; it gives { ({n: line[n] for n in same}) }")
    other = {name: (kept[name], line[name]) for name in same if kept[name] != line[name]}
    if other:
        raise SystemExit(f"{cell}: {other}")
    print(f"{cell}: as it is written down")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


if __name__ == "__main__":
    main()
