"""What each `fedloop` sub-command does. Heavy libraries are imported inside: help must be quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from loraprobe.errors import LoraprobeError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Federated LoRA fine-tuning that weighs its clients.")
console = Console()


@app.callback()
def _fedloop() -> None:
    """Keep `client` a named sub-command while it is the only one."""


@app.command()
def client(
    base: Annotated[str, typer.Argument(help="The base model: a folder or Hub id that transformers loads.")],
    data: Annotated[Path, typer.Argument(help="JSON lines with instruction, response and optionally context.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for initial/ and adapter/, both in PEFT's format.")],
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 5e-5,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 16,
    r: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    alpha: Annotated[float, typer.Option(help="lora_alpha.")] = 16,
    modules: Annotated[list[str] | None, typer.Option("--module", help="An adapted module's name; PEFT's defaults if none is given.")] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
) -> None:
    """Train one client's LoRA on its own data, as a round of the federation would."""
    from .data import read_jsonl
    from .local import LocalTraining, LoRASettings, attach_lora, load_base, local_steps, read_adapter

    try:
        examples = read_jsonl(data)
        model, tokenizer = load_base(base)
        peft_model = attach_lora(model, LoRASettings(r, alpha, target_modules=tuple(modules) if modules else None), seed)
        peft_model.save_pretrained(str(out / "initial"))
        start = read_adapter(peft_model)
        training = LocalTraining(lr=lr, steps=steps, batch_size=batch_size)
        for step in track(local_steps(peft_model, tokenizer, examples, start, training, seed), "training", total=steps, console=console):
            console.print(f"step {step.index}: loss {step.loss:.4f}")
        peft_model.save_pretrained(str(out / "adapter"))
    except (LoraprobeError, ImportError) as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    console.print(f"wrote {out / 'initial'} and {out / 'adapter'}", highlight=False, markup=False, soft_wrap=True)
