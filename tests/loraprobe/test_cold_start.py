"""What scoring from a cold process loads: NumPy and what reads files, nothing that trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loraprobe import fit_probe
from loraprobe.adapters.load import save_adapter
from loraprobe.cli.main import ALONE
from tests.helpers.probes import HEAD_OPTIONS, labelled

ROOT = Path(__file__).resolve().parents[2]
SCORE = """
import sys
from loraprobe import Probe
[verdict] = Probe.from_pretrained(sys.argv[1]).verdicts(sys.argv[2])
heavy = {"torch", "sklearn", "scipy", "xgboost", "huggingface_hub", "matplotlib", "typer"}
print(repr(verdict.score), sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize("name", [*ALONE, "verify"])
def test_a_frequent_command_loads_no_other(name: str) -> None:
    code = "import atexit, sys; from loraprobe.cli.main import main; "
    code += "atexit.register(lambda: print('numpy' in sys.modules, 'loraprobe.cli.verify' in"
    code += " sys.modules)); main()"
    done = subprocess.run(
        [sys.executable, "-c", code, name, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert f" {name} [OPTIONS]" in done.stdout
    assert done.stdout.split()[-2:] == ["False", str(name not in ALONE)]


@pytest.mark.parametrize("head", ["linear", "mlp", "xgboost", "mass_mean"])
def test_scoring_loads_nothing_that_trains(tmp_path: Path, head: str) -> None:
    data = labelled(16, 1, kind="weights")
    probe = fit_probe(
        data.adapters,
        data.labels,
        head=head,
        recipe="all_b",
        groups=data.groups,
        calibration="platt",
        head_options=HEAD_OPTIONS[head],
    )
    folder = probe.save_pretrained(tmp_path / "probe")
    adapter = save_adapter(data.adapters[3], tmp_path / "adapter")
    done = subprocess.run(
        [sys.executable, "-c", SCORE, str(folder), str(adapter)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    score, loaded = done.stdout.split(maxsplit=1)
    assert (loaded.strip(), done.stderr) == ("[]", "")
    assert float(score) == pytest.approx(float(probe(data.adapters[3])[0]), abs=1e-12)
