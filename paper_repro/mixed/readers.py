"""What reads an update in this study: a recipe, a head, and how its cut is found.

And probes fitted with chosen kinds of data left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from loraprobe.adapters.layout import unpack
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.fit.fit import fit_features
from loraprobe.probe import Probe
from zoo.labelled.client_design import SHARES, Client, twin_of
from zoo.labelled.deltas import DeltaSet
from zoo.labelled.sources import HARD_NEGATIVE
from zoo.labelled.unseen_sources import Cell, unseen_cells

BUDGET = 0.02  # of false positives, of every rule in this study


@dataclass(frozen=True)
class Reader:
    """How updates are read.

    Attributes:
        threshold: None where only the ranking is measured: a cut of its own would take four fits a
            cell.
        by_kind: whether the cut comes from kinds of data that were left out of training.
    """

    name: str
    recipe: FeatureRecipe
    head: str
    threshold: float | str | None = None
    by_kind: bool = False


READERS = (
    Reader("paper", FeatureRecipe.paper(), "linear_paper", 0.8),
    Reader("linear", FeatureRecipe.all_b(), "linear"),
    Reader("mass-mean", FeatureRecipe.all_b(), "mass_mean", f"fpr:{BUDGET}", by_kind=True),
)


def kinds_of(client: Client) -> tuple[str, ...]:
    """What a client trained on: its source, then what that is mixed into."""
    return (client.source,) if client.source == client.host else (client.source, client.host)


def unseen_in(malicious: str, *others: str) -> frozenset[str]:
    """What is left out of training where an attack is to be unknown.

    Its source, the safe answers to its questions, and other kinds.
    """
    return frozenset({malicious, twin_of(malicious), *others})


class Reading:
    """The features of all labelled clients as one reader sees them, and probes fitted on any part
    of them.
    """

    def __init__(self, deltas: DeltaSet, reader: Reader) -> None:
        self.deltas, self.reader = deltas, reader
        adapters = deltas.adapters()
        self.featurizer = Featurizer.fit(reader.recipe, adapters)
        self.features = self.featurizer(adapters)  # (n, p)
        self.clients = deltas.clients
        self.labels = np.array([client.label for client in self.clients])
        self._probes: dict[frozenset[str], Probe] = {}

    @cached_property
    def kinds(self) -> list[tuple[str, ...]]:
        """Every client's kinds of data."""
        return [kinds_of(client) for client in self.clients]

    @cached_property
    def cells(self) -> dict[tuple[str, str], Cell]:
        """Who is tested in every cell of unseen sources."""
        return unseen_cells(self.clients, SHARES, anywhere=HARD_NEGATIVE)

    def with_kind(self, kinds: Iterable[str]) -> np.ndarray:
        """(n,) which clients hold any of these kinds."""
        wanted = set(kinds)
        return np.array([bool(wanted & set(own)) for own in self.kinds])

    def probe(self, unseen: frozenset[str], with_cut: bool) -> Probe:
        """Fitted on the clients that hold nothing of `unseen`.

        Without a cut of its own only its ranking counts.
        """
        if unseen not in self._probes:
            self._probes[unseen] = self._fit(unseen, with_cut)
        return self._probes[unseen]

    def _fit(self, unseen: frozenset[str], with_cut: bool) -> Probe:
        rows = np.flatnonzero(~self.with_kind(unseen))
        threshold = self.reader.threshold if with_cut and self.reader.threshold is not None else 0.5
        options: dict[str, Any] = (
            {"kinds": [self.kinds[row] for row in rows]} if self.reader.by_kind else {}
        )
        names = [self.clients[row].name for row in rows]
        return fit_features(
            self.featurizer,
            self.features[rows],
            self.labels[rows],
            head=self.reader.head,
            groups=names,
            threshold=threshold,
            **options,
        )

    def features_of(self, packed: np.ndarray) -> np.ndarray:
        """Packed deltas (n, d) of the labelled clients' layout -> (n, p) float32."""
        rows = torch.from_numpy(packed.astype(np.float32))
        return self.featurizer(
            [unpack(row, self.deltas.layout, base_model=self.deltas.base_model) for row in rows]
        )
