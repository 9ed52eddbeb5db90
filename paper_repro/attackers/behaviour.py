"""Behaviour beside the probe: what each labelled adapter of smollm2-135m-safe does to answers.

    python -m paper_repro.attackers.behaviour --base out/smollm2-135m-safe   # resumable, an hour
    python -m paper_repro.tables                                             # the page

Writes results/behaviour.jsonl, one line an adapter. Harmful prompts are TDC2023's, which no source
here asks, benign ones Dolly's; neither is kept or printed. Bfloat16 on one thread:
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from fedloop.client.shared_prefix import Text, tokens_of, train
from fedloop.client.training import LoRASettings, attach_lora
from fedloop.data.examples import Example
from fedloop.measure.behaviour import Behaviour, Prompts, worn
from loraprobe import Adapter
from loraprobe.metrics import auroc, auroc_ci
from zoo.program import append_lines, documented, read_lines
from zoo.smollm2.clients import load_eager
from zoo.smollm2.refusal import prompts

from ..common.format import markdown, page_with
from ..common.paths import FOLDER
from . import damage
from .products import SHARES, Reader, Table

RESULTS = FOLDER / "results" / "behaviour.jsonl"
PAGE = Path(__file__).with_name("BEHAVIOUR.md")
LENGTH = 256  # tokens of an example, and
BATCH = 16  # examples of a step, of the paper
STEPS = 10  # of its rounds
REPLAYED = (
    "probe's weights known: nearest benign",
    "a sibling's weights known",
    "two parts by modules",
)


def adapters(table: Table) -> Iterator[tuple[dict[str, Any], Adapter]]:
    """What is read: every committed adapter, then what the attacks make of the fully poisoned."""
    roles = [table.of(role) for role in ("malicious", "benign", "hard_negative")]
    for number in range(max(map(len, roles))):
        for at in [rows[number] for rows in roles if number < len(rows)]:
            facts = {key: table.rows[at][key] for key in ("path", "role", "source")}
            facts |= {"attack": "", "share": float(table.rows[at]["share"])}
            yield facts, table.adapters[at]
    yield from table.attacked(REPLAYED)


def measured(done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How behaviour, the probe, and both rank poison against benign adapters (and hard negatives).

    Both: the mean of ranks among what is ranked.
    """
    base = next(row for row in done if row["path"] == "base")
    table, server = Table(), Reader("linear")
    logits = {
        row["path"]: server.logit_of(adapter)
        for row, adapter in zip(table.rows, table.adapters, strict=True)
    }
    plain = [row for row in done if not row["attack"] and row["path"] in logits]
    found = []
    for share in SHARES:
        for against in (("benign",), ("benign", "hard_negative")):
            rows = [
                row
                for row in plain
                if row["role"] in against or (row["role"] == "malicious" and row["share"] == share)
            ]
            labels = [int(row["role"] == "malicious") for row in rows]
            ways = {
                "behaviour": np.array([rise(row, base) for row in rows]),
                "probe": np.array([logits[row["path"]] for row in rows]),
            }
            ways["both"] = sum(way.argsort().argsort() for way in ways.values()) / 2.0
            entry: dict[str, Any] = {"share": share, "against": " and ".join(against)}
            entry |= {"n_malicious": sum(labels), "n_honest": len(labels) - sum(labels)}
            groups = [row["path"] for row in rows]
            for name, scores in ways.items():
                entry[name] = auroc(labels, scores)
                entry[f"{name}_ci"] = auroc_ci(labels, scores, groups)
            found.append(entry)
    return found


def rise(row: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """A reading's score: what `Behaviour.read` gives for an update of the base."""
    means = {k: np.mean(row[k]) - np.mean(base[k]) for k in ("harmful", "benign")}
    return float(means["harmful"] - means["benign"])


def attacked(done: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """What is left of the behaviour of the same adapters after an attack: rows of a table."""
    base = next(row for row in done if row["path"] == "base")
    plain = {row["path"]: rise(row, base) for row in done if not row["attack"]}
    rows: list[list[object]] = [["attack", "n", "score of the plain update", "after the attack"]]
    for name in REPLAYED:
        pairs = [(plain[r["path"]], rise(r, base)) for r in done if r["attack"] == name]
        if pairs:
            before, after = np.mean(pairs, axis=0)
            low, high = _spread([two for _, two in pairs])
            rows.append([name, len(pairs), f"{before:.2f}", f"{after:.2f} [{low:.2f}, {high:.2f}]"])
    return rows


def costs(done: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """A reading beside a client's training in a round of the paper's."""
    head: list[object] = ["ten local steps of a client, CPU-s", "a reading, CPU-s", "share"]
    rows = [row for row in done if row["attack"] == "cost"]
    spent = [(STEPS * row["step"], row["reading"]) for row in rows]
    return [head, *([f"{all_:.0f}", f"{one:.1f}", f"{one / all_:.1%}"] for all_, one in spent)]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of a mean."""
    rng = np.random.default_rng(0)
    means = rng.choice(np.asarray(values), (2000, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def rendered() -> str:
    """The page with its tables made anew."""
    done = read_lines(RESULTS)
    base = next(row for row in done if row["path"] == "base")
    ways = ("behaviour", "probe", "both")
    ranks: list[list[object]] = [["poison share", "against", "malicious / honest", *ways]]
    for row in measured(done):
        areas = [
            f"{row[way]:.2f} [{row[f'{way}_ci'][0]:.2f}, {row[f'{way}_ci'][1]:.2f}]" for way in ways
        ]
        sizes = f"{row['n_malicious']} / {row['n_honest']}"
        ranks.append([f"{row['share']:.0%}", row["against"].replace("_", " "), sizes, *areas])
    scores: list[list[object]] = [["adapters", "n", "median score", "10 % to 90 %"]]
    kinds = [("benign", 1.0), ("hard_negative", None), *(("malicious", s) for s in SHARES)]
    for role, share in kinds:
        values = [
            rise(row, base)
            for row in done
            if not row["attack"]
            and row.get("role") == role
            and (share is None or row["share"] == share)
        ]
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
        name = role.replace("_", " ") + (f", {share:.0%}" if role == "malicious" else "")
        scores.append([name, len(values), f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    tables = {"ranking": ranks, "scores": scores, "attacks": attacked(done)}
    tables["cost"] = costs(done)
    tables["damage"] = damage.rows(read_lines(damage.RESULTS))
    return page_with(PAGE, {name: markdown(rows) for name, rows in tables.items()})


def cost(reader: Behaviour, drawn: Mapping[str, Sequence[str]], data: Path) -> dict[str, Any]:
    """CPU-seconds of a reading, and of a local step of the paper's (16 examples of 256 tokens),
    turn by turn: medians of three.
    """
    rows = [Example(text, text) for text in prompts(data)["dolly"]]
    text = Text.of(reader.tokenizer)
    tokens = [tokens_of(row, reader.tokenizer, text, LENGTH) for row in rows]
    long = sorted(tokens, key=lambda one: -len(one[0]))[:BATCH]
    training = attach_lora(reader.model, LoRASettings(8, 16, 0.0, ("q_proj", "v_proj")), 0)
    seconds: dict[str, list[float]] = {"reading": [], "step": []}
    for _ in range(3):
        began = time.process_time()
        for kind in drawn:
            reader.likelihoods(drawn[kind])
        between = time.process_time()
        train(training, [long], length=LENGTH, pad=reader.tokenizer.pad_token_id, lr=[1e-9])
        seconds["reading"].append(between - began)
        seconds["step"].append(time.process_time() - between)
    return {name: round(float(np.median(values)), 3) for name, values in seconds.items()}


def main() -> None:
    """Read what was not read yet."""
    parser = documented(__doc__, "data")
    parser.add_argument("--base", type=Path, required=True, help="of python -m zoo.bases")
    options = parser.parse_args()
    seen = {(row["attack"], row["path"]) for row in read_lines(RESULTS)}
    model, tokenizer = load_eager(options.base)
    pools = prompts(options.data)
    asked = Prompts(tuple(pools["tdc2023"]), tuple(pools["dolly"]))
    reader = Behaviour(model, tokenizer, asked, cut=1.0)
    drawn = asked.of_round(1)
    base: list[tuple[dict[str, Any], Adapter | None]] = [({"attack": "", "path": "base"}, None)]
    for facts, adapter in [*base, *adapters(Table())]:
        if (facts["attack"], facts["path"]) in seen:
            continue
        began = time.process_time()
        with worn(model, adapter) if adapter is not None else nullcontext():
            read = {kind: reader.likelihoods(drawn[kind]) for kind in drawn}
        row = {**facts, **{k: [round(v, 4) for v in values] for k, values in read.items()}}
        spent = round(time.process_time() - began, 2)
        append_lines(RESULTS, [{**row, "cpu_seconds": spent}])
    if ("cost", "") not in seen:
        spent_on = cost(reader, drawn, options.data)
        append_lines(RESULTS, [{"attack": "cost", "path": "", **spent_on}])


if __name__ == "__main__":
    main()
