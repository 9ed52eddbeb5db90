"""Every error fedloop raises on purpose: what was got, what was expected, what to do.

Two are also loraprobe's, so that who catches either sees them; adapters and probes that cannot be
read raise loraprobe's own errors.
"""

from __future__ import annotations

from loraprobe import errors as loraprobe_errors


class FedloopError(ValueError):
    """Bad input or an operation that cannot be done safely; the base of all others."""


class ConfigError(FedloopError):
    """A configuration or an option is unknown, missing or has a value that is not valid."""


class EvidenceError(FedloopError):
    """Scores, features or example counts that a level cannot turn into a factor."""


class AggregationError(FedloopError):
    """An aggregation rule, server optimiser or attack cannot be applied to these updates."""


class OptionError(ConfigError, AggregationError):
    """An option of a rule, server optimiser or attack is unknown, missing or not valid.

    It is raised when the rule is made, before anything runs.
    """


class StateError(FedloopError):
    """A saved state or checkpoint is damaged, of another version or of another experiment."""


class AuditError(FedloopError):
    """An audit log is not the one that was written: a line is changed, missing or too many."""


class RunError(FedloopError):
    """A run cannot go on: no room on the disk, no memory. The message names what is saved."""


class MessageError(FedloopError):
    """A message between a server and its clients is not what they agreed on."""


class EngineError(FedloopError):
    """A distributed engine could not be started, or came to an end before its last round."""


class DataError(FedloopError, loraprobe_errors.DataError):
    """A data set or a base model cannot be read, or a row in it cannot be used."""


class MissingExtra(FedloopError, loraprobe_errors.MissingExtra):
    """An optional dependency is not installed; the message holds the pip line that installs it."""


def missing_extra(error: ImportError, purpose: str = "this command") -> ImportError:
    """An import that failed for want of an extra, with what to install; others as they are."""
    return loraprobe_errors.missing_extra(error, purpose, MissingExtra)
