"""The training step of `fedloop probe-kit`, under the name it has here."""

from __future__ import annotations

from fedloop.client.shared_prefix import Text, batch_of, response_loss, tokens_of, train

__all__ = ["Text", "batch_of", "response_loss", "tokens_of", "train"]
