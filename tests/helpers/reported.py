"""A run of six rounds as the tests of its page write it down, and a page as they read it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from fedloop.config import Config
from fedloop.defense.types import RoundRecord

ROUNDS, CLIENTS = 6, 10
HOSTILE = (
    "<script>x()</script>",
    '" onload="x()',
    "_a $\\frac{1}{$ &lt;",
    "b\u202ec\x00\n\ud800 \U0001f600",
    "d" * 5000,
)
MALICIOUS, HARD = (1, 4, 8), (3, 6)


def config(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "five rounds & a bit",
        "rounds": ROUNDS,
        "model": {"base": "models/chat", "name": "tiny/chat"},
        "clients": {
            "count": CLIENTS,
            "benign": ["builtin:benign"],
            "malicious": 3,
            "malicious_source": "builtin:malicious",
            "poison_share": 0.5,
            "hard_negatives": 2,
            "hard_negative_source": "builtin:refusals",
        },
        "defense": {"level": "cumulative", "probe": "zoo/probes/linear"},
        "evaluation": {"harmful": "builtin:harmful_prompts", "every": 3},
    }
    return {**values, **changes}


def role(number: int) -> str:
    return "malicious" if number in MALICIOUS else "hard_negative" if number in HARD else "benign"


def names() -> list[str]:
    return [f"client-{number:02d}" for number in range(CLIENTS)]


def spoken(client: str) -> str:
    return role(names().index(client)).replace("_", " ")


def roles() -> dict[str, dict[str, Any]]:
    sources = {
        "malicious": ("builtin:malicious", 0.5),
        "hard_negative": ("builtin:refusals", 1.0),
        "benign": ("builtin:benign", 1.0),
    }
    return {
        name: {"role": role(i), "source": sources[role(i)][0], "share": sources[role(i)][1]}
        for i, name in enumerate(names())
    }


def records() -> list[RoundRecord]:
    """Six rounds of eight out of ten clients.

    One is refused, one round is skipped, the model is measured twice.
    """
    rng = np.random.default_rng(7)
    made = []
    bad = {names()[i] for i in MALICIOUS}
    for number in range(1, ROUNDS + 1):
        chosen = [names()[i] for i in sorted(rng.choice(CLIENTS, 8, replace=False))]
        nonsense = {chosen[2]: "NonFiniteError: 3 of 4096 numbers are not finite"}
        reasons = nonsense if number in (2, 5) else {}
        means = {name: 0.35 + 0.1 * number if name in bad else 0.15 for name in chosen}
        drawn = {name: rng.normal(means[name], 0.06) for name in chosen if name not in reasons}
        scores = {name: (float(np.clip(value, 0, 1)),) for name, value in drawn.items()}
        factors = {name: float(scores.get(name, (1.0,))[0] < 0.6) for name in chosen}
        starts = {name: 1.4 if name in bad else 2.2 for name in chosen}
        fallen, total, share = math.exp(-0.15 * number), sum(factors.values()), 0.4 + 0.08 * number
        skipped, measured = number == 4, number % 3 == 0
        metrics = {
            "refusal_rule": round(100 * share) / 100,
            "refusal_strict": round(90 * share) / 100,
            "n_refusal": 100,
            "over_refusal_strict": 3 / 50,
            "n_over_refusal": 50,
            "loss": 2.5 - 0.1 * number,
            "rouge_l": 0.21,
            "n_utility": 40,
        }
        times = {"train": 8.0 + 0.1 * number, "evidence": 0.25, "assess": 0.04, "aggregate": 0.01}
        weights = {} if skipped else {name: factor / total for name, factor in factors.items()}
        made.append(
            RoundRecord(
                round=number,
                scores=scores,
                factors=factors,
                weights=weights,
                reasons=reasons,
                num_examples=dict.fromkeys(scores, 40),
                skipped=skipped,
                losses={name: starts[name] * fallen + rng.normal(0, 0.03) for name in chosen},
                seconds={**({"evaluate": 3.0} if measured else {}), **times},
                bytes={"update": 8 * 65536, "evidence": 8 * 1024},
                metrics=metrics if measured else {},
            )
        )
    return made


def save(
    run: Path, of: list[RoundRecord], about: dict[str, Any] | None = None, **changes: Any
) -> Path:
    run.mkdir(exist_ok=True)
    files = {
        "config.json": json.dumps(Config.of(config(**changes)).model_dump(mode="json")),
        "clients.json": json.dumps(roles() if about is None else about),
        "records.jsonl": "".join(record.to_json() + "\n" for record in of),
    }
    for name, text in files.items():
        (run / name).write_text(text, encoding="utf-8")
    return run


class Page(HTMLParser):
    """What a browser would make of the page: tags with attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.in_svg: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "use", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, "tags that overlap"

    def handle_data(self, data: str) -> None:
        (self.in_svg if "svg" in self.open else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())


HTML_TAGS = {
    *"html head meta title style body main section h1 h2 p div b span i".split(),
    *"table thead tbody tr th td figure figcaption details summary pre".split(),
}
SVG_TAGS = {"svg", "g", "defs", "path", "use", "text", "clippath", "rect"}


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))
