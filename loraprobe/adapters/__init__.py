"""LoRA adapters as values, and the files they are read from."""
