"""The soak at toy size on the CPU: seconds of everything, in which nothing may go wrong; and it notices what does."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.soak_memory import Memory, Traces
from benchmarks.soak_requests import Asked, Tally, Wanted
from soprano_cupy import DeadlineExceeded, DeviceError

PROJECT = Path(__file__).resolve().parents[1]
OPTIONS: dict[str, Any] = {"stream": False, "dtype": np.float32, "seed": 1}


@pytest.mark.parametrize(("gpus", "rest"), [(1, 2.0), (2, 1.2)])
def test_seconds_of_everything(tmp_path: Path, gpus: int, rest: float) -> None:
    """In one process, and in two of which one is killed."""
    out = tmp_path / "soak.json"
    options = ["--device", "cpu", "--tiny", "--seconds", "5", "--samples", "8", "--out", str(out)]
    options += ["--gpus", str(gpus), "--rest", str(rest)]
    command = [sys.executable, str(PROJECT / "benchmarks" / "soak.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["violations"] == []
    assert result["submitted"] == sum(result[name] for name in ("answered", "cancelled", "late", "failed"))
    assert min(result[name] for name in ("answered", "compared", "cancelled", "late")) > 0
    logged = result["failures_logged"]
    assert result["step_failures_planned"] >= 2
    assert sum(count for text, count in logged.items() if "injected" in text) == gpus * result["step_failures_planned"]
    assert result["kills_planned"] == gpus - 1
    assert sum(count for text, count in logged.items() if "SIGKILL" in text) == gpus - 1


@pytest.mark.parametrize(
    ("told", "reference", "error", "word"),
    [
        (1, np.zeros(3, np.float32), None, None),
        (2, None, None, "told of its end 2 times"),
        (0, None, None, "told of its end 0 times"),
        (1, np.ones(3, np.float32), None, "other values"),
        (1, np.zeros(4, np.float32), None, "another length"),
        (1, None, DeadlineExceeded("late"), "without a deadline"),
        (1, None, DeviceError("the GPU fell off"), None),
        (1, None, IndexError("a bug"), "IndexError: a bug"),
    ],
)
def test_what_is_wrong_is_noticed(told: int, reference: Any, error: Any, word: str | None) -> None:
    tally, speech = Tally(), Future[np.ndarray]()
    if error is None:
        speech.set_result(np.zeros(3, np.float32))
    else:
        speech.set_exception(error)
    tally.count(Asked(Wanted("One.", OPTIONS), reference, None, told), speech)  # type: ignore[arg-type]
    assert [word in violation for violation in tally.violations] == ([True] if word else [])


def test_growing_memory_is_noticed() -> None:
    memory = Memory(["cpu"], list)
    memory._times, memory._gpu = [float(i) for i in range(20)], [0.0] * 20
    memory._host = [1000.0 + 3 * (i % 3) for i in range(20)]
    assert memory.violations() == []
    memory._host = [1000.0 + 12 * i for i in range(20)]
    assert "host memory grew by 108 MB" in memory.violations()[0]


def test_what_is_left_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.soak_memory.LEFT_S", 0.1)
    traces = Traces(gpu=False)
    assert traces.left() == []
    with (tmp_path / "open").open("w"), subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE):
        found = " ".join(traces.left())
        assert "a file is left" in found
        assert "a process is left" in found
    assert traces.left() == []
