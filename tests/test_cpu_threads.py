"""The engine's threads: how many there are, and that callers, forks and resizing leave results alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from soprano_cupy import cores
from soprano_cupy.cpu import _engine, threads
from soprano_cupy.errors import ParameterError


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = _engine.get_threads()
    yield
    _engine.set_threads(before)


@pytest.fixture
def matrix() -> _engine.PackedMatrix:
    weights = np.random.default_rng(0).standard_normal((300, 90)).astype(np.float32)
    return _engine.PackedMatrix(weights, "float32")


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((20, 90)).astype(np.float32)


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPRANO_THREADS", "3")
    assert threads.use_wanted_threads() == 3
    assert _engine.get_threads() == 3
    monkeypatch.setenv("SOPRANO_THREADS", "1000")
    assert threads.wanted_threads() == threads.MAX_THREADS
    monkeypatch.setenv("SOPRANO_THREADS", "many")
    with pytest.raises(ParameterError, match="SOPRANO_THREADS"):
        threads.wanted_threads()
    monkeypatch.delenv("SOPRANO_THREADS")
    assert threads.wanted_threads() == cores.available_cores() >= 1


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
)
def test_a_control_group_holds_threads_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.cpu_quota(tmp_path) == quota
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert cores.available_cores() == (64 if quota is None else round(quota))


def test_affinity_counts_rather_than_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 9})
    assert cores.available_cores() == 3


def test_the_team_is_held_to_its_limits() -> None:
    assert _engine.set_threads(0) == 1
    assert _engine.set_threads(100_000) == threads.MAX_THREADS
    assert _engine.set_threads(2) == _engine.get_threads() == 2


def test_teams_of_any_size_agree(matrix: _engine.PackedMatrix, rows: np.ndarray) -> None:
    _engine.set_threads(1)
    expected = matrix.multiply(rows)
    for count in (2, 3, 16, 1, 4, 2):
        _engine.set_threads(count)
        for _ in range(20):
            np.testing.assert_array_equal(matrix.multiply(rows), expected)


def test_callers_take_turns(matrix: _engine.PackedMatrix, rows: np.ndarray) -> None:
    """Four Python threads compute at once while the team's size changes."""
    _engine.set_threads(2)
    expected = matrix.multiply(rows)
    right: list[bool] = []

    def compute() -> None:
        right.extend(np.array_equal(matrix.multiply(rows), expected) for _ in range(50))

    callers = [threading.Thread(target=compute) for _ in range(4)]
    for caller in callers:
        caller.start()
    for count in (1, 3, 2, 4, 2):
        _engine.set_threads(count)
        matrix.multiply(rows)
    for caller in callers:
        caller.join()
    assert right == [True] * 200


def test_a_forked_child_has_threads_of_its_own(matrix: _engine.PackedMatrix, rows: np.ndarray) -> None:
    _engine.set_threads(3)
    expected = matrix.multiply(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking beside threads
        child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(matrix.multiply(rows), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(matrix.multiply(rows), expected)


def test_a_process_ends_with_its_threads_asleep() -> None:
    program = """
import numpy as np
from soprano_cupy.cpu import _engine
_engine.set_threads(4)
matrix = _engine.PackedMatrix(np.ones((64, 64), np.float32), "float32")
print(matrix.multiply(np.ones((2, 64), np.float32)).sum())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(2.0 * 64 * 64), "")
