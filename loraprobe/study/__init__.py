"""Research protocols: leave-out evaluation and embeddings."""
