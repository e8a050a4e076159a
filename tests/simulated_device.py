"""A device in virtual time: sentences as long as their prompts say, audio that tells where it belongs, and failures."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from soprano_cupy.crowd.device import FAILED, NOT_WATCHED, RUNNING, STOP, STUCK, Audio, Entry, News, Order, Report
from soprano_cupy.crowd.driver import Driver
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.scheduler import Scheduler
from soprano_cupy.errors import DeviceError
from soprano_cupy.generation import Request
from soprano_cupy.sampling import SamplingParams

STEP_S = 0.001
AHEAD = 2  # steps under way
TOKEN_SAMPLES = 8
LAG = 4  # states without a sample of their own before the end


def sentence(job: int, index: int, tokens: int, stuck_attempts: int = 0) -> Request:
    """A request that makes `tokens` tokens; its first `stuck_attempts` attempts get stuck."""
    ids = np.array([job, index, tokens, stuck_attempts, 0, 0, 0, 0][: 4 + index % 5], np.int32)
    return Request(ids, SamplingParams(seed=1), index)


def audio_of(request: Request, attempt: int = 0) -> np.ndarray:
    """All samples of a sentence: each tells job, sentence, token and attempt."""
    job, index, tokens, _ = request.ids[:4].tolist()
    places = np.arange(max(0, tokens - 2) * TOKEN_SAMPLES)
    return (((job * 64 + index) * 1024 + places) * 2 + attempt % 2).astype(np.float64)


def requests(job: int, sizes: list[tuple[int, int]]) -> list[Request]:
    """A job's sentences, of (tokens, stuck attempts) each."""
    return [sentence(job, i, tokens, stuck) for i, (tokens, stuck) in enumerate(sizes)]


def expected(wanted: list[Request], wish: Wish) -> np.ndarray:
    """What is heard: of each sentence the first attempt that is not stuck, or the last."""
    attempts = [min(int(r.ids[3]), wish.retries) for r in wanted]
    return np.concatenate([audio_of(r, attempt) for r, attempt in zip(wanted, attempts, strict=True)])


@dataclass
class Clock:
    """Virtual time."""

    now: float = 0.0


@dataclass
class Faults:
    """What goes wrong: calls of `advance` and `admit` that raise, counted over a place's devices; poisoned jobs."""

    steps: dict[int, BaseException] = field(default_factory=dict)
    admissions: dict[int, BaseException] = field(default_factory=dict)
    poisoned: dict[int, int] = field(default_factory=dict)  # job -> sentences of it that will still fail
    makes: int = 1 << 30  # devices that can still be made there
    step_count: int = 0
    admission_count: int = 0


@dataclass
class _Slot:
    request: Request
    attempt: int
    count: int = 0
    status: int = RUNNING
    give_up: bool = False
    stuck: bool = False
    wanted: bool = True
    ordered: int = 0  # samples
    under_way: int = 0  # orders


class SimulatedDevice:
    """`Device` that checks what it is told to do."""

    name, most_prompt, prompt_rows, most_entries, decode_states = "simulated", 64, 40, 16, 300

    def __init__(self, slots: int, clock: Clock, faults: Faults | None = None, *, steps_ahead: int = AHEAD) -> None:
        self.slots, self.clock, self.faults, self._ahead = slots, clock, faults or Faults(), steps_ahead
        if self.faults.makes <= 0:
            error = DeviceError("the device has fallen off")
            error.sticky = True
            raise error
        self.faults.makes -= 1
        self._of: dict[int, _Slot] = {}
        self._stream: list[tuple[float, Callable[[], None]]] = []  # the language model's work, in order
        self._steps: list[float] = []  # when those under way end
        self._decoder: list[tuple[float, list[tuple[Order, np.ndarray]]]] = []
        self._leaving: list[tuple[float, int]] = []
        self.asked = self.made_steps = self.most_used = 0
        self.removed_at: dict[tuple[int, int], int] = {}  # (job, sentence) -> steps asked for then
        self.closed = False

    @property
    def used(self) -> int:
        """Slots that hold something."""
        return len(self._of) + len(self._leaving)

    def _end_of_stream(self) -> float:
        return max([self.clock.now, *(time for time, _ in self._stream)])

    def admit(self, entries: Sequence[Entry]) -> None:
        self.faults.admission_count += 1
        if (error := self.faults.admissions.pop(self.faults.admission_count, None)) is not None:
            raise error
        rows = sum(len(entry.request.ids) for entry in entries)
        assert 1 <= len(entries) <= self.most_entries
        assert len(entries) == 1 or rows <= self.prompt_rows
        for slot, request, give_up in entries:
            assert 0 <= slot < self.slots, "no such slot"
            assert slot not in self._of, "a slot that is taken"
            assert slot not in [s for _, s in self._leaving], "a slot that is not free yet"
            self._of[slot] = _Slot(request, request.stream >> 32, give_up=give_up)
        self.most_used = max(self.most_used, self.used)
        entered = [self._of[entry.slot] for entry in entries]
        self._stream.append((self._end_of_stream() + STEP_S / 2, lambda: self._draw(entered)))

    def remove(self, slots: Sequence[int]) -> None:
        for slot in slots:
            held = self._of.pop(slot)
            held.wanted = False
            self.removed_at.setdefault(tuple(held.request.ids[:2].tolist()), self.asked)
            end = self._end_of_stream() if held.status == RUNNING else self.clock.now
            ends = [end, *(time for time, work in self._decoder for order, _ in work if order.slot == slot)]
            self._leaving.append((max(ends), slot))

    def advance(self) -> None:
        self.faults.step_count += 1
        if (error := self.faults.steps.pop(self.faults.step_count, None)) is not None:
            raise error
        while len(self._steps) >= self._ahead:
            self.clock.now = max(self.clock.now, self._steps.pop(0))
            self._catch_up()
        end = self._end_of_stream() + STEP_S
        running = list(self._of.values())
        self._stream.append((end, lambda: self._draw(running)))
        self._steps.append(end)
        self.asked += 1

    def _draw(self, slots: list[_Slot]) -> None:
        """One token for each."""
        for held in slots:
            if held.status != RUNNING or not held.wanted:
                continue
            job, _, tokens, stuck_attempts = held.request.ids[:4].tolist()
            held.count += 1
            held.stuck = held.attempt < stuck_attempts and held.count > tokens // 2
            if self.faults.poisoned.get(job, 0) > 0 and held.count > tokens // 2:
                self.faults.poisoned[job] -= 1
                held.status = FAILED
            elif held.stuck and held.give_up:
                held.status = STUCK
            elif held.count >= tokens:
                held.status = STOP

    def _catch_up(self) -> None:
        now = self.clock.now
        while self._stream and self._stream[0][0] <= now:
            self._stream.pop(0)[1]()
        self._steps = [time for time in self._steps if time > now]

    def decode_room(self) -> int:
        return 2 - len(self._decoder)

    def decode(self, orders: Sequence[Order]) -> None:
        assert len(self._decoder) < 2
        assert len({order.slot for order in orders}) == len(orders)
        work = []
        for order in orders:
            held = self._of[order.slot]
            counted = held.count - (held.status == STOP)
            assert order.states <= counted, "states that are not there"
            assert not order.ends or held.status != RUNNING
            end = max(0, order.states - (1 if order.ends else LAG)) * TOKEN_SAMPLES
            work.append((order, audio_of(held.request, held.attempt)[held.ordered : end].astype(np.float64)))
            held.ordered = max(held.ordered, end)
        begin = max([self.clock.now, *(time for time, _ in self._decoder)])
        self._decoder.append((begin + STEP_S, work))

    def report(self, watched: array[int]) -> Report:
        now = self.clock.now
        self._catch_up()
        assert len(watched) == self.slots
        news = []
        for slot, due in enumerate(watched):
            held = self._of.get(slot)
            if held is None:
                assert due == NOT_WATCHED, "a slot with nothing in it is waited for"
            elif due != NOT_WATCHED and (held.count >= due or held.status != RUNNING):
                news.append(News(slot, held.count, held.status, held.stuck))
        audio = []
        while self._decoder and self._decoder[0][0] <= now:
            audio += [Audio(order.slot, samples, order.ends) for order, samples in self._decoder.pop(0)[1]]
        left = [slot for time, slot in self._leaving if time <= now]
        self._leaving = [(time, slot) for time, slot in self._leaving if time > now]
        return Report(news, audio, left)

    def tokens(self, slot: int, count: int) -> np.ndarray:
        held = self._of[slot]
        assert count <= held.count
        return np.arange(count, dtype=np.int32) + 1000 * held.attempt

    def wait(self, seconds: float) -> None:
        self.clock.now += STEP_S / 4

    def close(self) -> None:
        self.closed = True


class Stage:
    """Drivers in virtual time, in one thread: what `crowd.Worker` does, without waiting."""

    def __init__(self, scheduler: Scheduler, slots: Sequence[int], faults: Sequence[Faults] | None = None) -> None:
        self.scheduler, self.clock = scheduler, Clock()
        self.faults = list(faults or [Faults() for _ in slots])
        self._slots = list(slots)
        self.drivers: list[Driver | None] = [None] * len(self._slots)
        for place in range(len(self._slots)):
            self._make(place)

    @property
    def working(self) -> list[Driver]:
        return [driver for driver in self.drivers if driver is not None]

    def device(self, place: int = 0) -> SimulatedDevice:
        driver = self.drivers[place]
        assert driver is not None
        assert isinstance(driver.device, SimulatedDevice)
        return driver.device

    def _make(self, place: int) -> None:
        self.drivers[place] = None
        try:
            device = SimulatedDevice(self._slots[place], self.clock, self.faults[place])
        except DeviceError as error:
            if not self.working:
                self.scheduler.close(error)
            return
        driver = self.drivers[place] = Driver(device, self.scheduler)
        self.scheduler.join(driver)

    def turn(self) -> bool:
        """One turn of every driver; whether anything is going on."""
        busy = False
        self.scheduler.expire(self.clock.now)
        for place, driver in enumerate(self.drivers):
            if driver is None:
                continue
            try:
                busy |= driver.turn(self.clock.now)
            except (DeviceError, MemoryError) as error:
                driver.device.close()
                self.scheduler.leave(driver, error)
                self._make(place)
                busy = True
        if not any(driver.generating for driver in self.working):
            self.clock.now += STEP_S / 4
        return busy

    def run(self, turns: int = 100_000) -> None:
        """Until nothing is left to do."""
        for _ in range(turns):
            if not self.turn() and not self.scheduler.unfinished:
                return
        raise AssertionError(f"{self.scheduler.unfinished} requests are not done after {turns} turns")


def idle(stage: Stage) -> None:
    """Every slot is free again."""
    for driver in stage.working:
        assert driver.free == driver.slots
        assert isinstance(driver.device, SimulatedDevice)
        assert driver.device.used == 0
    assert stage.scheduler.unfinished == stage.scheduler.waiting == 0
