"""A whole federation in one process: rounds, folders, checkpoints."""
