"""Defense: probe, level and safety gate in one object. Updates in, weights out.

It knows no engine and no loop.

    defense = Defense("zoo/probes/linear", "cumulative")
    assessment = defense.assess(1, updates, start=global_lora)
    new = sum(assessment.weights[c] * delta for c, delta in assessment.accepted.items())

It fails closed: whatever is missing, malformed, not finite, sent twice or copied has factor 0 and a
reason in the record. Whatever raises leaves the state as it was. A lock makes it safe in threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout
from loraprobe.probe import Probe

from ..errors import ConfigError, EvidenceError
from .behaviour import SecondOpinion, checked_opinion, reweighed, together
from .explain import Explanation, explanation
from .levels import LAST_STEP, LOCAL_STEPS, Level, cut_of
from .memory import Memory, Overruling, RuleState, from_plain, to_plain
from .parts import DEFAULT, checked_layout, loaded_probe, named_level
from .scoring import Scored, Scorer
from .screening import Checked, Screening, check_updates
from .types import (
    Assessment,
    ClientUpdate,
    RoundRecord,
    client_name,
    client_names,
    named_updates,
    next_number,
)
from .weighing import Limits, Weighed, weigh


class Defense:
    """Decides how much each client's update counts.

    Args:
        probe: scores updates: a Probe, or the folder or Hub id of one; None checks updates and
            trusts the well-formed ones.
        level: turns scores into security factors: one of `fedloop.defense.levels`, or the name of
            one, with what the probe says of its use with that level, or else default fields.
            "default" is "cumulative" with a probe and None without.
        layout: what every update has to look like (kind "factor_delta"). If None, that of `start`.
        min_mean_factor: the safety gate: below this mean factor of the well-formed updates of
            clients that were asked and are registered a round is skipped.
        max_count_ratio: a client's example count is capped at this many times the median of the
            clients that the level trusts; None (the paper): not capped.
        max_norm_ratio: an update of more than this many times the lower median norm of the clients
            that the level trusts counts for as much less, as if it had been cut to that length;
            None (the paper): however long. A level looks at the direction of an update and not at
            its length, so whoever passes it can make a round their own. Clients of unlike numbers
            of steps or learning rates need a large ratio.
        registered: client -> example count that the server knows by itself; then claims do not
            count at all, and nobody else takes part.
        max_steps: more steps of evidence are refused unread.
        forget_after: a client without a well-formed update for more than so many rounds is
            forgotten, and a newcomer when it comes back; None: never. Whom the level rejected, or
            an operator spoke on, is not forgotten.
        probation: rounds until a newcomer counts in full; who played p of them counts
            (p + 1) / (probation + 1) of the others. 0: at once. It is for levels that remember: a
            client that returns under a fresh id each round is new to them for ever.
        newcomer_share: the largest share of a round's weight that all its newcomers have together;
            a round of nobody else is then skipped, but for the first. None: not capped.
        score_aggregate: the probe also scores the weighted mean of those who count, and a round
            whose mean reaches the level's threshold is skipped: parts that pass one by one.
        behaviour: a veto on whom the level trusts, and on the weighted mean of them, such as a
            `fedloop.measure.behaviour.Behaviour`; it needs `start` in every round. None: no veto.

    Raises:
        EvidenceError: a level without a probe, or a probe with level None given outright.
        ConfigError: an argument is out of range, or probe and level do not fit together.
        ProbeFormatError, HubError: the probe cannot be loaded.

    Source: arXiv:2601.07177, Sec. 4; what is checked beyond it: fedloop.defense.screening.
    """

    def __init__(
        self,
        probe: Probe | str | Path | None,
        level: Level | str | None = DEFAULT,
        *,
        layout: Layout | None = None,
        min_mean_factor: float = 0.2,
        max_count_ratio: float | None = 3.0,
        max_norm_ratio: float | None = None,
        registered: Mapping[str, int] | None = None,
        max_steps: int = 1024,
        forget_after: int | None = None,
        probation: int = 0,
        newcomer_share: float | None = None,
        score_aggregate: bool = False,
        behaviour: SecondOpinion | None = None,
    ) -> None:
        self.probe = loaded_probe(probe)
        self.level = named_level(level, self.probe)
        self._scorer = None
        if self.probe is not None and self.level is not None:
            self._scorer = Scorer(self.probe, self.level)
        self.layout = checked_layout(layout)
        self.limits = Limits(
            min_mean_factor,
            max_count_ratio,
            max_norm_ratio,
            registered,
            max_steps,
            forget_after,
            probation,
            newcomer_share,
            score_aggregate,
        )
        if score_aggregate and self._scorer is None:
            raise ConfigError("score_aggregate: it needs a probe and a level; got none")
        self.behaviour = checked_opinion(behaviour)
        accumulator = self.level.accumulator if self.level else None
        self._memory = Memory(
            0,
            self.level.init() if self.level else {},
            accumulator.init() if accumulator else {},
        )
        self._last: RoundRecord | None = None
        self._lock = threading.RLock()

    @property
    def round(self) -> int:
        """The number of the last round that was assessed; 0 before the first."""
        return self._memory.round

    def rule_state(self, name: str) -> RuleState | None:
        """What an aggregation rule remembers that a loop applies behind this defence, if it does.

        It is saved with the defence.
        """
        return self._memory.rules.get(name)

    def remember_rule(self, name: str, state: RuleState) -> None:
        """Keep what a rule has to remember until the next round."""
        with self._lock:
            self._memory = replace(self._memory, rules={**self._memory.rules, name: state})

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Whatever raises in here leaves the state as it was before; other threads wait."""
        with self._lock:
            memory, last = self._memory, self._last
            try:
                yield
            except BaseException:
                self._memory, self._last = memory, last
                raise

    def wanted(self, clients: Iterable[str]) -> set[str]:
        """Which of these clients have to be scored in the coming round, hence send the evidence
        that the level reads.
        """
        names = client_names(clients, "clients")
        return self.level.wanted(self._memory.level, names) if self.level else set()

    def assess(
        self,
        round: int,
        updates: Iterable[ClientUpdate],
        *,
        start: Adapter | None = None,
        expected: Iterable[str] | None = None,
    ) -> Assessment:
        """Check, score and weigh the updates of one round.

        Args:
            round: the first round is 1; numbers rise, and may leave some out. A round is assessed
                once.
            updates: what arrived, in any order; the result does not depend on it.
            start: the round's global LoRA, needed if clients send weights instead of factor deltas.
            expected: the clients that were asked; one that sent nothing gets factor 0 and the
                reason "missing", and one that nobody asked is refused. None: not known.

        Raises:
            EvidenceError: the round was assessed already, `start` is needed or not of kind
                "weights", or an id is neither text nor a whole number. Nothing a client sends
                raises, and after an error the state is as it was.
        """
        began = time.perf_counter()
        expected_names = None if expected is None else client_names(expected, "expected")
        named = named_updates(updates)
        with self._lock:
            round = next_number(round, self._memory.round)
            memory = self._memory.at(round)
            checked, reasons = self._checked(named, expected_names, memory, self._screening(start))
            scored = self._scored(memory, checked, self._screening(start))
            reasons |= scored.reasons
            sound = {client: checked[client] for client in sorted(checked.keys() - reasons.keys())}
            judged, state = self._judged(memory, scored, sound)
            judged, weighed = self._weighed(judged, sound, memory, start)
            after = replace(memory, level=state, features=scored.features)
            if self.limits.knows_newcomers:
                after = after.playing(judged)
            after, gone = after.forgetting(sound, self.limits.forget_after)
            judgement = self._assessment(round, scored, weighed, reasons, sound, state)
            note = f"forgot {len(gone)} clients that are gone" if gone else ""
            assessment = replace(
                judgement,
                forgotten=tuple(gone),
                note="; ".join(filter(None, (judgement.note, note))),
                seconds={"assess": time.perf_counter() - began},
            )
            self._last = assessment.record()  # without the updates
            self._memory = after
            return assessment

    def _screening(self, start: Adapter | None) -> Screening:
        return Screening(
            start,
            self.layout,
            self.probe.featurizer if self.probe else None,
            self.level is not None and self.level.evidence in (LOCAL_STEPS, LAST_STEP),
            self.limits.max_steps,
            self.probe.base_model if self.probe else None,
        )

    def _checked(
        self,
        updates: Sequence[ClientUpdate],
        expected: Sequence[str] | None,
        memory: Memory,
        screening: Screening,
    ) -> tuple[dict[str, Checked], dict[str, str]]:
        """Client -> its well-formed update, and client -> why there is none.

        Who has no part in the round is not even compared with the others: a copy of an update would
        have its owner refused.
        """
        senders = {update.client_id for update in updates}
        barred = self._barred(senders | set(expected or ()), senders, expected, memory)
        admitted = [update for update in updates if update.client_id not in barred]
        checked, reasons = check_updates(admitted, screening)
        missing = [name for name in expected or () if name not in senders and name not in barred]
        return checked, {
            **reasons,
            **barred,
            **dict.fromkeys(missing, "missing: asked and sent nothing"),
        }

    def _barred(
        self, clients: set[str], senders: set[str], expected: Sequence[str] | None, memory: Memory
    ) -> dict[str, str]:
        barred: dict[str, str] = {}
        registered = self.limits.registered
        for client in senders:
            if registered is not None and client not in registered:
                barred[client] = "unregistered: the server has no example count for this client"
            elif expected is not None and client not in expected:
                barred[client] = "not asked: nobody asked this client in this round"
        denied = memory.words(allowed=False)
        return barred | {client: denied[client] for client in clients if client in denied}

    def _scored(
        self, memory: Memory, checked: Mapping[str, Checked], screening: Screening
    ) -> Scored:
        """Scores of the clients that the level wants scored."""
        if self._scorer is None:
            return Scored(memory.features)
        wanted = sorted(self._scorer.level.wanted(memory.level, checked))
        return self._scorer.score(memory.features, checked, wanted, screening.reading)

    def _judged(
        self, memory: Memory, scored: Scored, sound: Mapping[str, Checked]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The level's factors of the well-formed updates, and its new state."""
        if self.level is None:
            return dict.fromkeys(sound, 1.0), memory.level
        return self.level.update(memory.level, scored.scores, self.limits.counts(sound))

    def _weighed(
        self,
        judged: dict[str, float],
        sound: Mapping[str, Checked],
        memory: Memory,
        start: Adapter | None,
    ) -> tuple[dict[str, float], Weighed]:
        """The round weighed, and factors without those of whom the second opinion refuses."""
        allowed = memory.words(allowed=True)

        def without(bad: Mapping[str, str]) -> Weighed:
            left = {client: 0.0 if client in bad else judged[client] for client in judged}
            return weigh(left, sound, allowed, self.limits, memory.played)

        weighed, bad = without({}), dict[str, str]()
        deltas = {client: update.delta for client, update in sound.items()}
        if self.behaviour is not None:
            weighed, bad = reweighed(
                self.behaviour, memory.round, start, weighed, deltas, allowed, without
            )
        if self.limits.score_aggregate and self._scorer is not None:
            reading, scorer = self._screening(start).reading, self._scorer
            weighed = together(weighed, deltas, lambda mean: scorer.together(mean, reading))
        return {c: 0.0 if c in bad else factor for c, factor in judged.items()}, weighed

    def _assessment(
        self,
        round: int,
        scored: Scored,
        weighed: Weighed,
        reasons: Mapping[str, str],
        sound: Mapping[str, Checked],
        state: dict[str, Any],
    ) -> Assessment:
        factors = dict(sorted({**dict.fromkeys(reasons, 0.0), **weighed.factors}.items()))
        weights: dict[str, float] = {}
        if weighed.weights is not None:
            weights = {client: weighed.weights.get(client, 0.0) for client in factors}
        return Assessment(
            round=round,
            scores={client: tuple(map(float, values)) for client, values in scored.scores.items()},
            factors=factors,
            weights=weights,
            reasons=dict(sorted({**reasons, **weighed.reasons}.items())),
            num_examples=weighed.counts,
            status=self.level.status(state) if self.level else {},
            cuts={client: cut_of(self.level, client, state) for client in scored.scores},
            skipped=weighed.weights is None,
            note=weighed.note,
            level=self.level.name if self.level else "",
            evidence=self.level.evidence if self.level else "",
            accepted={client: sound[client].delta for client in weights if weights[client] > 0},
        )

    def explain(self, client: str) -> Explanation:
        """Why a client counted as it did in the last round that this object assessed.

        Raises:
            EvidenceError: no round was assessed yet, or the client had no part in the last one.
        """
        if self._last is None:
            raise EvidenceError(
                f"got client {client!r}; expected one of the last assessed round: no round was"
                " assessed yet"
            )
        name = client_name(client)
        word = self._memory.overruled.get(name)
        return explanation(self._last, name, "" if word is None else str(word))

    def allow(self, client: str, until: int | None = None, why: str = "") -> None:
        """Trust a client's well-formed updates whatever the level says; the record says so.

        Args:
            until: the last round for which this holds; None for ever.
            why: goes into every record.

        Raises:
            EvidenceError: `why` is empty, `until` is over, or the id is none.
        """
        self._overrule(client, True, until, why)

    def deny(self, client: str, until: int | None = None, why: str = "") -> None:
        """Refuse a client whatever it sends; the record says so. Arguments as of `allow`."""
        self._overrule(client, False, until, why)

    def _overrule(self, client: str, allowed: bool, until: int | None, why: str) -> None:
        name = client_name(client)
        with self._lock:
            memory = self._memory
            word = Overruling.after_round(allowed, until, why, memory.round)
            self._memory = replace(memory, overruled={**memory.overruled, name: word})

    def state_dict(self) -> dict[str, Any]:
        """Everything that `assess` carries from round to round, as plain data."""
        return to_plain(self._memory, self.probe, self.level)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            StateError: another version, damaged, or of another probe or level.
        """
        memory = from_plain(state, self.probe, self.level)
        with self._lock:
            self._memory = memory
            self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
