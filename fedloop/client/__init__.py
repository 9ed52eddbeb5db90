"""One client's work: local training and shadows."""
