"""Every error fedloop raises on purpose: what was got, what was expected, what to do."""

from __future__ import annotations


class FedloopError(ValueError):
    """Bad input or an operation that cannot be done safely; the base of all others."""


class ConfigError(FedloopError):
    """A field of an experiment's configuration is unknown, missing or has a value that is not
    valid.
    """


class EvidenceError(FedloopError):
    """Scores, features or example counts that a level cannot turn into a factor."""


class AggregationError(FedloopError):
    """An aggregation rule, server optimiser or attack cannot be applied to these updates."""


class StateError(FedloopError):
    """A saved state or checkpoint is damaged, of another version or of another experiment."""


class MessageError(FedloopError):
    """A message between a server and its clients is not what they agreed on."""


class EngineError(FedloopError):
    """A distributed engine could not be started, or its run came to an end before its last round."""
