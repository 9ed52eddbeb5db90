"""From well-formed updates to the scores that a level reads, a block of clients at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraprobe.adapters.adapter import Adapter
from loraprobe.featurizer import Featurizer
from loraprobe.heads import LinearHead
from loraprobe.probe import Probe

from ..errors import ConfigError, EvidenceError
from .accumulate import FeatureMean
from .accumulate import State as Features
from .levels import LAST_STEP, SHADOW_GRADIENT, SHADOW_STEPS, UPDATE_FEATURES, Level
from .screening import UNREADABLE, Checked, Reading, reason

Vector = NDArray[Any]
MOST_NOISE = 1.0  # of a sketch, in log odds
_BLOCK = 256  # clients: of a probe of 40,960 features, 84 MB of float64


@dataclass
class Scored:
    """What was scored of a round.

    Attributes:
        scores: client -> P(malicious), (n_steps,).
        reasons: client -> why there is no score of it; its features stay as they were.
        features: the accumulator's state after the round.
    """

    features: Features
    scores: dict[str, Vector] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorer:
    """A probe and a level that fit together.

    Raises:
        ConfigError: the level normalises means of features that are no unit vectors, so that the
            probe would be given what it was never fitted on; or it keeps a sketch of features for
            a head that is not linear, which sees noise in it, or too small a one for a linear head;
            or it reads shadows, which start from another LoRA than the one a probe of weight
            changes needs.
    """

    probe: Probe
    level: Level

    def __post_init__(self) -> None:
        featurizer = self.probe.featurizer
        accumulator = self.level.accumulator
        if accumulator is not None and accumulator.normalize and not makes_unit_vectors(featurizer):
            advice = (
                "evidence='shadow_steps'"
                if self.level.evidence == SHADOW_GRADIENT
                else "normalize=False"
            )
            raise ConfigError(
                f"level {self.level.name!r}: it scales mean features to length 1, and this probe's"
                f" features {featurizer.recipe.features} are no unit vectors; expected {advice}, or"
                " a probe on one block of features with normalize='l2'"
            )
        if accumulator is not None and accumulator.sketch is not None:
            self._check_sketch(accumulator.sketch)
        shadows = self.level.evidence in (SHADOW_STEPS, SHADOW_GRADIENT)
        factors = featurizer.layout.kind == "factor_delta" and not featurizer.recipe.reads_product
        if shadows and not factors:
            raise ConfigError(
                f"level {self.level.name!r} reads {self.level.evidence}, changes of factors since"
                " the fixed initial LoRA; this probe reads products: expected a level of submitted"
                " updates or local steps, or a probe that reads factors (all_b, paper)"
            )

    def _check_sketch(self, sketch: int) -> None:
        head = self.probe.head
        if not isinstance(head, LinearHead):
            raise ConfigError(
                f"level {self.level.name!r}: its sketch keeps sums of features, which a linear head"
                f" can read; this probe's head is {head.name!r}: expected sketch=None, or a probe"
                " with a linear head"
            )
        length = float(np.linalg.norm(head.coef))
        noise, least = length / math.sqrt(sketch), math.ceil((length / MOST_NOISE) ** 2)
        if noise > MOST_NOISE:
            fits = least < self.probe.featurizer.num_features
            raise ConfigError(
                f"level {self.level.name!r}: a sketch of {sketch:,} numbers moves this probe's log"
                f" odds by {noise:.1f} (one standard deviation, features of length 1), and"
                f" {MOST_NOISE:g} is the most that leaves a verdict; expected"
                f" {f'at least {least:,}' if fits else 'sketch=None'}"
            )

    def score(
        self,
        features: Features,
        checked: Mapping[str, Checked],
        clients: Sequence[str],
        reading: Reading,
    ) -> Scored:
        """Score the evidence of these clients.

        Args:
            features: the accumulator's state before the round; it is not changed.
        """
        scored = Scored(features)
        for block in self._blocks(clients):
            evidence: dict[str, Vector] = {}
            for client in block:
                try:
                    evidence[client] = self._evidence(checked[client], reading)
                except UNREADABLE as error:
                    scored.reasons[client] = reason(error)
            if self.level.accumulator is None:
                scored.scores |= evidence
            elif evidence:
                self._add(scored, self.level.accumulator, evidence)
        return scored

    def together(self, delta: Adapter, reading: Reading) -> str:
        """Why a round's aggregate must not be applied, by its score; "" if it may be."""
        try:
            score = float(self.probe.score_features(self.probe.featurizer([reading(delta)]))[0])
        except UNREADABLE as error:
            return reason(error)
        cut = self.level.threshold
        return f"score {score:.3f}; the cut is {cut:.3f}" if score >= cut else ""

    def _blocks(self, clients: Sequence[str]) -> Iterator[Sequence[str]]:
        """Clients whose evidence is in memory at a time: all where a median is subtracted."""
        accumulator = self.level.accumulator
        size = len(clients) if accumulator and accumulator.relative else _BLOCK
        return (clients[start : start + size] for start in range(0, len(clients), size or 1))

    def _evidence(self, update: Checked, reading: Reading) -> Vector:
        """What the level reads of one update.

        Scores (n_steps,), or a feature vector (p,) where features accumulate.
        """
        evidence = self.level.evidence
        steps = (update.delta,) if evidence in (LAST_STEP, UPDATE_FEATURES) else update.steps
        if not steps:
            raise EvidenceError(f"missing evidence: level reads {evidence!r} and no step was sent")
        if evidence == SHADOW_GRADIENT and len(steps) != 1:
            raise EvidenceError(f"got {len(steps)} steps of evidence; expected one shadow gradient")
        self.probe.check_start(update.delta)  # steps are none, or lead to it
        rows, coverages = self.probe.featurizer.read([reading(step) for step in steps])
        if not all(coverage.read for coverage in coverages):
            raise EvidenceError(
                "no weight that the probe reads has changed, whatever became of its factors: no"
                " evidence of innocence; expected a trained update"
            )
        return self.probe.score_features(rows) if self.level.accumulator is None else rows[0]

    def _add(self, scored: Scored, mean: FeatureMean, evidence: Mapping[str, Vector]) -> None:
        """Score every client's mean features so far; one without a score leaves no trace."""
        means, after = mean.add(scored.features, evidence)
        for client in evidence:
            try:
                with np.errstate(over="ignore"):  # becomes infinite, which the head refuses
                    row = means[client].astype(np.float32)[None]
                    scored.scores[client] = self.probe.score_features(row)
            except UNREADABLE as error:
                scored.reasons[client] = reason(error)
        renewed = {client: after[client] for client in evidence if client in scored.scores}
        scored.features = {**scored.features, **renewed}


def makes_unit_vectors(featurizer: Featurizer) -> bool:
    """Whether every feature vector has L2 norm 1: one block, normalised as a whole."""
    recipe = featurizer.recipe
    return recipe.normalize == "l2" and len(recipe.features) == 1 and "norms" not in recipe.features
