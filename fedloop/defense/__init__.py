"""From scores to how much each client counts."""
