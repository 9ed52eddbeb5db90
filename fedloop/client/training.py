"""One client's LoRA training with transformers and peft, one local step at a time.

The model is built once and reused for every client: a client starts by writing its start adapter
into it and reads its own adapter back out. Everything random comes from the seed that is passed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from loraprobe.adapters.adapter import Adapter, Kind
from loraprobe.adapters.deltas import factor_delta
from loraprobe.adapters.layout import Layout

from ..data.examples import Example, Tokens, collate, encode
from ..data.templates import use_template
from ..errors import DataError, MissingExtra

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..sections import TrainingConfig


@dataclass(frozen=True)
class LoRASettings:
    """Which LoRA clients train. Defaults: the official scripts (arXiv:2601.07177).

    Attributes:
        target_modules: names of the adapted modules; None for PEFT's defaults of the model's type.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class LocalTraining:
    """How one client trains in one round. Defaults: the official scripts, April 2026.

    Attributes:
        lr: AdamW's learning rate, constant over the local steps.
        steps: optimiser steps.
        batch_size: examples a step.
        max_length: tokens an example is cut to.
        max_grad_norm: gradients of a larger L2 norm are scaled down to it.
    """

    lr: float = 5e-5
    steps: int = 10
    batch_size: int = 16
    max_length: int = 256
    max_grad_norm: float = 1.0

    @classmethod
    def of_shadows(cls, training: TrainingConfig) -> LocalTraining:
        """How the shadow branch of an experiment trains."""
        return cls(
            training.shadow_lr or training.lr,
            training.steps,
            training.batch_size,
            training.max_length,
            training.max_grad_norm,
        )


@dataclass(frozen=True)
class LocalStep:
    """After one local step: how far the adapter has moved from where the client started."""

    index: int
    loss: float
    num_examples: int
    delta: Adapter


def load_base(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    quantization: str = "none",
    template: str = "alpaca",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a folder, the Hub, or a GGUF file in either.

    A tokenizer without a padding token pads with its end of sequence.

    Args:
        quantization: "none", or "8bit" or "4bit" through bitsandbytes, which needs a GPU. A
            quantised model trains with gradient checkpointing, as in the official scripts
            (arXiv:2601.07177): the same numbers from far less memory.
        template: what requests are put into: "alpaca" (the papers'), "chat" (the tokenizer's own),
            or "auto"; kept with the tokenizer, see fedloop.data.templates.

    Raises:
        MissingExtra: transformers, or bitsandbytes where it is asked for, is not installed.
        DataError: transformers cannot load it, and the message holds its reason; or the tokenizer
            has no chat template and "chat" was asked for.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    except ImportError as error:
        raise MissingExtra("transformers", "fed", "training") from error
    gguf: dict[str, Any] = {}
    if name.endswith(".gguf"):
        name, _, gguf["gguf_file"] = name.rpartition("/")
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, **gguf}
    if quantization != "none":
        if not torch.cuda.is_available():
            raise DataError(
                f"got quantization {quantization!r} and no GPU; expected 'none' on a machine"
                " without one"
            )
        bits = BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit", load_in_4bit=quantization == "4bit"
        )  # type: ignore[no-untyped-call]
        options |= {"quantization_config": bits, "device_map": {"": 0}}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        if quantization == "none" and torch.cuda.is_available():
            model = model.to("cuda")  # type: ignore[arg-type]
        if quantization != "none":
            checkpoint_activations(model)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **gguf)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = (
                tokenizer.eos_token
            )  # padding is masked, so which token it is does not matter
        use_template(tokenizer, template)
        return model, tokenizer
    except ImportError as error:
        missing = ("gguf", "fed") if gguf else ("bitsandbytes", "gpu")
        raise MissingExtra(*missing, f"loading {name!r}") from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot load the base model {name!r}: {str(error).splitlines()[0]}"
        ) from error


def checkpoint_activations(model: Any) -> None:
    """Keep the input of every layer only and compute the rest again for the gradient.

    The same numbers, slower, from far less memory.
    """
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )  # renamed within transformers 5
    enable({"use_reentrant": False})


def quiet() -> None:
    """Switch off transformers' own progress bars and notices in this process.

    For programs that show progress themselves.
    """
    from transformers.utils import logging

    # PEFT asks transformers 5 for a property that transformers renamed; nobody who runs a
    # federation can do anything about it.
    warnings.filterwarnings(
        "ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning
    )
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def attach_lora(
    model: PreTrainedModel, settings: LoRASettings, seed: int, *, frozen_a: bool = False
) -> PeftModel:
    """Put a fresh LoRA on a model; the same seed gives the same initial A (B starts at zero).

    Args:
        frozen_a: train B alone, so that averaging B averages the products (FFA-LoRA,
            arXiv:2403.12313).

    Raises:
        MissingExtra: peft is not installed.
        DataError: the model lacks one of the modules, or no defaults are known for its type.
    """
    peft = _peft()
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules) if settings.target_modules else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted: PeftModel = peft.get_peft_model(model, config)
            there = "".join(f".{module}\n" for module in adapted.targeted_module_names)
            if absent := [n for n in settings.target_modules or () if f".{n}\n" not in there]:
                raise ValueError(f"it lacks {absent}, which PEFT leaves out without a word")
        except ValueError as error:
            raise DataError(f"cannot put a LoRA on the model: {error}") from error
    for name, parameter in adapted.named_parameters():
        if frozen_a and ".lora_A." in name:
            parameter.requires_grad_(False)
    return adapted


def read_adapter(model: PeftModel, base_model: str | None = None) -> Adapter:
    """A copy of the model's LoRA, on the CPU."""
    return _adapter_of(
        model,
        None,
        base_model or model.peft_config[model.active_adapter].base_model_name_or_path or None,
        "weights",
    )


def write_adapter(model: PeftModel, adapter: Adapter) -> None:
    """Overwrite the model's LoRA with an adapter of kind "weights".

    Raises:
        KindMismatch, LayoutMismatch: the adapter is a delta, or does not fit the model.
    """
    Layout.of(read_adapter(model)).check(adapter)
    _peft().set_peft_model_state_dict(model, adapter.state_dict())


def local_steps(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    start: Adapter,
    training: LocalTraining,
    seed: int,
    adjust: Callable[[list[torch.nn.Parameter]], None] | None = None,
) -> Iterator[LocalStep]:
    """Train from `start` and yield the factor delta after every local step.

    Batches run through the examples in a seeded order, shuffled anew once all have been seen.

    Args:
        adjust: called with the trained parameters before every optimiser step, to change their
            gradients (FedProx, SCAFFOLD).

    Raises:
        DataError: there is no example to train on.
    """
    if not examples:
        raise DataError("got no training examples for this client; expected at least one")
    write_adapter(model, start)
    encoded = [encode(example, tokenizer, training.max_length) for example in examples]
    batches = _batches(encoded, training, torch.Generator().manual_seed(seed))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=0.0)
    dropout = torch.Generator().manual_seed(seed).get_state()
    model.train()
    for index, batch in enumerate(batches, start=1):
        # Dropout draws from torch's global generator: lend it this client's state for the step
        # only, so that neither the caller nor another client is disturbed between two yields.
        with torch.random.fork_rng():
            torch.set_rng_state(dropout)
            if (
                torch.cuda.is_available()
            ):  # a GPU has generators of its own, which the fork would start anew at every step
                torch.cuda.manual_seed_all(seed + index)
            loss = _step(
                model,
                collate(batch, _pad_id(tokenizer)),
                optimizer,
                parameters,
                training.max_grad_norm,
                adjust,
            )
            dropout = torch.get_rng_state()
        yield LocalStep(
            index,
            loss,
            len(batch),
            factor_delta(read_adapter(model, start.base_model), start).load(),
        )


def shadow_gradient(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    start: Adapter,
    training: LocalTraining,
) -> Adapter:
    """The cheap shadow: the first step that AdamW would take from `start` on these examples, scaled
    to 1.

    Minus the sign of the gradient of the mean token loss (over several batches: of the mean over
    examples of their batches' losses) with respect to A and B, as an adapter of kind
    "factor_delta": one forward and backward pass, no optimiser, no dropout. `start` is the
    federation's fixed initial LoRA, whose B is zero; there the gradient of A vanishes and that of B
    says everything. The point being the same in every round, the steps of several rounds add up. As
    whitening would, the sign keeps a few loud coordinates from drowning the others, and needs no
    reference runs; it looks so much like short local training that the same probe reads both.

    Raises:
        DataError: there is no example.

    Source: this project; the first step of the shadow branch of arXiv:2601.07177, without its size.
    """
    if not examples:
        raise DataError("got no examples for a shadow gradient; expected at least one")
    write_adapter(model, start)
    model.eval()
    tokens = [encode(example, tokenizer, training.max_length) for example in examples]
    for parameter in model.parameters():
        parameter.grad = None
    for at in range(0, len(tokens), training.batch_size):
        batch = tokens[at : at + training.batch_size]
        tensors = collate(batch, _pad_id(tokenizer))
        loss = model(**{name: tensor.to(model.device) for name, tensor in tensors.items()}).loss
        (loss * (len(batch) / len(tokens))).backward()
    falling = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # a frozen A has no gradient, and needs none
            falling[name] = (
                torch.zeros_like(parameter) if parameter.grad is None else -parameter.grad.sign()
            )
        parameter.grad = None
    return _adapter_of(model, falling, start.base_model, "factor_delta")


def _step(
    model: PeftModel,
    tensors: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    max_grad_norm: float,
    adjust: Callable[[list[torch.nn.Parameter]], None] | None,
) -> float:
    loss = model(**{name: tensor.to(model.device) for name, tensor in tensors.items()}).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if adjust is not None:
        adjust(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return float(loss.detach())


def in_training_order(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples in the order in which `local_steps` first goes through them with this seed."""
    return [
        examples[row]
        for row in torch.randperm(
            len(examples), generator=torch.Generator().manual_seed(seed)
        ).tolist()
    ]


def _batches(
    encoded: list[Tokens], training: LocalTraining, generator: torch.Generator
) -> Iterator[list[Tokens]]:
    queue: list[int] = []
    for _ in range(training.steps):
        while len(queue) < training.batch_size:
            queue += torch.randperm(len(encoded), generator=generator).tolist()
        yield [encoded[row] for row in queue[: training.batch_size]]
        del queue[: training.batch_size]


def _adapter_of(
    model: PeftModel, tensors: dict[str, torch.Tensor] | None, base_model: str | None, kind: Kind
) -> Adapter:
    """The model's LoRA tensors, or others under the same names, copied to the CPU."""
    config: Any = model.peft_config[model.active_adapter]
    read = _peft().get_peft_model_state_dict(model, tensors, save_embedding_layers=False)
    state = {key: value.detach().cpu().clone() for key, value in read.items()}
    return Adapter.from_state_dict(
        state,
        alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        base_model=base_model,
        kind=kind,
    )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad_id: int = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    return pad_id


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("peft", "fed", "LoRA training") from error
    return peft
