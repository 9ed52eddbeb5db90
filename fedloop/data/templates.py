"""The text around a request: a tokenizer's own chat template, or the papers' alpaca one.

Which one is said once, when a base model is loaded (`use_template`, the config's `model.template`),
and kept with the tokenizer, so that training, shadow branches and evaluation cannot differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from .examples import Example

TEMPLATES = ("auto", "chat", "alpaca")
_KEPT = "prompt_template"  # the tokenizer's attribute
_MARK = "\x00request\x00"


def resolve(template: str, tokenizer: Any) -> str:
    """Which template a tokenizer is used with, "chat" or "alpaca".

    Args:
        template: "chat", "alpaca", or "auto" for the tokenizer's own where it has one.

    Raises:
        DataError: the name is unknown, or "chat" is asked of a tokenizer that has no template.
    """
    if template not in TEMPLATES:
        raise DataError(f"got template {template!r}; expected one of {', '.join(TEMPLATES)}")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_template:
        raise DataError(
            "got template 'chat' and a tokenizer without a chat template; expected 'alpaca', "
            "or 'auto', which takes alpaca where there is none"
        )
    if template == "auto":
        return "chat" if has_template else "alpaca"
    return template


def use_template(tokenizer: Any, template: str) -> None:
    """Read and train with this template from now on.

    Raises:
        DataError: see `resolve`.
    """
    setattr(tokenizer, _KEPT, resolve(template, tokenizer))


def template_of(tokenizer: Any) -> str:
    """What `use_template` said of a tokenizer; "alpaca", the papers', of one that has no other.

    Raises:
        DataError: it has a chat template, and nobody said whether it is used.
    """
    template: str | None = getattr(tokenizer, _KEPT, None)
    if template is None and getattr(tokenizer, "chat_template", None):
        raise DataError(
            "got a tokenizer with a chat template, and nothing that says whether requests are put"
            ' into it. Say so first: fedloop.data.templates.use_template(tokenizer, "chat"), or'
            ' "alpaca"'
        )
    return template or "alpaca"


def prompt_text(example: Example, tokenizer: Any, template: str | None = None) -> str:
    """What the model reads before it answers.

    Args:
        template: see `resolve`; what is kept with the tokenizer if None.

    Raises:
        DataError: see `resolve`.
    """
    template = template_of(tokenizer) if template is None else resolve(template, tokenizer)
    if template == "alpaca":
        return example.prompt
    return _chat(tokenizer, example.request)


def around_request(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a chat template before and after the request.

    Raises:
        DataError: the template does not show the request exactly once.
    """
    parts = _chat(tokenizer, _MARK).split(_MARK)
    if len(parts) != 2:
        raise DataError(
            "got a chat template that does not hold the request once; expected one that does. "
            "Use the template 'alpaca'"
        )
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
    return before, after


def _chat(tokenizer: Any, request: str) -> str:
    turns = [{"role": "user", "content": request}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text
