"""Publishing: the probe folder, its card, and the Hugging Face Hub."""
