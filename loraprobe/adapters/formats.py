"""What a file is by its first bytes, where it is no safetensors file, and what to do about it."""

from __future__ import annotations

WEIGHTS_NAME = "adapter_model.safetensors"
START = 256
"""So many bytes are looked at."""

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def what_is(start: bytes, name: str = "") -> str | None:
    """What a file of this name is by its first bytes, and what to do: the end of a sentence.

    None if it may be safetensors.
    """
    if start[8:9] == b"{":  # after the length of a header, which may look like a pickle's start
        renamed = f"a safetensors file by its content: rename it to {WEIGHTS_NAME}"
        return renamed if name.endswith(_PICKLES) else None
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` where it lies"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, not the file itself: a download failed. Use `hf download`"
    if start.startswith(b"GGUF"):
        return "a GGUF file of llama.cpp: give the PEFT adapter that it was converted from"
    if start.startswith(b"PK\x03\x04") and b"data.pkl" not in start:
        return "a zip archive: unpack it and give the folder"
    if not start:
        return "empty: it was not written to its end. Save or fetch it again"
    pickled = start.startswith(_PICKLED) or name.endswith(_PICKLES)
    return pickle_advice(name) if pickled else None


def is_pickle(start: bytes, name: str) -> bool:
    """Whether a file that goes by a pickle's name, or starts like one, is not plainly another."""
    return what_is(start, name) == pickle_advice(name)


def pickle_advice(name: str) -> str:
    """What a pickle is, and two lines that convert it."""
    return (
        "a pickle, which can run code when it is read. Where you trust it, convert it in Python:"
        " import torch, safetensors.torch;"
        f" safetensors.torch.save_file(torch.load({name!r}, weights_only=True), {WEIGHTS_NAME!r})"
    )
