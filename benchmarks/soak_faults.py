"""What a soak breaks on purpose: devices whose steps fail at given times, and sequences whose numbers are poisoned.

The plan travels in the environment, so that processes that serve a crowd find it too; its times are those of
`time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from soprano_cupy.crowd.device import Entry
from soprano_cupy.crowd.runner_device import RunnerDevice
from soprano_cupy.errors import DeviceError

VARIABLE = "SOPRANO_SOAK_FAULTS"
POISONED_ALWAYS, POISONED_ONCE = 13, 14  # a seed's bits from the 32nd on: numbers that are not finite, on purpose
NAN_BFLOAT16 = 0x7FC0
INJECTED = "injected"


def write_plan(begin: float, steps: dict[str, list[tuple[float, str]]]) -> None:
    """Poison from `begin` on; steps of a device, by its name, that fail: when, and "launch" or "memory"."""
    os.environ[VARIABLE] = json.dumps({"begin": begin, "steps": steps})


def poison_of(seed: int | None) -> int:
    return (seed or 0) >> 32


class Faults:
    """The plan as one process follows it."""

    def __init__(self) -> None:
        self._text: str | None = None
        self._begin = float("inf")
        self._steps: dict[str, list[tuple[float, str]]] = {}
        self._poisoned: set[tuple[int, int]] = set()

    def _read(self) -> None:
        text = os.environ.get(VARIABLE)
        if text != self._text and text is not None:
            plan = json.loads(text)
            self._begin = plan["begin"]
            self._steps = {name: [(at, kind) for at, kind in steps] for name, steps in plan["steps"].items()}
        self._text = text

    def step(self, name: str) -> None:
        """Raise what a step of this device is to raise by now."""
        self._read()
        due = self._steps.get(name)
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
