"""Stand-ins for the persistent kernel and the batch that it works on, without a GPU."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from soprano_cupy.cuda.module import DeviceFacts
from soprano_cupy.errors import DeviceError
from soprano_cupy.generation import Request
from soprano_cupy.gpu import slots
from soprano_cupy.gpu.persistent import Common
from soprano_cupy.gpu.persistent_path import PersistentPath
from soprano_cupy.gpu.persistent_run import PersistentRun
from soprano_cupy.sampling import SamplingParams

HOPPER, OTHER = (9, 0), (8, 0)


def facts(capability: tuple[int, int] = HOPPER) -> DeviceFacts:
    return DeviceFacts(0, "a GPU", capability, 132)


def request(temperature: float = 0.0, length: int = 5) -> Request:
    return Request(np.arange(4, 4 + length, dtype=np.int32), SamplingParams(temperature, seed=1, max_new_tokens=200))


class StandIn:
    """A decoder whose kernel makes tokens 100, 101, ... in the words of `FakeBatch`."""

    def __init__(self, problem: str | None = None) -> None:
        self.reason, self.nbytes = problem, 0
        self.prepared: list[str] = []
        self.launches: list[tuple[int, Common]] = []
        self.raises: Exception | None = None
        self.batch: FakeBatch | None = None

    def problem(self, voices: int = 1) -> str | None:
        if isinstance(self.reason, Exception):
            raise self.reason
        return self.reason

    def prepare(self, voices: int = 1) -> None:
        self.prepared.append(threading.current_thread().name)
        self.nbytes = 143

    def launch(self, stream: int, places: list[int], common: Common) -> None:
        if self.raises is not None:
            raise self.raises
        assert self.batch is not None
        self.launches.append((len(places), common))
        self.batch.start(places, common.budget)


def path_of(decoder: Any, setting: str = "auto", capability: tuple[int, int] = HOPPER) -> PersistentPath:
    return PersistentPath(decoder, facts(capability), setting)


class FakeStream:
    ptr = 7


class FakeBatch:
    """Voices whose n-th token is 100 + n and that end after `lengths` tokens; whoever waits lets the kernel go on."""

    def __init__(self, lengths: list[int]) -> None:
        self.stream, self.lengths = FakeStream(), lengths
        self.progress = np.zeros(len(lengths), np.uint64)
        self.left: dict[int, int] = {}  # tokens of the launch under way, by slot
        self.report = self.cancelled = 0
        self.stall_after = -1  # tokens of a launch
        self.went_on: list[bool] = []
        self.run: PersistentRun | None = None

    def start(self, places: list[int], budget: int) -> None:
        assert not self.left, "launched while the one before goes on"
        self.left = dict.fromkeys(places, budget)

    def places(self, slot: int) -> int:
        return slot

    def common(self, budget: int, *, cancel: int, report: int) -> Common:
        return Common(1, 2, budget, cancel, report)

    def draw(self, slot: int) -> None:
        count = slots.progress_count(int(self.progress[slot])) + 1
        status = slots.STOP if count >= self.lengths[slot] else slots.RUNNING
        self.progress[slot] = count | status << 32 | (100 + count) << 40

    def step(self) -> None:
        """The sampling kernel draws the first tokens; then the kernel makes one of each voice that runs, or ends."""
        if not self.progress.all():
            for slot in range(len(self.lengths)):
                self.draw(slot)
            return
        if self.stall_after == 0:
            self.report, self.left = 1 + 3, {}
            return
        self.stall_after -= 1
        for slot in list(self.left):
            if not slots.progress_status(int(self.progress[slot])):
                self.draw(slot)
                self.left[slot] -= 1
            if self.left[slot] == 0 or slots.progress_status(int(self.progress[slot])) or self.cancelled:
                del self.left[slot]
        if not self.left:
            self.report = 1

    def await_word(self, slot: int, word: int, *, listened: bool) -> None:
        assert int(self.progress[slot]) == word
        while self.left and int(self.progress[slot]) == word:
            self.step()
        if int(self.progress[slot]) == word:
            raise DeviceError("the GPU is done")

    def go_on(self, *, again: bool) -> None:
        self.went_on.append(again)
        assert self.run is not None
        run, self.run = self.run, None
        run.close()


class FakeWords:
    """`ControlWords` of a `FakeBatch`."""

    device = 0x1000

    def __init__(self, batch: FakeBatch) -> None:
        self.batch = batch

    ended = property(lambda self: bool(self.batch.report))
    code = property(lambda self: max(0, self.batch.report - 1))

    def reset(self) -> None:
        self.batch.report = self.batch.cancelled = 0

    def cancel(self) -> None:
        self.batch.cancelled = 1

    def await_report(self, stream: int) -> None:
        while self.batch.left:
            self.batch.step()
