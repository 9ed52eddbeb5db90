"""Defense: probe, level and safety gate in one object. Updates in, weights out.

It knows no engine and no loop.

    defense = Defense(Probe.from_pretrained("zoo/probes/linear"), CumulativeLevel())
    record = defense.assess(1, updates, start=global_lora)
    new = sum(record.weights[c] * delta[c] for c in delta)          # unless record.skipped

It fails closed: whatever is missing, malformed, not finite, sent twice or copied has factor 0 and a
    reason in the record.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout
from loraprobe.probe import Probe

from ..errors import EvidenceError, StateError
from .levels import Level
from .screening import UNREADABLE, Checked, check_updates, reason
from .types import ClientUpdate, RoundRecord
from .weights import aggregation_weights, check_ratio, counted_examples

STATE_VERSION = 1

_BLOCK = 256  # clients: of a probe of 40,960 features, 84 MB of float64


class Defense:
    """Decides how much each client's update counts.

    Args:
        probe: scores updates; None together with `level` None checks updates and trusts the
            well-formed ones.
        level: turns scores into security factors; see `fedloop.defense.levels`.
        layout: what every update has to look like (kind "factor_delta"). If None, that of `start`.
        min_mean_factor: the safety gate; below this mean factor a round is skipped.
        max_count_ratio: a client's example count is capped at this many times the round's median;
            None (the paper): not capped.
        max_norm_ratio: an update of more than this many times the round's lower median norm counts
            for as much less, as if it had been cut to that length; None (the paper): however long.
            A level looks at the direction of an update and not at its length, so whoever passes it
            can make a round their own. Clients of unlike numbers of steps or learning rates need a
            large ratio.
        registered: example counts the server knows by itself; then claims do not count at all.
        max_steps: more steps of evidence are refused unread.

    Attributes:
        rule_states: name -> what an aggregation rule remembers, of a loop that applies one behind
            this defence.

    Raises:
        EvidenceError: one of probe and level without the other.
        ConfigError: max_norm_ratio is not a finite number >= 1.

    Source: arXiv:2601.07177, Sec. 4; what is checked beyond it: fedloop.defense.screening.
    """

    def __init__(
        self,
        probe: Probe | None,
        level: Level | None,
        *,
        layout: Layout | None = None,
        min_mean_factor: float = 0.2,
        max_count_ratio: float | None = 3.0,
        max_norm_ratio: float | None = None,
        registered: Mapping[str, int] | None = None,
        max_steps: int = 1024,
    ) -> None:
        if (probe is None) != (level is None):
            raise EvidenceError(
                "got a probe without a level or a level without a probe; expected both, or neither"
                " for no defence"
            )
        if probe is not None and level is not None:
            _check_readable(probe, level)
        self.probe, self.level, self.layout = probe, level, layout
        if max_norm_ratio is not None:
            check_ratio("max_norm_ratio", max_norm_ratio)
        self.min_mean_factor, self.max_count_ratio, self.max_norm_ratio = (
            min_mean_factor,
            max_count_ratio,
            max_norm_ratio,
        )
        self.registered, self.max_steps = registered, max_steps
        self.rule_states: dict[str, dict[str, Any]] = {}
        self._round = 0
        self._state = level.init() if level else {}
        self._features = level.accumulator.init() if level and level.accumulator else {}

    def wanted(self, clients: Iterable[str]) -> set[str]:
        """Which of these clients have to be scored in the coming round, hence send the evidence
        that the level reads.
        """
        return self.level.wanted(self._state, clients) if self.level else set()

    def assess(
        self,
        round: int,
        updates: Sequence[ClientUpdate],
        *,
        start: Adapter | None = None,
        expected: Iterable[str] = (),
    ) -> RoundRecord:
        """Check, score and weigh the updates of one round.

        Args:
            round: from 1, rising; a round is assessed once.
            updates: what arrived, in any order; the result does not depend on it.
            start: the round's global LoRA, needed if clients send weights instead of factor deltas.
            expected: the clients that were asked; one that sent nothing gets factor 0 and the
                reason "missing".

        Raises:
            EvidenceError: the round was assessed already, or `start` is needed or not of kind
                "weights". Nothing a client sends raises.
        """
        began = time.perf_counter()
        if round <= self._round:
            raise EvidenceError(
                f"got round {round} after round {self._round}; expected a later one: a round"
                " counted twice would count its scores twice"
            )
        trajectory = self.level is not None and self.level.evidence in ("local_steps", "last_step")
        ordered = sorted(updates, key=lambda update: str(update.client_id))
        known = [
            update
            for update in ordered
            if self.registered is None or update.client_id in self.registered
        ]
        checked, reasons = check_updates(
            known,
            start,
            self.layout,
            self.probe.featurizer if self.probe else None,
            trajectory=trajectory,
            max_steps=self.max_steps,
            base_model=self.probe.base_model if self.probe else None,
        )
        # Who is not registered is not even compared with the others: a copy of an update would have
        # its owner refused.
        unregistered = {update.client_id for update in ordered} - {
            update.client_id for update in known
        }
        reasons |= dict.fromkeys(
            unregistered, "unregistered: the server has no example count for this client"
        )
        reasons |= {
            client: "missing: asked and sent nothing"
            for client in expected
            if client not in checked and client not in reasons
        }
        scores = self._scores(checked, reasons)
        counts = self._counts(
            {client: update for client, update in checked.items() if client not in reasons}
        )
        factors = self._shortened(
            self._factors(scores, counts, reasons),
            {client: checked[client].norm for client in counts},
            reasons,
        )
        weights = (
            aggregation_weights(
                factors, {**dict.fromkeys(factors, 1), **counts}, self.min_mean_factor
            )
            if factors
            else None
        )
        self._round = round
        return RoundRecord(
            round=round,
            scores={client: tuple(map(float, values)) for client, values in scores.items()},
            factors=factors,
            weights=weights or {},
            reasons=dict(sorted(reasons.items())),
            num_examples=counts,
            status=self.level.status(self._state) if self.level else {},
            skipped=weights is None,
            seconds={"assess": time.perf_counter() - began},
        )

    def _counts(self, checked: Mapping[str, Checked]) -> dict[str, int]:
        if not checked:
            return {}
        return counted_examples(
            {client: update.num_examples for client, update in checked.items()},
            self.max_count_ratio,
            self.registered,
        )

    def _scores(
        self, checked: Mapping[str, Checked], reasons: dict[str, str]
    ) -> dict[str, np.ndarray]:
        """Scores of the clients that the level wants scored.

        One whose evidence is missing or unreadable gets a reason.
        """
        if self.level is None:
            return {}
        scores: dict[str, np.ndarray] = {}
        for clients in self._blocks(sorted(self.level.wanted(self._state, checked))):
            evidence: dict[str, np.ndarray] = {}
            for client in clients:
                try:
                    evidence[client] = self._evidence(checked[client])
                except UNREADABLE as error:
                    reasons[client] = reason(error)
            scores |= self._mean_scores(evidence, reasons) if self.level.accumulator else evidence
        return scores

    def _blocks(self, clients: list[str]) -> Iterator[list[str]]:
        """Clients whose evidence is in memory at a time.

        Some, or all where the round's median is subtracted from each.
        """
        accumulator = self.level.accumulator if self.level else None
        size = len(clients) if accumulator and accumulator.relative else _BLOCK
        return (clients[start : start + size] for start in range(0, len(clients), size or 1))

    def _evidence(self, update: Checked) -> np.ndarray:
        """What the level reads of one update.

        Scores (n_steps,), or a feature vector (p,) where features accumulate.
        """
        probe, level = self._parts()
        own = level.evidence in ("last_step", "update_features")
        steps = (update.delta,) if own else update.steps
        if not steps:
            raise EvidenceError(
                f"missing evidence: level reads {level.evidence!r} and no step was sent"
            )
        if level.evidence == "shadow_gradient" and len(steps) != 1:
            raise EvidenceError(f"got {len(steps)} steps of evidence; expected one shadow gradient")
        if level.accumulator is None:
            return probe(steps)
        probe(steps)  # refuses another base model, and what it cannot read
        features: np.ndarray = probe.featurizer(steps)[0]
        return features

    def _mean_scores(
        self, features: Mapping[str, np.ndarray], reasons: dict[str, str]
    ) -> dict[str, np.ndarray]:
        """Score every client's mean features so far.

        One whose mean has no score gets a reason, and its mean stays as it was.
        """
        probe, level = self._parts()
        if level.accumulator is None or not features:
            return {}
        means, after = level.accumulator.add(self._features, features)
        scores: dict[str, np.ndarray] = {}
        for client in features:
            try:
                with np.errstate(
                    over="ignore"
                ):  # beyond float32 becomes infinite, which the head refuses
                    scores[client] = probe.score_features(means[client].astype(np.float32)[None])
            except UNREADABLE as error:
                reasons[client] = reason(error)
        kept = {
            client: entry
            for client, entry in after.items()
            if client not in features or client in scores
        }
        self._features = {**self._features, **kept}
        return scores

    def _factors(
        self,
        scores: Mapping[str, np.ndarray],
        counts: Mapping[str, int],
        reasons: Mapping[str, str],
    ) -> dict[str, float]:
        factors = dict.fromkeys(counts, 1.0)
        if self.level is not None:
            factors, self._state = self.level.update(self._state, scores, counts)
        return dict(sorted((factors | dict.fromkeys(reasons, 0.0)).items()))

    def _shortened(
        self, factors: dict[str, float], norms: Mapping[str, float], reasons: dict[str, str]
    ) -> dict[str, float]:
        """The factors, smaller for updates that are too long; reasons say so."""
        if self.max_norm_ratio is None or not norms:
            return factors
        longest = self.max_norm_ratio * sorted(norms.values())[(len(norms) - 1) // 2]
        for client in sorted(
            client for client, norm in norms.items() if norm > longest and factors[client] > 0
        ):
            reasons[client] = (
                f"long: its norm is {norms[client]:.3g}; up to {longest:.3g} counts in this round"
            )
            factors = {**factors, client: factors[client] * longest / norms[client]}
        return factors

    def _parts(self) -> tuple[Probe, Level]:
        if self.probe is None or self.level is None:
            raise EvidenceError("this Defense has no probe and no level; nothing can be scored")
        return self.probe, self.level

    def state_dict(self) -> dict[str, Any]:
        """Everything that `assess` carries from round to round, as plain data and NumPy arrays."""
        return {
            "version": STATE_VERSION,
            "level": repr(self.level),
            "round": self._round,
            "state": self._state,
            "features": self._features,
            "rules": dict(self.rule_states),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            StateError: another version, or a level with other parameters.
        """
        missing = {"version", "level", "round", "state", "features"} - set(state)
        if missing:
            raise StateError(
                f"the defence's state lacks {sorted(missing)}; expected what state_dict() returns"
            )
        if state["version"] != STATE_VERSION:
            raise StateError(
                f"got a defence state of version {state['version']!r}; expected {STATE_VERSION}"
            )
        if state["level"] != repr(self.level):
            raise StateError(
                f"got the state of {state['level']}; expected that of {self.level!r}: a state"
                " belongs to its level's parameters"
            )
        self._round = int(state["round"])
        self._state = state["state"]
        self._features = state["features"]
        self.rule_states = dict(state.get("rules", {}))


def _check_readable(probe: Probe, level: Level) -> None:
    """Raise EvidenceError where the evidence of a level says nothing to a probe."""
    if probe.featurizer.recipe.reads_product and level.evidence.startswith("shadow"):
        raise EvidenceError(
            f"got a probe that reads products with a level of {level.evidence}, which are changes"
            " of factors since the fixed initial LoRA; expected a level of submitted updates or"
            " local steps, or a probe that reads factors (all_b, paper)"
        )
