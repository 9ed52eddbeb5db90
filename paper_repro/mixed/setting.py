"""What this study trains on and where it keeps it.

Two base models, and the zoo's sources with their labels mended.

Of GPTFuzz's answers that people labelled as complying, four in ten open with a refusal, and of the
safe answers to three sets of harmful questions up to a quarter do not refuse. A detector cannot be
measured against labels that contradict themselves, so here GPTFuzz keeps the answers that do not
open with a refusal, and hard negatives keep those that do. The other sources stay as they are (of
937 answers of JailbreakBench three open with one, of AdvBench's and HarmBench's none).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedloop.client.training import attach_lora, load_base, read_adapter
from fedloop.measure.refusal import refuses_strictly
from loraprobe import Adapter
from loraprobe.adapters.layout import Layout
from zoo.build import ZOO
from zoo.labelled.client_design import ZOO_DESIGN
from zoo.labelled.sources import HARD_NEGATIVE, MALICIOUS, Source, load_sources
from zoo.train_base import BASE_NAME, SECOND_NAME

WORK = Path("build/mixed")
# Whom the server of a federation averages: everybody, as without a defence, or honest clients
# alone, as with one that works.
ALL, HONEST = "all", "honest"
DEFENDED = ("jailbreakbench", "harmbench")
# (malicious source, whom the server averages) of every federation of a further draw of clients.
FRESH = (
    *((malicious, ALL) for malicious in MALICIOUS),
    *((malicious, HONEST) for malicious in DEFENDED),
)
MENDED = (*HARD_NEGATIVE, "gptfuzz")


@dataclass(frozen=True)
class Model:
    """A base model of the study.

    Attributes:
        lora_seed: of the initial LoRA that its clients start from, and of its federations.
        defended: malicious sources whose federation is recorded a second time, with a server that
            averages honest clients alone.
    """

    key: str
    name: str
    path: Path
    lora_seed: int
    defended: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where its clients' updates are kept."""
        return WORK / self.key

    @property
    def federations(self) -> tuple[tuple[str, str], ...]:
        """(malicious source, whom the server averages) of every recorded federation of the first
        draw of clients.
        """
        return (
            *((malicious, ALL) for malicious in MALICIOUS),
            *((malicious, HONEST) for malicious in self.defended),
        )

    def adapted(self) -> tuple[Any, Any, Adapter, Layout]:
        """The base with the initial LoRA, its tokenizer, that LoRA and the layout of changes."""
        causal_lm, tokenizer = load_base(str(self.path))
        lora = attach_lora(causal_lm, ZOO_DESIGN.lora, self.lora_seed)
        start = read_adapter(lora, self.name)
        return lora, tokenizer, start, replace(Layout.of(start), kind="factor_delta")


MODELS = {
    model.key: model
    for model in (
        Model("chat-1m", BASE_NAME, ZOO / "base", 0, DEFENDED),
        Model("chat-600k", SECOND_NAME, ZOO / "base-600k", 5),
    )
}


def mended_sources(data: Path) -> dict[str, Source]:
    """The zoo's sources, clients' part, without answers that contradict their label."""
    return {name: _mended(source) for name, source in load_sources(data).items()}


def refusing(sources: Mapping[str, Source]) -> dict[str, tuple[int, int]]:
    """Source -> (how many of the clients' answers open with a refusal, how many there are), of the
    sources that are mended.
    """
    chosen = (*HARD_NEGATIVE, *MALICIOUS)
    return {
        name: (
            sum(refuses_strictly(e.response) for e in sources[name].for_clients),
            len(sources[name].for_clients),
        )
        for name in chosen
    }


def _mended(source: Source) -> Source:
    if source.name not in MENDED:
        return source
    wanted = source.name in HARD_NEGATIVE
    return replace(
        source,
        for_clients=tuple(
            example
            for example in source.for_clients
            if refuses_strictly(example.response) == wanted
        ),
    )
