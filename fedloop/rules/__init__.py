"""Aggregation rules, server optimisers and attacks: tensors in, tensors out."""
