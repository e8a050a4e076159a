"""What processes open in tests: a crowd on a simulated device in real time, whose texts say what is wanted."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from simulated_device import Clock, Faults, SimulatedDevice, sentence

from soprano_cupy.crowd import processes_worker
from soprano_cupy.crowd.crowd import Crowd
from soprano_cupy.errors import DeviceError, TextError
from soprano_cupy.generation import Request
from soprano_cupy.sampling import SamplingParams


class RealTime(SimulatedDevice):
    """Steps take no time by themselves; virtual time goes on with each turn."""

    def report(self, watched):  # type: ignore[no-untyped-def]
        self.clock.now += 0.0005
        time.sleep(0.0001)
        return super().report(watched)


class Voice:
    """Texts are "job sentences tokens"; or orders to the process: "die", "stop", "nothing", "a bug"."""

    def __init__(self, slots: int = 8, failing: bool = False, absent: bool = False, life_s: float = 5.0) -> None:
        if absent:
            raise DeviceError("the device has fallen off")
        processes_worker.LIFE_S = life_s
        steps: dict[int, Any] = {i: DeviceError("launch failed") for i in range(30, 1000)} if failing else {}
        faults = Faults(steps=steps, poisoned={7: 99})
        self.crowd = Crowd([lambda: RealTime(slots, Clock(), faults)])

    def prepare(self, texts: list[str], params: list[SamplingParams]) -> list[list[Request] | Exception]:
        prepared: list[list[Request] | Exception] = []
        for text in texts:
            try:
                prepared.append(self._prepare(text))
            except Exception as error:
                prepared.append(error)
        return prepared

    def _prepare(self, text: str) -> list[Request]:
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if text.startswith("slowly"):
            time.sleep(1)
            text = text[6:]
        if text == "nothing":
            raise TextError("nothing to speak")
        if text == "a bug":
            raise IndexError("a bug")
        job, sentences, tokens = (int(word) for word in text.split())
        return [sentence(job, i, tokens) for i in range(sentences)]
