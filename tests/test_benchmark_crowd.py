"""The crowd's benchmark: it runs at toy size and writes what it says; how fast is no matter of a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.common import Row  # noqa: E402
from benchmarks.crowd_plot import latency_lines, throughput_lines  # noqa: E402
from benchmarks.crowd_waits import Waits  # noqa: E402
from soprano_cupy.gpu.crowd_device import GpuDevice  # noqa: E402
from soprano_cupy.gpu.crowd_steps import CrowdSteps  # noqa: E402


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


def test_lines_of_the_plot() -> None:
    rows = [
        Row("crowd/throughput/B64", 4000.0, "x real time", 1, limit=83_000.0),
        Row("crowd/tokens_in/B64", 5000.0, "x real time", 1, limit=83_000.0),
        Row("crowd/throughput/B512", 9000.0, "x real time", 1, limit=83_000.0),
        Row("crowd/memory/B512", 1.0, "MB", 1),
        Row("crowd/live/N500/first_audio", 3.0, "ms", 9, p99=5.0, peer={"p95": 4.0, "p99": 5.0}),
        Row("crowd/live/N500/silence", 0.0, "ms", 9),
    ]
    assert throughput_lines(rows) == {
        "text in": {64: 4000.0, 512: 9000.0},
        "token ids in": {64: 5000.0},
        "limit": {64: 83_000.0, 512: 83_000.0},
    }
    assert latency_lines(rows) == {
        "first audio, p50": {500: 3.0},
        "first audio, p95": {500: 4.0},
        "first audio, p99": {500: 5.0},
    }


def test_waits_are_what_lies_between_works() -> None:
    """Works from 0 to 2, 3 to 5 and 5 to 9 ms leave 1 of 9."""

    class At:
        def __init__(self, ms: float) -> None:
            self.ms = ms

        def elapsed_ms(self, start: At) -> float:
            return self.ms - start.ms

        def synchronize(self) -> None: ...

    waits = Waits()
    assert waits.share() is None
    waits._spans = [(At(0), At(2)), (At(3), At(5)), (At(5), At(9))]
    assert waits.share() == pytest.approx(1 / 9)


def test_waits_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and entries lie between events while the block runs; other devices are left as they are."""
    done: list[str] = []
    count = iter(range(100))

    class Event:
        def __init__(self, *, timing: bool) -> None:
            assert timing

        def record(self, stream: int) -> None:
            self.at = next(count)
            done.append(f"event on {stream}")

        def elapsed_ms(self, start: Event) -> float:
            return float(self.at - start.at)

        def synchronize(self) -> None: ...

    monkeypatch.setattr("soprano_cupy.gpu.program.Event", Event)
    monkeypatch.setattr(CrowdSteps, "_graph", lambda _, rows: SimpleNamespace(launch=lambda _: done.append("step")))
    monkeypatch.setattr(CrowdSteps, "enter", lambda _, entries: done.append("entry"))
    steps, device = object.__new__(CrowdSteps), object.__new__(GpuDevice)
    steps.stream = SimpleNamespace(ptr=7)
    device._steps = steps
    waits = Waits()
    with waits.of(device):
        steps.enter([])
        steps._graph(8).launch(7)
    assert done == ["event on 7", "entry", "event on 7", "event on 7", "step", "event on 7"]
    assert waits.share() == pytest.approx(1 / 3)
    steps.enter([])
    steps._graph(8).launch(7)
    assert done[6:] == ["entry", "step"]
    none: Any = SimpleNamespace()
    with Waits().of(none) as left:
        pass
    assert left.share() is None
