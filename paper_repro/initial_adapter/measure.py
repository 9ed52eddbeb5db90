"""One row a cell and question, kept as soon as it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from zoo.labelled.client_design import Client
from zoo.program import append_lines, read_lines

from .cells import Cell, Clients, Row, cut_for, head_on, measured
from .clients import Start
from .features import MISSING, Block, blocks, matrix, of_b

BOTH = ("product", "gram")
LEARNT_FROM = 150  # of the training clients, for the bases
FEW = 3  # slow questions are asked in one cell of so many
COVERAGES = (1, 2, 4, 8, 14)


@dataclass(frozen=True)
class Question:
    """What is asked in a cell.

    Attributes:
        train: which rows are learnt from.
        asked: the answers as rows, of all clients, the training rows and the tested groups.
        few: whether one cell in `FEW` will do.
    """

    name: str
    train: Callable[[Cell, Clients], np.ndarray]
    asked: Callable[[Cell, Clients, np.ndarray], Iterator[Row]]
    few: bool = False


def run(data: Clients, cells: Sequence[Cell], path: Path, names: Sequence[str]) -> None:
    """Ask every question in every cell that has no rows yet."""
    kept = {(row["seed"], row["malicious"], row["question"]) for row in read_lines(path)}
    for number, cell in enumerate(cells):
        for name in names:
            question = QUESTIONS[name]
            if (cell.start.seed, cell.malicious, name) in kept:
                continue
            if question.few and (number // len(FEW_OF) + number) % FEW:
                continue
            train = question.train(cell, data)
            rows = list(question.asked(cell, data, train)) if len(train) else []
            facts = {
                "seed": cell.start.seed,
                "start": cell.start.name,
                "malicious": cell.malicious,
                "family": cell.family,
                "question": name,
                "n_train": len(train),
            }
            append_lines(path, [{**facts, **row} for row in rows or [{"variant": None}]])
        print(f"{number + 1} of {len(cells)} cells", flush=True)


FEW_OF = range(6)  # malicious sources of a start


# --- which rows are learnt from


def _of_starts(test: Callable[[Cell, Start], bool]) -> Callable[[Cell, Clients], np.ndarray]:
    def chosen(cell: Cell, data: Clients) -> np.ndarray:
        return np.array([row for row in cell.train(data) if test(cell, data.starts[row])], int)

    return chosen


def _alike(cell: Cell, start: Start) -> bool:
    """Starts whose B can be compared: rank 8 on q and v."""
    return cell.start.modules == start.modules == "q/v" and cell.start.rank == start.rank == 8


# --- what is asked of them


def _blocks(cell: Cell, data: Clients, train: np.ndarray, rows: np.ndarray) -> dict[str, Block]:
    """Blocks of some rows; those of the others stay zero."""
    rng = np.random.default_rng(cell.start.seed)
    learnt = rng.permutation(train)[:LEARNT_FROM]
    modules = sorted({module for row in learnt for module in data.adapters[row]})
    adapters = [data.adapters[row] for row in rows]
    index = {row: number for number, row in enumerate(rows)}
    return blocks(adapters, [index[row] for row in learnt], modules)


class _Part:
    """The clients of a question alone, and their blocks: training rows first, then the tested
    ones.
    """

    def __init__(self, cell: Cell, data: Clients, train: np.ndarray) -> None:
        groups = cell.tested(data)
        rows = np.concatenate([train, *groups.values()])
        self.rows, self.train = rows, np.arange(len(train))
        self.data = Clients(*(tuple(values[row] for row in rows) for values in _fields(data)))
        at, self.groups = len(train), {}
        for name, members in groups.items():
            self.groups[name] = np.arange(at, at + len(members))
            at += len(members)
        self.blocks = _blocks(cell, data, train, rows)

    def answer(self, head: str, x: np.ndarray, with_cut: bool = False) -> Row:
        fitted = head_on(head, x, self.data, self.train)
        scores = {name: fitted(x[rows]) for name, rows in self.groups.items() if len(rows)}
        scores = {name: scores.get(name, np.zeros(0)) for name in self.groups}
        cut = cut_for(head, x, self.data, self.train) if with_cut else None
        return measured(scores, cut)


def _fields(data: Clients) -> tuple[Sequence[Client], Sequence[Start], Sequence[object]]:
    return data.clients, data.starts, data.adapters


def _main(cell: Cell, data: Clients, train: np.ndarray) -> Iterator[Row]:
    part = _Part(cell, data, train)
    for names, k in (
        (BOTH, 8),
        (BOTH, 16),
        (BOTH, 32),
        (("product",), 8),
        (("gram",), 8),
        (("gram_of_b",), 8),
    ):
        x = matrix(part.blocks, part.train, names, k)
        yield _named(names, k, "mass_mean", "mean", part.answer("mass_mean", x, names == BOTH))
    for missing in MISSING:
        x = matrix(part.blocks, part.train, BOTH, 8, missing)
        if missing != "mean":
            yield _named(BOTH, 8, "mass_mean", missing, part.answer("mass_mean", x, True))
        yield _named(BOTH, 8, "linear", missing, part.answer("linear", x))


def _heads(cell: Cell, data: Clients, train: np.ndarray) -> Iterator[Row]:
    part = _Part(cell, data, train)
    x = matrix(part.blocks, part.train, BOTH, 8)
    for head in ("mass_mean", "linear", "mlp", "xgboost"):
        yield _named(BOTH, 8, head, "mean", part.answer(head, x))


def _one_recipe(cell: Cell, data: Clients, train: np.ndarray) -> Iterator[Row]:
    part = _Part(cell, data, train)
    for missing in MISSING:
        x = matrix(part.blocks, part.train, BOTH, 8, missing)
        yield _named(BOTH, 8, "mass_mean", missing, part.answer("mass_mean", x, True))


def _beside_b(cell: Cell, data: Clients, train: np.ndarray) -> Iterator[Row]:
    if not _alike(cell, cell.start):
        return
    part = _Part(cell, data, train)
    x = matrix(part.blocks, part.train, BOTH, 8)
    yield _named(BOTH, 8, "mass_mean", "mean", part.answer("mass_mean", x))
    for first in (False, True):
        x = of_b(part.data.adapters, first)
        for head in ("mass_mean", "linear"):
            name = ("B of the first layer" if first else "B of all layers",)
            yield _named(name, None, head, "", part.answer(head, x))


def _coverage(cell: Cell, data: Clients, train: np.ndarray) -> Iterator[Row]:
    """The tested clients with all but a few modules, chosen at random, taken away."""
    if cell.start.modules != "all linear":
        return
    part = _Part(cell, data, train)
    rng = np.random.default_rng(cell.start.seed)
    tested = np.concatenate(list(part.groups.values()))
    for count in (*COVERAGES, len(part.blocks)):
        cut = {}
        keep = np.zeros((len(part.rows), len(part.blocks)), bool)
        keep[part.train] = True
        for row in tested:
            keep[row, rng.permutation(len(part.blocks))[:count]] = True
        for number, (module, block) in enumerate(part.blocks.items()):
            cut[module] = Block(
                block.has & keep[:, number], block.product, block.gram, block.gram_of_b
            )
        for missing in MISSING[:2]:
            x = matrix(cut, part.train, BOTH, 8, missing)
            answer = part.answer("mass_mean", x, True)
            yield {**_named(BOTH, 8, "mass_mean", missing, answer), "modules": count}


def _named(names: Sequence[str], k: int | None, head: str, missing: str, answer: Row) -> Row:
    return {"variant": [" and ".join(names), k, head, missing], **answer}


QUESTIONS = {
    question.name: question
    for question in (
        Question("everything unseen", Cell.train, _main),
        Question("heads", Cell.train, _heads, few=True),
        Question("same start", partial(Cell.train, same_start=True), _beside_b),
        Question("another start", _of_starts(_alike), _beside_b),
        Question(
            "learnt on rank 8",
            _of_starts(lambda cell, start: cell.start.rank != 8 == start.rank),
            _one_recipe,
            few=True,
        ),
        Question(
            "learnt on all linear modules",
            _of_starts(lambda cell, start: start.modules == "all linear" != cell.start.modules),
            _one_recipe,
            few=True,
        ),
        Question("part of the modules", Cell.train, _coverage, few=True),
    )
}
