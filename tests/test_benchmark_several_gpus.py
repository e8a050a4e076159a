"""The benchmark of several GPUs: it runs at toy size, with processes on the CPU, and writes what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "several.json"
    command = [sys.executable, PROJECT / "benchmarks" / "several_gpus.py", "--smoke", "--seconds", "0.3", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {
        "several/in_process", "several/gpus1", "several/gpus1/front", "several/gpus1/prepared",
        "several/gpus2", "several/gpus2/front", "several/gpus2/prepared",
    }  # fmt: skip
    assert all(row["value"] > 0 for row in rows.values())
    share = rows["several/gpus2"]["value"] / rows["several/gpus1"]["value"] / 2
    assert abs(rows["several/gpus2"]["peer"]["of_n_times"] - share) < 0.01 * share
