"""Research protocols: leave-out evaluation and embeddings.

They are no part of the top-level API: `from loraprobe.study import leave_one_out, detectors_of`.
"""

from .leave_out import detectors_of, leave_one_out
from .report import LeaveOneOutReport

__all__ = ["LeaveOneOutReport", "detectors_of", "leave_one_out"]
