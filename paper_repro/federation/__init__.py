"""Whole defended federations on a real base model: what every defence makes of mixed poison."""
