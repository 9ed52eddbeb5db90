"""Score adapters with a probe: nothing but the core installation, no base model, no network.

python examples/score.py
"""

from __future__ import annotations

from pathlib import Path

from loraprobe import Probe, load_adapter
from loraprobe.adapters.deltas import factor_delta

ZOO = Path(__file__).resolve().parent.parent / "zoo"


def main() -> None:
    """Print P(malicious) of three clients of the zoo."""
    probe = Probe.from_pretrained(ZOO / "probes/linear")
    initial = load_adapter(ZOO / "adapters/initial")
    names = sorted(path.name for path in (ZOO / "adapters").glob("*-0"))[::60]
    changes = [factor_delta(load_adapter(ZOO / "adapters" / name), initial) for name in names]
    for name, verdict in zip(names, probe.verdicts(changes), strict=True):
        print(f"{verdict.score:.3f}  {verdict.label:12}  {name}")


if __name__ == "__main__":
    main()
