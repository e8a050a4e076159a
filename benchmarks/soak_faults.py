"""What a soak breaks on purpose: devices whose steps fail at given times, and sequences whose numbers are poisoned.

The plan is a file in a folder that the environment names, so that processes that serve a crowd find it too; its times
are those of `time.monotonic`, which all processes of a machine share. Each process tells there, too, how much memory of
a GPU it has.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soprano_cupy.crowd.device import Entry
from soprano_cupy.crowd.processes_worker import SopranoVoice
from soprano_cupy.crowd.runner_device import RunnerDevice
from soprano_cupy.errors import DeviceError

VARIABLE = "SOPRANO_SOAK_FOLDER"
DEVICE = "SOPRANO_SOAK_DEVICE"  # what the front calls a process' device; there it is called cuda:0
PLAN, TELL_S = "plan.json", 0.5
POISONED_ALWAYS, POISONED_ONCE = 13, 14  # a seed's bits from the 32nd on: numbers that are not finite, on purpose
NAN_BFLOAT16 = 0x7FC0
INJECTED = "injected"


def write_plan(begin: float, steps: dict[str, list[tuple[float, str]]]) -> None:
    """Poison from `begin` on; steps of a device, by its name, that fail: when, and "launch" or "memory"."""
    path = Path(os.environ[VARIABLE]) / PLAN
    path.with_suffix(".new").write_text(json.dumps({"begin": begin, "steps": steps}), encoding="ascii")
    path.with_suffix(".new").rename(path)


def poison_of(seed: int | None) -> int:
    return (seed or 0) >> 32


class Faults:
    """The plan as one process follows it."""

    def __init__(self) -> None:
        self._born = time.monotonic()
        self._read_already = False
        self.own_name: str | None = None  # where it differs from what the device calls itself
        self._begin = float("inf")
        self._steps: dict[str, list[tuple[float, str]]] = {}
        self._poisoned: set[tuple[int, int]] = set()

    def _read(self) -> None:
        path = Path(os.environ.get(VARIABLE, "/nowhere")) / PLAN
        if self._read_already or not path.exists():
            return
        plan = json.loads(path.read_text(encoding="ascii"))
        self._begin = plan["begin"]  # what was to happen before this process was started has happened to another
        self._steps = {name: [step for step in steps if step[0] > self._born] for name, steps in plan["steps"].items()}
        self._read_already = True

    def step(self, name: str) -> None:
        """Raise what a step of this device is to raise by now."""
        self._read()
        due = self._steps.get(self.own_name or name)
        if due and time.monotonic() >= due[0][0]:
            _, kind = due.pop(0)
            if kind == "memory":
                raise MemoryError(f"{INJECTED}: out of memory")
            raise DeviceError(f"{INJECTED}: a launch failed")

    def poison(self, entries: Sequence[Entry]) -> list[int]:
        """The slots of those that are to be poisoned as they enter."""
        self._read()
        if time.monotonic() < self._begin:
            return []
        found = []
        for entry in entries:
            key = entry.request.params.seed or 0, entry.request.stream
            kind = poison_of(key[0])
            if kind == POISONED_ALWAYS or (kind == POISONED_ONCE and key not in self._poisoned):
                self._poisoned.add(key)
                found.append(entry.slot)
        return found


FAULTS = Faults()


class Voice(SopranoVoice):
    """What a process of a crowd opens here: the ordinary voice, whose device fails as the plan says."""

    def __init__(self, **options: Any) -> None:
        FAULTS.own_name = os.environ[DEVICE]
        install(options["device"])
        super().__init__(**options)
        threading.Thread(target=tell_memory, args=(options["device"],), daemon=True).start()


def tell_memory(device: str) -> None:
    """Write down what CuPy holds for this process, again and again; everything large comes from there."""
    path = Path(os.environ[VARIABLE]) / str(os.getpid())
    while path.parent.is_dir():
        trim()
        if device != "cpu":
            with contextlib.suppress(OSError):  # the folder is gone: the run is over
                path.write_text(str(held_bytes()), encoding="ascii")
        time.sleep(TELL_S)


def trim() -> None:
    """Let the allocator give back what it keeps, which is no leak."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def held_bytes() -> int:
    import cupy

    return int(cupy.get_default_memory_pool().total_bytes())


def install(device: str) -> None:
    """Let the devices of this process fail as the plan says."""
    if device == "cpu":
        _install_on_runners()
    else:
        _install_on_gpus()


def _install_on_runners() -> None:
    advance, admit, take = RunnerDevice.advance, RunnerDevice.admit, RunnerDevice._take

    def failing_advance(self: RunnerDevice) -> None:
        FAULTS.step(self.name)
        advance(self)

    def poisoning_admit(self: RunnerDevice, entries: Sequence[Entry]) -> None:
        admit(self, entries)
        for slot in FAULTS.poison(entries):
            self._of[slot].poisoned = True  # type: ignore[attr-defined]

    def poisoned_take(self: RunnerDevice, sequence: Any, token: int, state: Any, distance: Any, finite: bool) -> None:
        take(self, sequence, token, state, distance, finite and not getattr(sequence, "poisoned", False))

    RunnerDevice.advance, RunnerDevice.admit = failing_advance, poisoning_admit  # type: ignore[method-assign]
    RunnerDevice._take = poisoned_take  # type: ignore[method-assign]


def _install_on_gpus() -> None:
    from soprano_cupy.gpu.crowd_device import GpuDevice

    advance, admit = GpuDevice.advance, GpuDevice.admit

    def failing_advance(self: GpuDevice) -> None:
        FAULTS.step(self.name)
        advance(self)

    def poisoning_admit(self: GpuDevice, entries: Sequence[Entry]) -> None:
        admit(self, entries)
        for slot in FAULTS.poison(entries):
            with self._steps.stream:
                values: Any = self._steps._arena["values"]
                values[:, slot] = np.uint16(NAN_BFLOAT16)

    GpuDevice.advance, GpuDevice.admit = failing_advance, poisoning_admit  # type: ignore[method-assign]
