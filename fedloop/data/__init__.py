"""Instruction data: examples, corpora, partitions, who holds what."""
