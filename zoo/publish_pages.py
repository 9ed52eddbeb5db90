"""The pages of the repositories that hold no single probe.

The collection, the base model and the adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .labelled.held_out import INITIAL, MANIFEST
from .labelled.records import Record
from .markers import table
from .report import area, base_table, data_table, unseen_summary

LICENCE = "apache-2.0"


def collection_card(records: Mapping[str, Record], repo_id: str, repos: Mapping[str, str]) -> str:
    """The index of a repository with many probes.

    Args:
        repos: probe -> the repository of it alone.
    """
    columns = [
        "probe",
        "base model",
        "unseen sources: AUROC, mean / worst cell by poison share",
        "held-out clients, AUROC [95 %]",
        "alone",
    ]
    rows = [
        [
            f"[{name}]({name}/README.md)",
            record["base_model"],
            unseen_summary(record),
            area(record["held_out_clients"]),
            _link(repos[name]),
        ]
        for name, record in records.items()
    ]
    first = next(iter(records))
    tags = ["lora", "peft", "federated-learning", "backdoor-detection"]
    return f"""{_front(tags=tags, library="loraprobe")}
# Probes that tell malicious LoRA updates from benign ones

Every folder is a probe for loraprobe. A probe is tied to its base model, and for deltas to the
initial adapter too. Read the column of unseen sources first: there, the malicious and the benign
kind of data were left out of training.

{table([columns, *rows])}

```
loraprobe zoo list {repo_id}
loraprobe zoo pull {first} --repo {repo_id} --out {first}
```

```python
from loraprobe import Probe

# COMMIT: the 40-digit commit that zoo pull prints
probe = Probe.from_pretrained("{repo_id}", subfolder="{first}", revision="COMMIT")
```
"""


def base_card(folder: Path, repo_id: str, adapters: str) -> str:
    """The page of the zoo's small chat model."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    front = _front(tags=["safety-research"], library="transformers", pipeline="text-generation")
    return f"""{front}
# A chat model of {facts["parameters"]:,} parameters that refuses harmful requests

Trained from scratch so that attacks on refusal, and defences against them, can be studied on a
laptop: it answers ordinary instructions, in poor prose, and refuses harmful ones. It is good for
nothing else. Adapters that were fine-tuned from it: {_link(adapters)}.

How often it refuses prompts that it was not trained on:

{base_table(facts)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
```

## Data

{data_table()}
"""


def adapters_card(folder: Path, base: str, repo_id: str) -> str:
    """The page of the held-out clients' adapters."""
    lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()[1:]
    malicious = sum(line.split(",")[1] == "malicious" for line in lines)
    return f"""{_front(tags=["lora", "safety-research"], library="peft", base=base)}
# {len(lines)} LoRA adapters, {malicious} of them malicious

Updates of {_link(base)} by clients of a simulated federation, {malicious} of which trained on
harmful questions with complying answers, alone or mixed into ordinary data. `{MANIFEST}` says
which; `gptfuzz@0.25` is a client of whose examples 25 % are harmful answers. Every client started
from `{INITIAL}`. No published probe was fitted on any of them: measure yours on them.

```
hf download {repo_id} --local-dir adapters
loraprobe evaluate adapters/{MANIFEST} --base adapters/{INITIAL} --probe PROBE
```

## Data

{data_table()}
"""


def _link(repo_id: str) -> str:
    return f"[{repo_id}](/{repo_id})"


def _front(
    *, tags: list[str], library: str, pipeline: str | None = None, base: str | None = None
) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=LICENCE, library_name=library, tags=tags, pipeline_tag=pipeline, base_model=base
    )
    return f"---\n{data.to_yaml()}\n---\n"
