"""One decision on an adapter file: allow, review or block, with the reasons."""

from .policy import Policy
from .scan import Scanner, ScanResult
from .targets import expand

__all__ = ["Policy", "ScanResult", "Scanner", "expand"]
