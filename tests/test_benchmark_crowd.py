"""The crowd's benchmark: it runs at toy size and writes what it says; how fast is no matter of a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "crowd.json"
    command = [sys.executable, PROJECT / "benchmarks" / "crowd.py", "--smoke", "--seconds", "0.2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["what"] == "crowd"
    rows = {row["case"]: row for row in result["rows"]}
    assert {"crowd/throughput/B1", "crowd/throughput/B4", "crowd/tokens_in/B4", "crowd/live/N2/first_audio"} <= set(
        rows
    )
    assert {"crowd/live/N2/dry", "crowd/live/N2/finish", "crowd/cancel"} <= set(rows)
    assert all(row["value"] >= 0 for row in rows.values())
    assert rows["crowd/throughput/B4"]["value"] > 0
    first = rows["crowd/live/N2/first_audio"]
    assert first["value"] <= first["peer"]["p95"] <= first["p99"]
