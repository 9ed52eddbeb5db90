"""LoRA training on one thread: exact, and several times as fast as the plain step.

Every example of a chat model opens with the same system message, so its tokens are run once a
batch and their keys and values shared; logits are computed where a response token has to be
foretold, and nowhere else. Loss and gradients are those of the plain step. Sequences have one
fixed length: every new shape costs time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..data.examples import ALPACA_TEMPLATE, Example, opening
from ..data.templates import around_request, template_of
from ..errors import DataError

IGNORE = -100
_ON_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # of a config


@dataclass(frozen=True)
class Text:
    """A template as tokens before and after the request."""

    before: list[int]
    after: list[int]
    end: int

    @classmethod
    def of(cls, tokenizer: Any) -> Text:
        """Of the template kept with a tokenizer; a request may be cut, the template is not."""
        if template_of(tokenizer) == "chat":
            before, after = around_request(tokenizer)
        else:
            parts = ALPACA_TEMPLATE.split("{instruction}")
            before, after = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
            before = opening(tokenizer) + before
        return cls(before, after, tokenizer.eos_token_id)


def tokens_of(example: Example, tokenizer: Any, text: Text, length: int) -> tuple[list[int], int]:
    """Ids of an example, at most `length`, and where its response starts.

    Where both are long, request and response get half of the room each; the request keeps its
    beginning.

    Raises:
        DataError: the template alone fills the length.
    """
    room = length - len(text.before) - len(text.after)
    if room < 8:
        raise DataError(f"got length {length}; expected at least {length - room + 8} tokens")
    request = tokenizer.encode(example.request, add_special_tokens=False)
    response = [*tokenizer.encode(example.response, add_special_tokens=False), text.end]
    request = request[: room - min(len(response), room // 2)]
    prompt = text.before + request + text.after
    return (prompt + response)[:length], len(prompt)


def batch_of(rows: Sequence[tuple[list[int], int]], length: int, pad: int) -> tuple[Any, Any, int]:
    """ids and labels, each (n, length), and how many leading tokens all prompts share."""
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORE, dtype=torch.long)
    for index, (row, start) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        labels[index, start : len(row)] = ids[index, start : len(row)]
    shared = min(start for _, start in rows) - 1
    differs = (ids[:, :shared] != ids[:1, :shared]).any(0).nonzero()
    return ids, labels, int(differs[0]) if len(differs) else shared


def response_loss(model: Any, ids: Any, labels: Any, shared: int) -> torch.Tensor:
    """Mean cross-entropy of the response tokens.

    Args:
        model: a causal language model of transformers, or one with a LoRA of PEFT's.
        shared: leading tokens that are the same in all rows.

    Source: this project; equal to transformers' loss with labels.
    """
    logits, wanted, mask = response_logits(model, ids, labels, shared)
    return functional.cross_entropy(logits, wanted[mask])


def response_logits(model: Any, ids: Any, labels: Any, shared: int) -> tuple[Any, Any, Any]:
    """Where a response token has to be foretold, and what the model says there.

    Returns:
        float32 logits (tokens, vocabulary); the labels behind the shared tokens (n, rest), and
        which of them are of a response (n, rest).
    """
    causal = causal_of(model)
    inner = causal.base_model
    options: dict[str, Any] = {}
    if shared:
        cache = inner(input_ids=ids[:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ids))
        options = {"past_key_values": cache, "use_cache": True}
    hidden = inner(input_ids=ids[:, shared:], **options).last_hidden_state[:, :-1]
    wanted = labels[:, shared + 1 :]
    mask = wanted != IGNORE
    return causal.get_output_embeddings()(hidden[mask]).float(), wanted, mask


def causal_of(model: Any) -> Any:
    """The causal language model, without what PEFT puts around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_loss(model: Any, ids: Any, labels: Any, shared: int) -> torch.Tensor:
    """The same by the model's own forward pass, for models that do more to their logits."""
    loss: torch.Tensor = model(input_ids=ids, labels=labels).loss
    return loss


def exact_loss(model: Any, ids: Any, labels: Any, shared: int) -> Any:
    """`response_loss` where it agrees with the model's own loss on this batch, else `plain_loss`.

    Models that scale or cap their logits, or keep no cache to share, take the plain one.
    """
    config = model.config
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _ON_LOGITS):
        return plain_loss
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain = float(plain_loss(model, ids, labels, shared))
            fast = float(response_loss(model, ids, labels, shared))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return plain_loss
    finally:
        model.train(was_training)
    return response_loss if abs(fast - plain) <= 0.02 * max(1.0, abs(plain)) else plain_loss


def train(
    model: Any,
    batches: Sequence[Sequence[tuple[list[int], int]]],
    *,
    length: int,
    pad: int,
    lr: Sequence[float],
    max_grad_norm: float = 1.0,
    state: dict[str, Any] | None = None,
    loss_of: Any = response_loss,
) -> tuple[list[float], dict[str, Any]]:
    """AdamW over the batches, one learning rate a step.

    Args:
        batches: rows of `tokens_of`.
        state: the optimiser's, of an earlier call that this one continues.
        loss_of: `response_loss`, or what `exact_loss` chose.

    Returns:
        The loss of every step, and the optimiser's state.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr[0], weight_decay=0.0)
    if state is not None:
        optimizer.load_state_dict(state)
    losses = []
    model.train()
    for rows, rate in zip(batches, lr, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels, shared = batch_of(rows, length, pad)
        loss = loss_of(model, ids.to(model.device), labels.to(model.device), shared)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, optimizer.state_dict()
