"""The papers' own sizes on a GPU: settings, a dry run, and one command a run."""
