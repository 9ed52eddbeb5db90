"""The state of a federation between rounds: the server's half, the same for every engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, pack, unpack

from ..client.folding import ResidualSum
from ..config import Config
from ..defense.defense import Defense
from ..defense.types import Assessment
from ..rules.lora import exact_residual
from .plan import RoundPlan
from .server_state import GradientChange, ServerSide
from .spool import Spool


class GlobalLoRA:
    """The global LoRA and everything that decides how it moves: defence, rule, server optimiser.

    It knows no engine.

    Args:
        initial: the LoRA before the first round, kind "weights".
        base: takes the residuals of exact aggregation; if None they are summed and go nowhere.
        folder: where a round's updates lie while it is played; None for the system's temporary one.
        base_digest: of the base model (`fedloop.run.identity`), where it is known.

    Attributes:
        lora: the global LoRA, kind "weights".
        initial: as given; where shadows start.
        defense: decides how much each update counts.
        config: the experiment.
    """

    def __init__(
        self,
        initial: Adapter,
        defense: Defense,
        config: Config,
        base: ResidualSum | None = None,
        folder: Path | None = None,
        base_digest: str | None = None,
    ) -> None:
        self.base_digest = base_digest
        self.lora = initial
        self.initial = initial
        self.defense = defense
        self.config = config
        self._folder = folder
        self._layout = Layout.of(initial)
        self._base = ResidualSum() if base is None else base
        self._server = ServerSide(
            config.aggregation, self._layout, config.training.proximal, config.clients.count
        )
        self._rule = config.aggregation.make_rule()
        self._rule_state = self._rule.init()

    @property
    def residual(self) -> Mapping[str, Tensor]:
        """Module -> (d_out, d_in): what exact aggregation has added to the base so far."""
        return self._base.residual

    def asks(self, client: str) -> GradientChange:
        """What the server optimiser asks of this client's gradients in the coming round."""
        return self._server.asks(client)

    def spool(self) -> Spool:
        """Where the updates of a round go."""
        probe = self.defense.probe
        read = probe.featurizer if probe is not None else None
        narrow = read is not None and read.layout.kind == "factor_delta"
        return Spool(
            self._folder,
            Layout(self._layout.slots, self._layout.scalings, "factor_delta"),
            base_model=self.lora.base_model,
            factors=read.recipe.factors if read is not None and narrow else ("A", "B"),
        )

    def apply(self, assessment: Assessment, spool: Spool, plan: RoundPlan) -> None:
        """Aggregate the accepted updates and move the global LoRA by what the server optimiser
        makes of them.

        The mean reads one update at a time; other rules compare rows of a mapped file.

        Raises:
            AggregationError: the rule cannot be applied to them; nothing has moved.
        """
        counted = list(assessment.accepted)  # sorted: sums round alike
        weights = {client: assessment.weights[client] for client in counted}
        shares = torch.tensor(list(weights.values()), dtype=torch.float64)
        state = self._rule_state
        if self._rule.name == "mean" and self._rule.pre is None:
            delta = spool.mean(weights)
        else:
            delta, state = self._rule.apply(
                state,
                spool.rows(counted),
                shares,
                clients=counted,
                rng=plan.generator,
                sizes=[slot.size for slot in self._layout.slots],
            )
        if self.config.aggregation.rejected == "no_change":
            delta = delta * assessment.trust
        rows = (spool.vector(client) for client in counted)
        moved = self._server.step(delta, counted, rows, plan.training)
        self._rule_state = state
        if self.config.aggregation.lora == "frozen_a":
            # nobody moves A, whatever was sent
            parts = torch.split(moved, [slot.size for slot in self._layout.slots])
            slots = zip(self._layout.slots, parts, strict=True)
            moved = torch.cat([part * (slot.factor == "B") for slot, part in slots])
        former = self.lora
        vector = pack(former, self._layout)[0].double() + moved.double()
        self.lora = unpack(vector.float(), self._layout, base_model=former.base_model)
        if self.config.aggregation.lora == "exact":
            self._fold(former, assessment.accepted, shares)

    def _fold(self, former: Adapter, deltas: Mapping[str, Adapter], shares: Tensor) -> None:
        """Add to the base what averaging A and B apart loses of the average of their products."""
        residual = {
            module: exact_residual(
                [(pair.A + delta[module].A, pair.B + delta[module].B) for delta in deltas.values()],
                shares,
                (self.lora[module].A, self.lora[module].B),
                scaling=pair.scaling,
            )
            for module, pair in former.items()
        }
        self._base.add(residual)

    def forget(self, clients: Collection[str]) -> None:
        """Drop what rule and server optimiser remember of clients that are gone."""
        if clients:
            self._server.forget(clients)
            self._rule_state = {
                key: {client: row for client, row in rows.items() if client not in clients}
                for key, rows in self._rule_state.items()
            }

    def state_dict(self) -> dict[str, Any]:
        """What the next round needs beyond the configuration: plain data, arrays and tensors."""
        return {
            "lora": pack(self.lora, self._layout)[0],
            "defense": self.defense.state_dict(),
            "server": self._server.state_dict(),
            "rule": dict(self._rule_state),
            "residual": dict(self._base.residual),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            LayoutMismatch, StateError: it is the state of another model or experiment.
        """
        lora = unpack(state["lora"], self._layout, base_model=self.lora.base_model)
        self.defense.load_state_dict(state["defense"])
        self.lora = lora
        self._server.load_state_dict(state["server"])
        # Before a rule had a state of its own, a checkpoint held FoolsGold's sums.
        former = {"history": state.get("history", {})}
        self._rule_state = state.get("rule", former if self._rule.init() else {})
        self._base.set(state["residual"])
