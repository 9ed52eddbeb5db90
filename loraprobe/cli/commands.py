"""Every sub-command, joined to the app."""

from . import hub, probes, report, scan, serve, study, train, verify
from .terminal import app, console

__all__ = ["app", "console", "hub", "probes", "report", "scan", "serve", "study", "train", "verify"]
