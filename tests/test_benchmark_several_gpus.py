"""The benchmark of several GPUs: it runs at toy size, with processes on the CPU, and writes what it says."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.crowd_load import Load, Mark, host_us, speeds  # noqa: E402
from benchmarks.several_gpus import even  # noqa: E402
from soprano_cupy.config import SAMPLE_RATE_HZ  # noqa: E402


def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "several.json"
    command = [sys.executable, PROJECT / "benchmarks" / "several_gpus.py", "--smoke", "--seconds", "0.3", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = {row["case"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {
        "several/in_process", "several/gpus1", "several/gpus1/front", "several/gpus1/prepared",
        "several/gpus2", "several/gpus2/front", "several/gpus2/even", "several/gpus2/prepared",
        "several/apart2", "several/apart2/front",
    }  # fmt: skip
    assert all(row["value"] > 0 for row in rows.values())
    spoken = rows.pop("several/gpus2/even")
    each = [spoken["peer"]["process0"], spoken["peer"]["process1"]]
    assert min(each) >= 1
    assert spoken["value"] == pytest.approx(2 * min(each) / sum(each), rel=1e-3)
    for case, row in rows.items():
        assert row["repeats"] == (6 if case == "several/apart2/front" else 3)  # of each front
        assert row["peer"]["least"] <= row["value"] <= row["peer"]["most"]
    alone, shared, apart = (rows[f"several/{case}"] for case in ("gpus1", "gpus2", "apart2"))
    for row in (shared, apart):
        assert row["peer"]["of_n_times"] == pytest.approx(row["value"] / alone["value"] / 2, rel=1e-3)
    assert apart["peer"]["of_one_front"] == pytest.approx(shared["value"] / apart["value"], rel=1e-3)


def test_shares_of_processes() -> None:
    row = even("several/gpus4/even", [100, 120, 80, 100])
    assert row.value == pytest.approx(0.8)
    assert row.peer == {"process0": 100, "process1": 120, "process2": 80, "process3": 100}
    assert even("several/gpus2/even", [0, 0]).value == 0


def test_what_is_between_marks() -> None:
    marks = [Mark(1.0, 0.5, 0, 0), Mark(3.0, 0.6, 10 * SAMPLE_RATE_HZ, 50), Mark(4.0, 0.7, 10 * SAMPLE_RATE_HZ, 50)]
    assert speeds(marks) == [5.0, 0.0]
    assert host_us(marks) == pytest.approx([2000.0, 100_000.0])


def spoken(samples: int) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result([0] * samples)
    return future


def test_a_load_keeps_as_many_on_their_way_as_it_may() -> None:
    futures: list[Future[Any]] = []
    full = threading.Event()

    def submit() -> Future[Any]:
        futures.append(Future())
        if len(futures) in (3, 5):
            full.set()
        return futures[-1]

    with Load(submit, 3) as load:
        assert full.wait(30)
        first = load.marks(0.0, 0)
        full.clear()
        for future in futures[:2]:
            future.set_result([0] * 7)
        assert full.wait(30)
        (mark,) = load.marks(0.0, 0)
    assert len(futures) == 5
    assert [(m.samples, m.requests) for m in (*first, mark)] == [(0, 0), (14, 2)]


def test_what_goes_wrong_ends_the_measurement() -> None:
    failed: Future[Any] = Future()
    failed.set_exception(ValueError("broken"))
    answers = iter([spoken(5), failed])
    with pytest.raises(ValueError, match="broken"), Load(lambda: next(answers), 8) as load:
        load.marks(0.01, 1000)


def test_a_crowd_that_takes_nothing_ends_the_measurement() -> None:
    def submit() -> Future[Any]:
        raise RuntimeError("closed")

    with pytest.raises(RuntimeError, match="closed"), Load(submit, 8) as load:
        load.marks(0.01, 1000)
