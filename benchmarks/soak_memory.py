"""What may not grow while a soak runs, and what may not be left: memory, threads, processes, open files."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.soak_faults import VARIABLE, held_bytes, trim

ALLOWED_MB, ALLOWED_SHARE = 64.0, 0.02  # that memory may grow by over the later half of a run
FEWEST_LOOKS = 3
LEFT_S = 10.0  # after which nothing may be left


class Memory:
    """Samples of memory in use, taken when nothing is on its way; of all processes together."""

    def __init__(self, devices: Sequence[str], pids: Callable[[], Sequence[int]]) -> None:
        self._gpu_too = devices[0] != "cpu"
        self._count, self._pids = len(devices), pids
        self._times: list[float] = []
        self._host: list[float] = []
        self._gpu: list[float] = []

    def sample(self) -> None:
        pids = list(self._pids())
        if self._count > 1 and len(pids) < self._count:  # one is being started anew
            return
        gc.collect()
        trim()
        self._times.append(time.monotonic())
        self._host.append(sum(resident_mb(pid) for pid in (os.getpid(), *pids)))
        self._gpu.append(sum(told_mb(pid) for pid in pids) + held_bytes() / 1e6 if self._gpu_too else 0.0)

    def line(self) -> str:
        if not self._times:
            return ""
        gpu = f", GPU {self._gpu[-1]:.0f} MB" if self._gpu_too else ""
        return f"host {self._host[-1]:.0f} MB{gpu}"

    def growth(self, values: Sequence[float]) -> float:
        """MB that a straight line through the later half grows by."""
        half = len(values) // 2
        if len(values) - half < 2:
            return 0.0
        times, later = np.array(self._times[half:]), np.array(values[half:])
        return float(np.polyfit(times - times[0], later, 1)[0] * (times[-1] - times[0]))

    def violations(self) -> list[str]:
        found = []
        if len(self._times) < FEWEST_LOOKS:
            found.append(f"memory could be looked at only {len(self._times)} times: what was on its way did not end")
        for name, values in (("host", self._host), ("GPU", self._gpu)):
            growth, allowed = self.growth(values), ALLOWED_MB + ALLOWED_SHARE * float(np.mean(values or [0.0]))
            if growth > allowed:
                found.append(f"{name} memory grew by {growth:.0f} MB in the later half; {allowed:.0f} are allowed")
        return found

    def summary(self) -> dict[str, Any]:
        if not self._times:
            return {}
        passed = self._times[-1] - self._times[len(self._times) // 2]
        return {
            "samples": len(self._times), "later_half_s": passed,
            **{
                f"{name}_{key}": value
                for name, values in (("host", self._host), ("gpu", self._gpu))
                for key, value in (
                    ("mean_mb", float(np.mean(values))), ("most_mb", max(values)), ("growth_mb", self.growth(values))
                )
            },
        }  # fmt: skip


class Traces:
    """What is there before a run, to be compared with what is there afterwards."""

    def __init__(self, *, gpu: bool) -> None:
        self._gpu = gpu
        self._threads = set(threading.enumerate())
        self._before = self._look()

    def _look(self) -> dict[str, set[str]]:
        found = {"process": set(children()), "shared memory": set(os.listdir("/dev/shm"))}
        if not self._gpu:  # a driver opens files of its own
            found["file"] = open_files()
        return found

    def left(self) -> list[str]:
        """What a run has left."""
        end = time.monotonic() + LEFT_S
        while (found := self._found()) and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def _found(self) -> list[str]:
        found = [f"a thread is left: {thread.name}" for thread in set(threading.enumerate()) - self._threads]
        now = self._look()
        return found + [f"a {name} is left: {one}" for name in now for one in now[name] - self._before[name]]


def children() -> list[str]:
    """Processes that this one has started and that have not been waited for."""
    found: list[str] = []
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            found += path.read_text(encoding="ascii").split()
        except OSError:  # the thread has ended meanwhile
            continue
    return found


def open_files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return found


def resident_mb(pid: int) -> float:
    """Memory of a process that it shares with no other file; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0.0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6


def told_mb(pid: int) -> float:
    """Memory of GPUs that a process has told of."""
    try:
        return int((Path(os.environ[VARIABLE]) / str(pid)).read_text(encoding="ascii") or 0) / 1e6
    except OSError:
        return 0.0
